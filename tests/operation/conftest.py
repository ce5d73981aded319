"""The services of tests/api, and processes, for tests of how they are run."""

from tests.api.conftest import api, asked, serve
from tests.operation.process import start

__all__ = ["api", "asked", "serve", "start"]

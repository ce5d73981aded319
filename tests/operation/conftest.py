"""The services of tests/api, and processes, for tests of how they are run."""

from collections.abc import Iterator

import pytest

from tests.api.conftest import api, asked, serve
from tests.operation.process import start
from tests.servers import redis_database, redis_server

__all__ = ["api", "asked", "serve", "start"]


@pytest.fixture
def queue_without_workers() -> Iterator[str]:
    """A Redis database that nobody takes jobs from."""
    with redis_server() as server, redis_database(server) as url:
        yield url

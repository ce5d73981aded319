"""The service in a process that can be killed, which tells of its progress at once."""

from functools import partial

import pytest

from tests.operation.process import Start
from tests.operation.process import start as process

__all__ = ["process"]


@pytest.fixture
def start(process: Start) -> Start:
    """Start it; each call is one more process on the same data."""
    return partial(process, progress_interval_s=0.05)

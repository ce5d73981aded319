"""A job is followed through a restart of its service, but not for ever."""

import time

import httpx2
import pytest

from app.cli import base
from headwater_client import errors
from tests.sdk.conftest import scripted
from tests.sdk.test_retries import JOB, answer


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _seconds: None)


def test_a_service_that_restarts_is_waited_for() -> None:
    gone = [httpx2.ConnectError("restarting")] * 5
    client, sent = scripted(answer(JOB), answer(JOB), *gone, answer({**JOB, "state": "succeeded"}), retries=1)
    base.follow(client.jobs.get("job_1"))
    assert sent.answers == []


def test_a_service_that_stays_away_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "PATIENCE_S", -1.0)
    client, _ = scripted(answer(JOB), *[httpx2.ConnectError("gone")] * 2, retries=1)
    with pytest.raises(errors.ConnectionFailed):
        base.follow(client.jobs.get("job_1"))

"""What is sent again, when, and under which key; and what no retry helps against."""

import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import httpx2
import pytest

from headwater_client import errors
from headwater_client._core import refusal
from tests.sdk.conftest import scripted

ALIVE = {"status": "ok"}
JOB: dict[str, Any] = dict.fromkeys(
    ("index", "model", "progress", "result", "error", "request_id", "started_at", "finished_at")
)
JOB |= {"id": "job_1", "kind": "build_index", "cancel_requested": False, "attempts": 1}
JOB |= {"version": 3, "state": "running", "created_at": "2026-11-24T12:00:00Z"}
DATASET: dict[str, Any] = {"id": "dst_1", "name": "rows", "source": "rows.jsonl", "rows": 1, "duplicates_skipped": 0}
DATASET |= {"content_hash": "", "columns": {}, "created_at": "2026-11-24T12:00:00Z"}


@pytest.fixture(autouse=True)
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long was waited; nobody really waits."""
    found: list[float] = []
    monkeypatch.setattr(time, "sleep", found.append)
    return found


def answer(body: Any = None, status: int = 200, **headers: str) -> httpx2.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx2.Response(status, json=body or ALIVE, headers=named)


def problem(status: int, slug: str, **headers: str) -> httpx2.Response:
    body = {"type": f"urn:headwater:problem:{slug}", "title": slug, "status": status, "detail": "so it is"}
    return answer(body, status, **headers)


def test_retry_after_is_respected(slept: list[float]) -> None:
    client, sent = scripted(
        problem(503, "busy", Retry_After="7"), problem(429, "quota-exceeded", Retry_After="3"), answer()
    )
    assert client.is_ready().status == "ok"
    assert slept == [7, 3]
    assert len(sent.sent) == 3


def test_retry_after_may_be_a_date(slept: list[float]) -> None:
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    client, _ = scripted(problem(503, "busy", Retry_After=soon), answer())
    client.is_ready()
    assert 25 < slept[0] <= 30


def test_who_wants_to_be_asked_in_an_hour_is_not_waited_for(slept: list[float]) -> None:
    client, _ = scripted(problem(503, "busy", Retry_After="3600"))
    with pytest.raises(errors.Unavailable) as refused:
        client.is_ready()
    assert (refused.value.retry_after, slept) == (3600, [])


def test_waits_grow_and_end(slept: list[float]) -> None:
    client, sent = scripted(*[httpx2.ConnectError("nobody there")] * 5)
    with pytest.raises(errors.ConnectionFailed, match=r"GET /healthz.*nobody there"):
        client.is_alive()
    assert len(sent.sent) == 5
    assert all(0.25 * 2**n <= wait <= 0.5 * 2**n for n, wait in enumerate(slept))


def test_every_attempt_to_make_something_carries_the_same_key() -> None:
    lost = httpx2.ReadTimeout("too slow")
    client, sent = scripted(
        lost, problem(409, "request-in-flight", Retry_After="1"), answer(DATASET, 201), answer(DATASET, 201)
    )
    client.datasets.create("rows", "rows.jsonl")
    client.datasets.create("rows", "rows.jsonl")
    keys = [request.headers["Idempotency-Key"] for request in sent.sent]
    assert len(set(keys[:3])) == 1
    assert keys[3] != keys[0]


def test_a_key_of_ones_own_is_sent() -> None:
    client, sent = scripted(answer(DATASET, 201))
    client.datasets.create("rows", "rows.jsonl", idempotency_key="nightly-7")
    assert sent.sent[0].headers["Idempotency-Key"] == "nightly-7"
    assert b"nightly" not in sent.sent[0].content


def test_a_file_is_sent_whole_each_time(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "once"}\n')
    client, sent = scripted(
        httpx2.WriteError("gone"), answer(DATASET, 201), httpx2.ReadError("gone"), answer(DATASET, 201)
    )
    client.datasets.upload("rows", path)
    with path.open("rb") as file:
        client.datasets.upload("rows", file)
    assert all(b'{"text": "once"}' in request.content for request in sent.sent)


def test_what_may_have_been_done_is_not_done_again() -> None:
    client, sent = scripted(answer(JOB), httpx2.ReadTimeout("lost"))
    job = client.jobs.get("job_1")
    with pytest.raises(errors.ConnectionFailed):
        job.cancel()
    assert [request.method for request in sent.sent] == ["GET", "POST"]


def test_what_a_proxy_lost_may_have_been_done() -> None:
    client, sent = scripted(answer(JOB), httpx2.Response(504, text="<html>"))
    with pytest.raises(errors.Problem):
        client.jobs.get("job_1").cancel()
    assert len(sent.sent) == 2


def test_what_was_surely_not_done_is_tried_again() -> None:
    client, _ = scripted(answer(JOB), httpx2.ConnectError("restarting"), answer({**JOB, "state": "cancelled"}))
    assert client.jobs.get("job_1").cancel().state == "cancelled"


def test_a_conflict_is_not_tried_again() -> None:
    client, sent = scripted(problem(409, "conflict"))
    with pytest.raises(errors.Conflict):
        client.models.delete("m")
    assert len(sent.sent) == 1


@pytest.mark.parametrize("status", [502, 503, 504])
def test_the_page_of_a_proxy_is_waited_out(status: int) -> None:
    client, _ = scripted(httpx2.Response(status, text="<html>Bad gateway</html>"), answer())
    assert client.is_ready().status == "ok"


@pytest.mark.parametrize(
    "other", [httpx2.Response(404, text="<html>"), httpx2.Response(200, text="hello"), httpx2.Response(200, json=[])]
)
def test_what_is_no_headwater_is_said(other: httpx2.Response) -> None:
    client, _ = scripted(other)
    with pytest.raises(errors.UnexpectedAnswer, match="http://headwater/healthz"):
        client.is_alive()


# --- events


def event(version: int, state: str, name: str = "progress") -> bytes:
    data = httpx2.Response(200, json={**JOB, "version": version, "state": state}).text
    return f"event: {name}\nid: {version}\nretry: 1000\ndata: {data}\n\n".encode()


class Broken(httpx2.SyncByteStream):
    """A stream that breaks behind what it has."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def __iter__(self) -> Any:
        yield self._content
        raise httpx2.ReadError("the connection is gone")


def stream(content: bytes, broken: bool = False) -> httpx2.Response:
    headers = {"Content-Type": "text/event-stream"}
    if broken:
        return httpx2.Response(200, headers=headers, stream=Broken(content))
    return httpx2.Response(200, headers=headers, content=content)


def test_a_lost_stream_is_taken_up_behind_its_last_event(slept: list[float]) -> None:
    client, sent = scripted(
        answer(JOB),
        stream(event(4, "running"), broken=True),
        problem(503, "shutting-down", Retry_After="2"),
        stream(event(5, "running")),  # which ends in order, since the service restarts
        stream(event(9, "succeeded", "end")),
    )
    assert [info.version for info in client.jobs.get("job_1").events()] == [4, 5, 9]
    assert [request.headers.get("Last-Event-ID") for request in sent.sent[1:]] == [None, "4", "4", "5"]
    assert slept == [1.0, 2.0, 1.0]


def test_events_of_other_names_are_passed_over_and_what_is_no_job_is_said() -> None:
    other = b"event: hint\ndata: later\n\n"
    client, _ = scripted(answer(JOB), stream(other + event(4, "succeeded", "end")))
    assert [info.version for info in client.jobs.get("job_1").events()] == [4]
    client, _ = scripted(answer(JOB), stream(b"event: end\ndata: {}\n\n"))
    with pytest.raises(errors.UnexpectedAnswer):
        list(client.jobs.get("job_1").events())


def test_a_stream_that_is_never_there_is_given_up() -> None:
    client, sent = scripted(answer(JOB), *[httpx2.ConnectError("nobody")] * 3, retries=2)
    with pytest.raises(errors.ConnectionFailed):
        list(client.jobs.get("job_1").events())
    assert len(sent.sent) == 4


def test_a_stream_that_may_not_be_read_is_refused_at_once() -> None:
    client, _ = scripted(answer(JOB), problem(403, "missing-scope"))
    with pytest.raises(errors.MissingScope):
        list(client.jobs.get("job_1").events())


def test_who_stops_listening_leaves_the_stream() -> None:
    client, _ = scripted(answer(JOB), stream(event(4, "running") + event(5, "running")))
    for info in client.jobs.get("job_1").events():
        assert info.version == 4
        break


# --- jobs and artifacts


def test_a_job_that_failed_says_why() -> None:
    error = {"code": "DiskFull", "detail": "no room", "field": None}
    client, _ = scripted(answer(JOB), answer({**JOB, "state": "failed", "error": error}))
    with pytest.raises(errors.JobFailed, match=r"job_1 failed \(DiskFull\): no room"):
        client.jobs.get("job_1").wait()


def test_waiting_ends_and_the_job_goes_on() -> None:
    client, _ = scripted(answer(JOB), answer(JOB))
    with pytest.raises(errors.JobTimeout, match="it goes on"):
        client.jobs.get("job_1").wait(timeout=0)


def test_progress_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    now = {"stage": "gradients", "done": 96, "total": 211, "unit": "rows", "rate": 7.4, "eta_s": 75.5}
    client, _ = scripted(answer(JOB), answer({**JOB, "progress": now}), answer({**JOB, "state": "succeeded"}))
    client.jobs.get("job_1").wait(progress=True)
    told = capsys.readouterr().err
    assert "96/211 rows, 7.4 rows/s, 1:15 left" in told
    assert told.endswith("build_index  succeeded\n")


def test_half_a_file_is_never_taken_for_the_whole(tmp_path: Path) -> None:
    half = httpx2.Response(200, stream=Broken(b"half"))
    client, _ = scripted(answer(JOB), half, httpx2.Response(200, content=b"whole"))
    client.jobs.get("job_1").download(tmp_path, "a/b.bin")
    assert (tmp_path / "a" / "b.bin").read_bytes() == b"whole"
    client, _ = scripted(answer(JOB), *[httpx2.Response(200, stream=Broken(b"half")) for _ in range(2)], retries=1)
    with pytest.raises(errors.ConnectionFailed):
        client.jobs.get("job_1").download(tmp_path, "c.bin")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("path", ["../up", "/etc/passwd", "a/../../up"])
def test_no_artifact_lands_outside_the_folder(tmp_path: Path, path: str) -> None:
    client, sent = scripted(answer(JOB))
    with pytest.raises(errors.UnexpectedAnswer, match="outside"):
        client.jobs.get("job_1").download(tmp_path / "here", path)
    assert len(sent.sent) == 1


# --- what a newer service sends


def test_fields_that_are_added_later_break_nothing() -> None:
    client, _ = scripted(answer({**DATASET, "colour": "blue"}))
    dataset = client.datasets.get("rows")
    assert dataset.model_extra == {"colour": "blue"}


def test_a_problem_type_that_is_added_later_is_a_problem() -> None:
    found = refusal(problem(418, "teapot"))
    assert type(found) is errors.Problem
    assert found.slug == "teapot"


def test_names_are_parts_of_paths_whatever_they_are() -> None:
    client, sent = scripted(problem(404, "not-found"))
    with pytest.raises(errors.NotFound):
        client.models.get("../jobs?x=#1")
    assert sent.sent[0].url.raw_path == b"/models/..%2Fjobs%3Fx%3D%231"

"""A build that is killed with SIGKILL in mid-work goes on by itself when the service comes back."""

import signal
from pathlib import Path

import pytest

from app.influence.index import open_index
from tests.api.harness import jsonl, must, rows, until
from tests.operation.process import Start

ROWS = 900


def files(path: Path) -> dict[str, bytes]:
    """What an index is on disk."""
    found = {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    assert "manifest.json" in found
    return found


def test_an_append_that_is_killed_is_finished_with_each_row_once(
    start: Start, tiny_model_dir: Path, tmp_path: Path
) -> None:
    first = start()
    first.api.ready(tiny_model_dir)
    must(first.api.upload(jsonl(rows(ROWS, start=12)), name="more"), 201)
    job_id = must(first.api.post("/indexes/idx/samples", json={"dataset": "more"}), 202)["job"]["id"]
    until(lambda: first.api.job(job_id), lambda job: job["progress"] and job["progress"]["done"] >= 300)
    first.end(signal.SIGKILL)

    second = start()
    job = second.api.wait(job_id)
    assert (job["state"], job["attempts"], job["result"]["rows"]) == ("succeeded", 2, ROWS + 12)
    index = must(second.api.get("/indexes/idx"))
    kept = open_index(tmp_path / "data/indexes" / index["id"]).ids
    assert (len(kept), len(set(kept))) == (ROWS + 12, ROWS + 12)
    given: set[str] = set()
    for name in ("facts", "more"):
        page = must(second.api.get(f"/datasets/{name}/samples", params={"limit": 500}))
        given |= {sample["id"] for sample in page["items"]}
        while page["next_cursor"]:
            params = {"limit": 500, "cursor": page["next_cursor"]}
            page = must(second.api.get(f"/datasets/{name}/samples", params=params))
            given |= {sample["id"] for sample in page["items"]}
    assert set(kept) == given


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_build_goes_on_after_the_process_was_ended(
    start: Start, tiny_model_dir: Path, tmp_path: Path, how: signal.Signals
) -> None:
    first = start()
    first.api.register(tiny_model_dir)
    must(first.api.upload(jsonl(rows(ROWS))), 201)
    job_id, queued = (first.api.build(name)["job"]["id"] for name in ("idx", "later"))
    until(
        lambda: first.api.job(job_id), lambda job: job["progress"] and job["progress"]["done"] >= 300
    )  # a shard is finished
    first.end(how)

    second = start()
    job = second.api.job(job_id)
    assert job["state"] in ("queued", "running"), job
    assert job["progress"]["done"] < ROWS
    job = second.api.wait(job_id)
    assert (job["state"], job["attempts"]) == ("succeeded", 2)
    assert must(second.api.get("/indexes/idx"))["rows"] == ROWS
    ask = {"index": "idx", "prompt": rows(1)[0]["prompt"], "generation": rows(1)[0]["response"], "top_k": 1}
    assert must(second.api.post("/influence", json=ask))["proponents"]
    second.api.wait(queued)
    broken, unbroken = (files(tmp_path / "data/indexes" / second.api.job(job)["index"]) for job in (job_id, queued))
    assert broken == unbroken

"""A valuation as a job: watched, cancelled, taken up again, and what it keeps others from."""

from pathlib import Path
from typing import Any

import pytest

from tests.api.conftest import Serve
from tests.api.harness import Api, jsonl, must, problem, rows, until
from workers.value import Value

ROWS = 400
REQUEST = {"model": "tiny", "candidates": "pool", "validation": "held", "normalize": "unit"}


def ready(api: Api, model_dir: Path) -> None:
    api.register(model_dir)
    must(api.upload(jsonl(rows(ROWS)), "pool"), 201)
    must(api.upload(jsonl(rows(4, start=5000)), "held"), 201)


def submit(api: Api, **more: Any) -> str:
    return str(must(api.post("/valuation", json={**REQUEST, **more}), 202)["job"]["id"])


def blocks(folder: Path) -> int:
    """Finished blocks of labels."""
    return len(list((folder / "work").glob("labels-*.safetensors")))


def test_a_valuation_is_cancelled_between_blocks_and_goes_on(
    serve: Serve, tiny_model_dir: Path, tmp_path: Path
) -> None:
    api = serve()
    ready(api, tiny_model_dir)
    job_id = submit(api)
    folder = tmp_path / "artifacts" / job_id
    until(lambda: blocks(folder), lambda done: done >= 1)
    problem(api.delete("/datasets/pool"), 409, "conflict", "dataset")
    problem(api.delete("/models/tiny"), 409, "conflict", "model")
    must(api.post(f"/jobs/{job_id}/cancel"), 202)
    assert api.wait(job_id)["state"] == "cancelled"
    problem(api.get(f"/valuations/{job_id}/scores"), 409, "conflict", "valuation")
    assert must(api.get(f"/valuations/{job_id}"))["summary"] is None
    kept = blocks(folder)
    assert kept >= 1
    must(api.post(f"/jobs/{job_id}/retry"), 202)
    job = api.wait(job_id)
    assert (job["state"], job["attempts"], job["result"]["rows"]) == ("succeeded", 2, ROWS)
    must(api.delete("/datasets/pool"), 204)
    page = must(api.get(f"/valuations/{job_id}/scores", params={"limit": 2}))
    assert [(one["rank"], one["prompt"]) for one in page["items"]] == [(1, None), (2, None)]
    asked = {"filter": '{"family": "mill"}'}
    problem(api.get(f"/valuations/{job_id}/scores", params=asked), 409, "conflict", "filter")
    select = {"valuation": job_id, "k": 2}
    assert len(must(api.post("/valuation/select", json=select))["rows"]) == 2
    problem(api.post("/valuation/select", json=select | {"diversity": 0.5}), 409, "conflict", "diversity")


def test_progress_counts_rows_and_says_how_fast(serve: Serve, tiny_model_dir: Path) -> None:
    api = serve(progress_interval_s=0)
    ready(api, tiny_model_dir)
    job_id = submit(api)

    def labelling(job: dict[str, Any]) -> bool:
        assert job["state"] in ("queued", "running"), job
        progress = job["progress"] or {}
        return progress.get("stage") == "labels" and progress["rate"] is not None

    progress = until(lambda: api.job(job_id), labelling)["progress"]
    assert (progress["unit"], progress["total"]) == ("rows", ROWS)
    assert 0 < progress["done"] <= ROWS
    assert progress["rate"] > 0
    assert progress["eta_s"] is not None
    must(api.post(f"/jobs/{job_id}/cancel"), 202)
    api.wait(job_id)


def test_scores_that_were_stored_before_a_failure_are_stored_once(
    serve: Serve, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, stored = Value._store, []

    async def breaks(self: Value, job_id: str, group: Any, start: int) -> None:
        await store(self, job_id, group, start)
        stored.append(start)
        if len(stored) == 1:
            raise RuntimeError("the power went")

    monkeypatch.setattr(Value, "_store", breaks)
    api = serve(task_retries=1, sweep_interval_s=0.1)
    ready(api, tiny_model_dir)
    job = api.wait(submit(api, max_length=16))
    assert (job["state"], stored) == ("succeeded", [0, 0])
    page = must(api.get(f"/valuations/{job['id']}/scores", params={"limit": ROWS}))
    assert [one["rank"] for one in page["items"]] == list(range(1, ROWS + 1))

"""A valuation as a job: watched, cancelled, taken up again, and what it keeps others from."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from app.catalog.types import Scope
from tests.api.conftest import Mint, Serve, bearer
from tests.api.harness import Api, jsonl, must, problem, rows, until
from workers.value import Value

ROWS = 400
REQUEST = {"model": "tiny", "candidates": "pool", "validation": "held", "normalize": "unit"}


def ready(api: Api, model_dir: Path, count: int = ROWS) -> None:
    api.register(model_dir)
    must(api.upload(jsonl(rows(count)), "pool"), 201)
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
    problem(api.delete("/datasets/pool"), 409, "conflict", "dataset")
    problem(api.delete("/models/tiny"), 409, "conflict", "model")
    until(lambda: blocks(folder), lambda done: done >= 1)
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


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
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
    ready(api, tiny_model_dir, 60)
    job = api.wait(submit(api))
    assert (job["state"], stored) == ("succeeded", [0, 0])
    page = must(api.get(f"/valuations/{job['id']}/scores", params={"limit": 100}))
    assert [one["rank"] for one in page["items"]] == list(range(1, 61))


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_rows_whose_loss_is_not_finite_have_no_value(serve: Serve, tiny_model_dir: Path) -> None:
    api = serve()
    api.register(tiny_model_dir)
    (loading,) = api.app.state.services.compute._models._values.values()
    model = loading.result()
    letter = model.tokenizer("J", add_special_tokens=False)["input_ids"][0]
    with torch.no_grad():
        model.model.get_input_embeddings().weight[letter] = torch.nan  # a file with such a weight is not loaded
    jam = {"prompt": "Jam?", "response": "No."}
    must(api.upload(jsonl([jam, *rows(3)]), "pool"), 201)
    must(api.upload(jsonl(rows(4, start=5000)), "held"), 201)
    must(api.upload(jsonl([jam | {"prompt": "Jelly?"}]), "broken"), 201)
    job = api.wait(submit(api, budget=100))
    assert (job["state"], job["result"]["rows"], job["result"]["without_value"]) == ("succeeded", 4, 1)
    summary = must(api.get(f"/valuations/{job['id']}"))["summary"]
    assert any("no finite loss" in warning for warning in summary["warnings"])
    page = must(api.get(f"/valuations/{job['id']}/scores"))
    assert [one["rank"] for one in page["items"]] == [1, 2, 3]
    (last,) = [json.loads(line) for line in api.get(f"/jobs/{job['id']}/artifacts/scores.jsonl").text.splitlines()][3:]
    assert (last["rank"], last["value"], last["price"]) == (None, None, 0)
    failed = api.wait(submit(api, validation="broken"))
    assert (failed["state"], failed["error"]["field"]) == ("failed", "validation")


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_an_index_of_the_candidates_gives_the_values(serve: Serve, tiny_model_dir: Path) -> None:
    api = serve()
    ready(api, tiny_model_dir, 60)
    whole = {"projection": {"size": 64}, "max_length": 100}  # no side of a module is wider: nothing is lost
    built = [api.build(kind, dataset="pool", normalisation=kind, **whole) for kind in ("none", "layer")]
    assert [api.wait(one["job"]["id"])["state"] for one in built] == ["succeeded"] * 2
    for way, index in (("none", "none"), ("unit", "none"), ("layer", "layer")):
        jobs = [submit(api, normalize=way, max_length=100), submit(api, normalize=way, index=index)]
        assert [api.wait(job)["state"] for job in jobs] == ["succeeded"] * 2
        pages = [must(api.get(f"/valuations/{job}/scores", params={"limit": 60}))["items"] for job in jobs]
        exact, indexed = ({one["id"]: one["value"] for one in page} for page in pages)
        assert len(exact) == 60
        assert indexed == pytest.approx(exact, rel=0.02, abs=0.002), way
    for field, more in (
        ("normalize", {"index": "layer"}),
        ("max_length", {"index": "none", "max_length": 99}),
        ("index", {"index": "none", "method": "alinfik"}),
    ):
        problem(api.post("/valuation", json={**REQUEST, **more}), 422, "invalid-request", field)
    must(api.upload(jsonl(rows(2, start=700)), "others"), 201)
    lacking = api.wait(submit(api, index="none", candidates="others"))
    assert (lacking["state"], lacking["error"]["field"]) == ("failed", "index")
    api.register(tiny_model_dir, "again")
    problem(
        api.post("/valuation", json={**REQUEST, "index": "none", "model": "again"}), 422, "invalid-request", "index"
    )


def test_valuing_needs_write_and_choosing_needs_query(locked: Api, mint: Mint) -> None:
    keys = {scope: bearer(mint(f"team-{scope.value}", scope)) for scope in (Scope.READ, Scope.QUERY, Scope.WRITE)}
    for path, wanted in (("/valuation", Scope.WRITE), ("/valuation/select", Scope.QUERY)):
        for scope, headers in keys.items():
            answer = locked.post(path, json={}, headers=headers)
            if scope is wanted:
                problem(answer, 422, "invalid-request")
            else:
                problem(answer, 403, "missing-scope", "Authorization")
    assert locked.get("/valuations", headers=keys[Scope.READ]).json()["items"] == []
    problem(locked.get("/valuations"), 401, "unauthorized")

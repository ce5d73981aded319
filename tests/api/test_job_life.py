"""A job over HTTP: watched, cancelled, failed, retried."""

import errno
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.influence import building
from tests.api.harness import Api, jsonl, must, problem, rows
from workers import build_index


def events(api: Api, job_id: str, last: str | None = None) -> list[dict[str, Any]]:
    """Every event of a job's stream until it closes."""
    found: list[dict[str, Any]] = []
    headers = {"Last-Event-ID": last} if last else {}
    with api.stream("GET", f"/jobs/{job_id}/events", headers=headers) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        event: dict[str, Any] = {}
        for line in stream.iter_lines():
            if line:
                name, _, value = line.partition(": ")
                event[name] = json.loads(value) if name == "data" else value
            elif event:
                found.append(event)
                event = {}
    return found


def start(api: Api, model_dir: Path, count: int) -> str:
    api.register(model_dir)
    must(api.upload(jsonl(rows(count))), 201)
    accepted = api.post("/indexes", json={"name": "idx", "model": "tiny", "dataset": "facts"})
    body = must(accepted, 202)
    assert accepted.headers["location"] == f"/jobs/{body['job']['id']}"
    assert body["index"]["state"] == "building"
    return str(body["job"]["id"])


def test_events_follow_a_job_to_its_end(api: Api, tiny_model_dir: Path) -> None:
    seen = events(api, start(api, tiny_model_dir, 200))
    assert [event["event"] for event in seen].count("end") == 1
    assert seen[-1]["event"] == "end"
    assert seen[-1]["data"]["state"] == "succeeded"
    ids = [int(event["id"]) for event in seen]
    assert ids == sorted(set(ids))
    done = [event["data"]["progress"]["done"] for event in seen if event["data"]["progress"]]
    assert done[-1] == 200
    job = seen[-1]["data"]
    assert job["progress"].keys() == {"stage", "done", "total", "unit", "rate", "eta_s", "metrics", "note"}
    assert job["result"]["rows"] == 200


def test_a_client_that_comes_back_is_told_only_what_is_new(api: Api, tiny_model_dir: Path) -> None:
    job_id = start(api, tiny_model_dir, 8)
    version = events(api, job_id)[-1]["id"]
    again = events(api, job_id, last=version)
    assert [event["event"] for event in again] == ["end"]


def test_events_of_an_unknown_job(api: Api) -> None:
    problem(api.get("/jobs/job_nowhere/events"), 404, "not-found", "job")


def test_a_running_job_is_cancelled_between_steps_and_can_go_on(api: Api, tiny_model_dir: Path) -> None:
    job_id = start(api, tiny_model_dir, 600)
    api.wait(job_id, "running")
    must(api.post(f"/jobs/{job_id}/cancel"), 202)
    assert api.wait(job_id)["state"] == "cancelled"
    assert must(api.get("/indexes/idx"))["state"] == "cancelled"
    problem(api.post(f"/jobs/{job_id}/cancel"), 409, "conflict", "job")
    must(api.post(f"/jobs/{job_id}/retry"), 202)
    job = api.wait(job_id)
    assert (job["state"], job["attempts"]) == ("succeeded", 2)
    assert must(api.get("/indexes/idx"))["state"] == "ready"
    problem(api.post(f"/jobs/{job_id}/retry"), 409, "conflict", "job")


def test_a_queued_job_is_cancelled_at_once(api: Api, tiny_model_dir: Path) -> None:
    first = start(api, tiny_model_dir, 1500)
    api.wait(first, "running")
    second = api.build("later")["job"]["id"]
    assert must(api.post(f"/jobs/{second}/cancel"), 202)["state"] == "cancelled"
    assert [job["id"] for job in must(api.get("/jobs", params={"state": "cancelled"}))["items"]] == [second]
    must(api.post(f"/jobs/{first}/cancel"), 202)
    api.wait(first)
    assert api.job(second)["attempts"] == 0
    must(api.post(f"/jobs/{second}/retry"), 202)
    api.wait(second, "running")
    must(api.post(f"/jobs/{second}/cancel"), 202)
    api.wait(second)


def test_a_full_disk_fails_the_job_clearly_and_it_can_be_retried(
    api: Api, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = build_index.compute_shard

    def full(*args: Any, **more: Any) -> Iterator[Any]:
        for step in compute(*args, **more):
            yield step
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(build_index, "compute_shard", full)
    job_id = start(api, tiny_model_dir, 40)
    job = api.wait(job_id)
    assert job["state"] == "failed"
    assert job["error"]["code"] == "DiskFull"
    index = must(api.get("/indexes/idx"))
    assert (index["state"], index["manifest"]) == ("failed", None)
    assert not (tmp_path / "indexes" / index["id"] / "manifest.json").exists()

    monkeypatch.setattr(build_index, "compute_shard", compute)
    must(api.post(f"/jobs/{job_id}/retry"), 202)
    assert api.wait(job_id)["state"] == "succeeded"
    assert must(api.get("/indexes/idx"))["rows"] == 40


class Publishing:
    """Stands before the publication of an index's files and holds it until it may go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.go = threading.Event(), threading.Event()
        publish = building.publish

        def held(*args: Any) -> None:
            self.reached.set()
            assert self.go.wait(30)
            publish(*args)

        monkeypatch.setattr(building, "publish", held)


def test_a_cancel_that_comes_while_a_build_is_published_comes_too_late(
    api: Api, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publishing = Publishing(monkeypatch)
    job_id = start(api, tiny_model_dir, 12)
    assert publishing.reached.wait(30)
    must(api.post(f"/jobs/{job_id}/cancel"), 202)
    publishing.go.set()
    job = api.wait(job_id)
    assert (job["state"], job["cancel_requested"], job["result"]["rows"]) == ("succeeded", True, 12)
    assert must(api.get("/indexes/idx"))["state"] == "ready"


def test_a_cancelled_append_adds_its_rows_or_says_that_it_succeeded(
    api: Api, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.ready(tiny_model_dir)
    must(api.upload(jsonl(rows(400, start=100)), name="more"), 201)
    job_id = must(api.post("/indexes/idx/samples", json={"dataset": "more"}), 202)["job"]["id"]
    api.wait(job_id, "running")
    must(api.post(f"/jobs/{job_id}/cancel"), 202)
    assert api.wait(job_id)["state"] == "cancelled"
    assert must(api.get("/indexes/idx"))["rows"] == 12

    publishing = Publishing(monkeypatch)
    must(api.post(f"/jobs/{job_id}/retry"), 202)
    assert publishing.reached.wait(30)
    must(api.post(f"/jobs/{job_id}/cancel"), 202)
    publishing.go.set()
    assert api.wait(job_id)["state"] == "succeeded"
    assert must(api.get("/indexes/idx"))["rows"] == 412


def test_progress_never_goes_backwards_and_every_stage_has_an_eta(
    serve: Any, tiny_model_dir: Path, tiny_adapter_dir: Path, tmp_path: Path
) -> None:
    api = serve(progress_interval_s=0, events_interval_s=0.001)
    shutil.copytree(tiny_adapter_dir, tmp_path / "adapter")
    checkpoints = [{"name": name, "adapter": str(tmp_path / "adapter")} for name in ("early", "late")]
    api.register(tiny_model_dir, checkpoints=checkpoints)
    must(api.upload(jsonl(rows(60))), 201)
    must(api.upload(jsonl(rows(120, start=60)), name="held"), 201)
    job_id = api.build(heldout="held")["job"]["id"]
    stages: dict[str, list[dict[str, Any]]] = {}
    for event in events(api, job_id):
        if progress := event["data"]["progress"]:
            stages.setdefault(progress["stage"], []).append(progress)
    assert {"gradients", "heldout"} <= stages.keys()
    for seen in stages.values():
        done = [progress["done"] for progress in seen]
        assert done == sorted(done)
        assert all(progress["done"] <= progress["total"] for progress in seen)
    for stage in ("gradients", "heldout"):
        assert any(progress["eta_s"] is not None for progress in stages[stage]), stage
    assert api.job(job_id)["state"] == "succeeded"


def test_a_job_that_breaks_leaks_nothing(api: Api, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_args: Any) -> Iterator[Any]:
        raise RuntimeError("the password is swordfish")
        yield

    monkeypatch.setattr(build_index, "compute_shard", broken)
    job = api.wait(start(api, tiny_model_dir, 4))
    assert (job["state"], job["error"]["code"]) == ("failed", "internal")
    assert "swordfish" not in json.dumps(job)


def test_rows_are_not_changed_while_a_job_works_on_the_index(api: Api, tiny_model_dir: Path) -> None:
    job_id = start(api, tiny_model_dir, 1500)
    problem(api.delete("/indexes/idx"), 409, "conflict", "index")
    must(api.post(f"/jobs/{job_id}/cancel"), 202)
    api.wait(job_id)

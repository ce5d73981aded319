"""At its start the service compares what the catalog says with what is there."""

import asyncio
import os
import shutil
from pathlib import Path
from typing import Any

from app.catalog.database import Database
from app.catalog.tables import Dataset, IndexRow, Job, Model, Task
from app.catalog.tasks import PUBLISH
from app.catalog.types import JobKind, TaskState, new_id
from app.influence.index import delete
from app.jobs.queue import Queue
from app.jobs.service import JobService
from tests.api.harness import must
from workers.reconcile import reconcile


def test_files_that_are_newer_than_the_catalog_are_published(serve: Any, tiny_model_dir: Path, tmp_path: Path) -> None:
    api = serve()
    api.ready(tiny_model_dir)
    row = must(api.get("/datasets/facts/samples"))["items"][0]["id"]
    assert delete(tmp_path / "indexes" / must(api.get("/indexes/idx"))["id"], [row]) == 1  # and then it was killed
    api = serve()
    assert must(api.get("/indexes/idx"))["rows"] == 11


def test_a_disk_that_holds_no_index_at_all_is_the_wrong_one(serve: Any, tiny_model_dir: Path, tmp_path: Path) -> None:
    api = serve()
    api.ready(tiny_model_dir)
    folder = tmp_path / "indexes" / must(api.get("/indexes/idx"))["id"]
    shutil.move(folder, tmp_path / "elsewhere")
    api = serve()
    assert must(api.get("/indexes/idx"))["state"] == "ready", "nothing is marked as long as no index is there"
    shutil.move(tmp_path / "elsewhere", folder)
    ask = {"index": "idx", "prompt": "Who?", "generation": "The mill.", "top_k": 1}
    must(api.post("/influence", json=ask))


def test_artifacts_of_no_job_are_removed_once_they_are_old_enough(
    serve: Any, tiny_model_dir: Path, tmp_path: Path
) -> None:
    serve().ready(tiny_model_dir)
    for name in ("job_gone", "job_submitted_now"):
        (tmp_path / "artifacts" / name).mkdir()
        (tmp_path / "artifacts" / name / "plan.json").write_bytes(b"{}")
    os.utime(tmp_path / "artifacts" / "job_gone", (0, 0))
    mine = must(serve().get("/jobs"))["items"][0]["id"]
    (tmp_path / "artifacts" / mine).mkdir()
    os.utime(tmp_path / "artifacts" / mine, (0, 0))
    serve()
    assert {one.name for one in (tmp_path / "artifacts").iterdir()} == {mine, "job_submitted_now"}


async def test_a_finished_task_without_its_shard_is_done_again(database: Database, tmp_path: Path) -> None:
    facts = Dataset(id=new_id("dst"), name="facts", source="here", columns={}, rows=0, content_hash="0")
    model = Model(id=new_id("mdl"), name="m", spec={}, fingerprint={}, attributed=[], skipped=[], context_length=1)
    index = IndexRow(id=new_id("idx"), name="i", model=model, dataset=facts, dataset_id=facts.id, spec={})
    job = Job(id=new_id("job"), kind=JobKind.BUILD_INDEX, index_id=index.id, params={})
    part = {"number": 0, "start": 0, "rows": 1}
    async with database.catalog() as catalog:
        await catalog.datasets.add(facts, [])
        await catalog.indexes.add(index)
        await catalog.jobs.add(job)
        plan = await catalog.tasks.take(job.id, "one", 60, 0)
        assert plan is not None and await catalog.tasks.complete(plan)
        shard = Task(job_id=job.id, number=1, stage="gradients", params=part, total=1, done=1, state=TaskState.DONE)
        last = Task(job_id=job.id, number=2, stage=PUBLISH, params={}, total=1)
        await catalog.tasks.add([shard, last])
        await catalog.commit()
    async with Queue("memory://") as queue:
        found = await reconcile(database, JobService(database, queue), tmp_path, tmp_path)
        assert found.tasks_without_files == [f"{job.id}:1"]
        assert found.anything
        again = await asyncio.wait_for(reconcile(database, JobService(database, queue), tmp_path, tmp_path), 30)
    assert not again.anything
    async with database.catalog() as catalog:
        states = [task.state for task in await catalog.tasks.of_job(job.id)]
    assert states == [TaskState.DONE, TaskState.QUEUED, TaskState.WAITING]

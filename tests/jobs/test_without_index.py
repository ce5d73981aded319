"""Jobs that work on a model, or only read an index: what they keep others from, and what ends with them."""

from collections.abc import AsyncGenerator, Sequence
from typing import Any

import pytest

from app.catalog.catalog import Catalog
from app.catalog.database import Database
from app.catalog.errors import AlreadyExists, Conflict
from app.catalog.tables import Dataset, IndexRow, Job, Model, Task
from app.catalog.types import IndexState, JobKind, JobState, new_id
from app.jobs.progress import Step
from app.jobs.queue import Queue
from app.jobs.runner import Limits, Moved, Planned, Runner
from app.jobs.service import JobService

pytestmark = pytest.mark.asyncio


def model(name: str) -> Model:
    about: dict[str, Any] = {"spec": {}, "fingerprint": {}, "attributed": [], "skipped": [], "context_length": 1}
    return Model(id=new_id("mdl"), name=name, **about)


async def stored(database: Database) -> tuple[Model, IndexRow]:
    """A model and a ready index."""
    base = model("base")
    facts = Dataset(id=new_id("dst"), name="facts", source="here", columns={}, rows=0, content_hash="0")
    index = IndexRow(
        id=new_id("idx"), name="idx", model=base, dataset=facts, dataset_id=facts.id, spec={}, state=IndexState.READY
    )
    async with database.catalog() as catalog:
        await catalog.models.add(base)
        await catalog.datasets.add(facts, [])
        await catalog.indexes.add(index)
        await catalog.commit()
    return base, index


async def submit(database: Database, kind: JobKind = JobKind.UNLEARN, **more: Any) -> Job:
    job = Job(id=new_id("job"), kind=kind, **({"params": {}} | more))
    async with database.catalog() as catalog:
        await catalog.jobs.add(job)
        await catalog.commit()
    return job


def service(database: Database) -> JobService:
    return JobService(database, Queue("memory://"))


async def test_a_job_without_an_index_is_cancelled_and_runs_again(database: Database) -> None:
    job, jobs = await submit(database), service(database)
    assert (await jobs.cancel(job.id)).state is JobState.CANCELLED
    assert (await jobs.retry(job.id)).state is JobState.QUEUED
    assert (await jobs.sweep()).jobs == 1


async def test_any_number_of_jobs_read_an_index_that_nobody_may_change_meanwhile(database: Database) -> None:
    _, index = await stored(database)
    readers = [await submit(database, index_id=index.id) for _ in range(2)]
    async with database.catalog() as catalog:
        with pytest.raises(Conflict, match="is working on index"):
            await catalog.indexes.require_idle(index.id)
    for reader in readers:
        assert (await service(database).cancel(reader.id)).state is JobState.CANCELLED
    async with database.catalog() as catalog:
        await catalog.indexes.require_idle(index.id)
        assert (await catalog.indexes.get("idx")).state is IndexState.READY
    writers = [await submit(database, JobKind.APPEND_SAMPLES, index_id=index.id)]
    with pytest.raises(Exception, match=r"(?i)unique"):
        writers.append(await submit(database, JobKind.REPAIR_INDEX, index_id=index.id))


async def test_a_model_stays_as_long_as_a_job_works_on_it(database: Database) -> None:
    base = model("alone")
    async with database.catalog() as catalog:
        await catalog.models.add(base)
        await catalog.commit()
    job = await submit(database, model_id=base.id, params={"model": base.id})
    async with database.catalog() as catalog:
        with pytest.raises(Conflict, match=f"job {job.id} works on model 'alone'"):
            await catalog.models.remove(base)
    await service(database).cancel(job.id)
    async with database.catalog() as catalog:
        await catalog.models.remove(base)
        await catalog.commit()
    with pytest.raises(Conflict, match=r"the model of job .* is gone"):
        await service(database).retry(job.id)


async def test_a_job_whose_index_is_gone_is_not_tried_again(database: Database) -> None:
    _, index = await stored(database)
    jobs = [
        await submit(database, index_id=index.id, params={"index": index.id}),
        await submit(database, JobKind.REPAIR_INDEX, index_id=index.id),
    ]
    for job in jobs:
        await service(database).cancel(job.id)
    async with database.catalog() as catalog:
        await catalog.indexes.remove(index)
        await catalog.commit()
    for job in jobs:
        with pytest.raises(Conflict, match=r"the index of job .* is gone"):
            await service(database).retry(job.id)


async def test_a_name_that_a_job_will_give_its_model_is_taken(database: Database) -> None:
    job = await submit(database, makes_model="clean")
    async with database.catalog() as catalog:
        for name, taken in (("clean", True), ("other", False)):
            if taken:
                with pytest.raises(AlreadyExists, match=f"job {job.id} will register"):
                    await catalog.models.add(model(name))
            else:
                await catalog.models.add(model(name))
        await catalog.models.add(model("clean"), made_by=job.id)
        await catalog.commit()
    await service(database).cancel(job.id)
    with pytest.raises(AlreadyExists, match="exists already"):
        await service(database).retry(job.id)


async def test_two_unfinished_jobs_never_make_a_model_of_the_same_name(database: Database) -> None:
    await submit(database, makes_model="clean")
    with pytest.raises(Exception, match=r"(?i)unique"):
        await submit(database, makes_model="clean")


class Measuring:
    """A body of one task that goes through stages of its own and measures something in one of them."""

    async def plan(self, job: Job) -> Sequence[Planned]:
        return [Planned("measuring", 3)]

    async def steps(self, job: Job, task: Task) -> AsyncGenerator[Step]:
        yield Step(1, 1, stage="before", unit="rows")
        for number, loss in enumerate((2.0, 1.5), start=1):
            yield Step(number, 2, stage="training", unit="steps", metrics={"forget": loss}, note=f"step {number}")

    async def publish(self, job: Job, tasks: Sequence[Task], moved: Moved) -> Sequence[int]:
        return ()

    async def ended(self, catalog: Catalog, job: Job, state: JobState, failure: Exception | None) -> dict[str, Any]:
        return {}


async def test_a_task_tells_of_its_stages_and_what_it_measured(database: Database) -> None:
    job, seen = await submit(database), []
    runner = Runner(
        database,
        {JobKind.UNLEARN: Measuring()},
        service(database),
        Limits(progress_interval_s=0),
        worker="one",
        watch=lambda _, progress: seen.append(progress),
    )
    while not job.state.ended:
        await runner.run()
        async with database.catalog() as catalog:
            job = await catalog.jobs.get(job.id)
    told = [(one.stage, one.done, one.total, one.unit, dict(one.metrics), one.note) for one in seen]
    assert ("before", 1, 1, "rows", {}, None) in told
    assert told.index(("training", 1, 2, "steps", {"forget": 2.0}, "step 1")) < told.index(
        ("training", 2, 2, "steps", {"forget": 1.5}, "step 2")
    )
    assert (job.progress["metrics"], job.progress["note"]) == ({"forget": 1.5}, None), "a note belongs to its stage"

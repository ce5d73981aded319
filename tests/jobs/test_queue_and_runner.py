"""The queue runs a key once, and the runner writes every end: success, failure, cancel, a process that stops."""

import asyncio
import errno
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from app.catalog.catalog import Catalog
from app.catalog.database import Database
from app.catalog.tables import Job
from app.catalog.types import JobKind, JobState, new_id
from app.jobs.compute import Pool
from app.jobs.progress import Step
from app.jobs.queue import Queue
from app.jobs.runner import Runner
from app.jobs.service import JobService
from tests.conftest import Backend

pytestmark = pytest.mark.asyncio


class Counting:
    """A body of five steps that can be told to go wrong."""

    def __init__(self) -> None:
        self.steps_done = 0
        self.ends: list[JobState] = []
        self.failure: Exception | None = None
        self.go = asyncio.Event()
        self.go.set()
        self.at_step = asyncio.Event()

    async def steps(self, job: Job) -> AsyncGenerator[Step]:
        for number in range(1, 6):
            self.at_step.set()
            await self.go.wait()
            if self.failure is not None:
                raise self.failure
            self.steps_done += 1
            yield Step("counting", number, 5, final=number == 5)

    async def ended(self, catalog: Catalog, job: Job, state: JobState, failure: Exception | None) -> dict[str, Any]:
        assert (failure is None) == (state is not JobState.FAILED)
        self.ends.append(state)
        return {"steps": self.steps_done}


@pytest_asyncio.fixture
async def queue(backend: Backend) -> AsyncIterator[Queue]:
    async with Queue(backend.queue_url) as queue:
        yield queue


async def submit(database: Database) -> str:
    job = Job(id=new_id("job"), kind=JobKind.BUILD_INDEX, params={})
    async with database.catalog() as catalog:
        await catalog.jobs.add(job)
        await catalog.commit()
    return job.id


async def look(database: Database, job_id: str) -> Job:
    async with database.catalog() as catalog:
        return await catalog.jobs.get(job_id)


async def ended(database: Database, job_id: str) -> Job:
    async with asyncio.timeout(20):
        while not (job := await look(database, job_id)).state.ended:
            await asyncio.sleep(0.01)
        return job


def runner_of(database: Database, body: Counting) -> Runner:
    return Runner(database, {JobKind.BUILD_INDEX: body}, progress_interval_s=0)


async def test_a_job_enqueued_twice_runs_once(database: Database, queue: Queue) -> None:
    body, job_id = Counting(), await submit(database)
    await queue.enqueue(job_id)
    await queue.enqueue(job_id)
    async with queue.worker(runner_of(database, body).run):
        job = await ended(database, job_id)
        await asyncio.sleep(0.3)
    assert (job.state, job.attempts, body.steps_done) == (JobState.SUCCEEDED, 1, 5)
    assert job.result == {"steps": 5}
    assert job.progress["done"] == 5


async def test_what_was_queued_or_running_at_a_crash_is_taken_up_again(database: Database, queue: Queue) -> None:
    body, queued, running = Counting(), await submit(database), await submit(database)
    async with database.catalog() as catalog:
        await catalog.jobs.start(running)
        await catalog.commit()
    service = JobService(database, queue)
    async with queue.worker(runner_of(database, body).run):
        assert await service.recover() == 2
        assert (await ended(database, queued)).attempts == 1
        assert (await ended(database, running)).attempts == 2


async def test_a_failed_job_can_be_enqueued_again_under_its_key(database: Database, queue: Queue) -> None:
    body, job_id = Counting(), await submit(database)
    body.failure = OSError(errno.ENOSPC, "No space left on device")
    async with queue.worker(runner_of(database, body).run):
        await queue.enqueue(job_id)
        job = await ended(database, job_id)
        assert (job.state, job.error["code"]) == (JobState.FAILED, "DiskFull")
        body.failure = None
        async with database.catalog() as catalog:
            assert await catalog.jobs.retry(job_id)
            await catalog.commit()
        await queue.enqueue(job_id)
        assert (await ended(database, job_id)).state is JobState.SUCCEEDED
    assert body.ends == [JobState.FAILED, JobState.SUCCEEDED]


async def test_a_cancel_takes_effect_after_the_step(database: Database) -> None:
    body, job_id = Counting(), await submit(database)
    body.go.clear()
    running = asyncio.create_task(runner_of(database, body).run(job_id))
    await body.at_step.wait()
    async with database.catalog() as catalog:
        assert await catalog.jobs.request_cancel(job_id)
        await catalog.commit()
    body.go.set()
    await running
    assert (await look(database, job_id)).state is JobState.CANCELLED
    assert (body.steps_done, body.ends) == (1, [JobState.CANCELLED])


async def test_a_cancel_after_the_last_step_comes_too_late(database: Database) -> None:
    body, job_id = Counting(), await submit(database)
    steps = body.steps

    async def cancelled_late(job: Job) -> AsyncGenerator[Step]:
        async for step in steps(job):
            if step.final:
                async with database.catalog() as catalog:
                    assert await catalog.jobs.request_cancel(job_id)
                    await catalog.commit()
            yield step

    body.steps = cancelled_late  # type: ignore[method-assign]
    await runner_of(database, body).run(job_id)
    assert (await look(database, job_id)).state is JobState.SUCCEEDED
    assert body.ends == [JobState.SUCCEEDED]


async def test_a_process_that_stops_puts_its_job_back(database: Database) -> None:
    body, job_id = Counting(), await submit(database)
    body.go.clear()
    runner = runner_of(database, body)
    running = asyncio.create_task(runner.run(job_id))
    await body.at_step.wait()
    runner.stop()
    body.go.set()
    await running
    assert (await look(database, job_id)).state is JobState.QUEUED
    assert body.ends == []
    await runner_of(database, body).run(job_id)
    assert (await look(database, job_id)).attempts == 2


async def test_a_failed_publication_fails_the_job(database: Database) -> None:
    body, job_id = Counting(), await submit(database)
    ends: list[JobState] = []

    async def broken(catalog: Catalog, job: Job, state: JobState, failure: Exception | None) -> dict[str, Any]:
        ends.append(state)
        if state is JobState.SUCCEEDED:
            raise RuntimeError("the files are gone")
        return {}

    body.ended = broken  # type: ignore[method-assign]
    await runner_of(database, body).run(job_id)
    assert ends == [JobState.SUCCEEDED, JobState.FAILED]
    assert (await look(database, job_id)).state is JobState.FAILED


async def test_a_queue_that_is_away_loses_nothing(database: Database) -> None:
    job_id = await submit(database)
    await JobService(database, Queue("memory://")).enqueue(job_id)  # never opened
    assert (await look(database, job_id)).state is JobState.QUEUED


async def test_the_pool_makes_a_value_once_and_keeps_the_latest() -> None:
    made: list[int] = []

    async def make(key: int) -> int:
        made.append(key)
        await asyncio.sleep(0)
        return key

    pool: Pool[int, int] = Pool(2)
    await asyncio.gather(*(pool.get(1, lambda: make(1)) for _ in range(3)))
    for key in (2, 3, 2, 1):
        await pool.get(key, lambda key=key: make(key))
    assert made == [1, 2, 3, 1]


async def test_the_pool_does_not_keep_a_failure() -> None:
    async def fail() -> int:
        raise OSError("not now")

    async def work() -> int:
        return 7

    pool: Pool[int, int] = Pool(2)
    with pytest.raises(OSError, match="not now"):
        await pool.get(1, fail)
    assert await pool.get(1, work) == 7

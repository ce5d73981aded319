"""Workers share a job's tasks, and the runner writes every end: success, failure, cancel, a process that stops."""

import asyncio
import errno
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

import pytest
import pytest_asyncio
from sqlalchemy import update

from app.catalog.catalog import Catalog
from app.catalog.database import Database
from app.catalog.tables import Job, Task
from app.catalog.types import JobKind, JobState, new_id
from app.jobs.compute import Pool
from app.jobs.progress import Step
from app.jobs.queue import Queue
from app.jobs.runner import Limits, Moved, Planned, Runner
from app.jobs.service import JobService
from tests.conftest import Backend

pytestmark = pytest.mark.asyncio
PARTS, STEPS = 3, 5


class Counting:
    """A body of three parts of five steps that can be told to go wrong."""

    def __init__(self) -> None:
        self.steps_done = 0
        self.parts_done: list[int] = []
        self.published = 0
        self.missing: list[int] = []
        self.ends: list[JobState] = []
        self.failure: Exception | None = None
        self.go = asyncio.Event()
        self.go.set()
        self.at_step = asyncio.Event()

    async def plan(self, job: Job) -> Sequence[Planned]:
        return [Planned("counting", STEPS, {"part": part}) for part in range(PARTS)]

    async def steps(self, job: Job, task: Task) -> AsyncGenerator[Step]:
        for number in range(1, STEPS + 1):
            self.at_step.set()
            await self.go.wait()
            if self.failure is not None:
                raise self.failure
            self.steps_done += 1
            yield Step(number, STEPS)
        self.parts_done.append(task.params["part"])

    async def publish(self, job: Job, tasks: Sequence[Task], moved: Moved) -> Sequence[int]:
        again, self.missing = self.missing, []
        self.published += not again
        return again

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


def runner_of(database: Database, body: Counting, queue: Queue | None = None, **limits: Any) -> Runner:
    """A worker; without a queue nobody is told of the next task, so that each `run` is one."""
    jobs = JobService(database, queue or Queue("memory://"))
    limits = {"progress_interval_s": 0, "task_retries": 0} | limits
    return Runner(database, {JobKind.BUILD_INDEX: body}, jobs, Limits(**limits), worker=new_id("worker"))


async def finish(runner: Runner, database: Database, job_id: str) -> Job:
    """Do task after task until the job has ended."""
    async with asyncio.timeout(20):
        while not (job := await look(database, job_id)).state.ended:
            await runner.run()
        return job


async def test_a_job_announced_twice_runs_once(database: Database, queue: Queue) -> None:
    body, job_id = Counting(), await submit(database)
    jobs = JobService(database, queue)
    await jobs.announce(job_id)
    await jobs.announce(job_id)
    async with queue.worker(runner_of(database, body, queue).run):
        job = await ended(database, job_id)
        await asyncio.sleep(0.3)
    assert (job.state, job.attempts, body.steps_done) == (JobState.SUCCEEDED, 1, PARTS * STEPS)
    assert job.result == {"steps": PARTS * STEPS}
    assert (job.progress["stage"], job.progress["done"]) == ("publish", PARTS * STEPS)


async def test_workers_share_the_parts_and_one_publishes(database: Database) -> None:
    body, job_id = Counting(), await submit(database)
    runners = [runner_of(database, body) for _ in range(4)]
    jobs = await asyncio.gather(*(finish(runner, database, job_id) for runner in runners))
    assert {job.state for job in jobs} == {JobState.SUCCEEDED}
    assert sorted(body.parts_done) == list(range(PARTS))
    assert (body.published, body.ends) == (1, [JobState.SUCCEEDED])


async def test_no_more_tasks_of_a_job_run_at_once_than_are_allowed(database: Database) -> None:
    body, job_id = Counting(), await submit(database)
    await runner_of(database, body).run()  # the plan
    body.go.clear()
    running = [asyncio.create_task(runner_of(database, body, job_concurrency=2).run()) for _ in range(PARTS)]
    done, _ = await asyncio.wait(running, timeout=30, return_when=asyncio.FIRST_COMPLETED)
    assert len(done) == 1, "the third found nothing that it might take"
    body.go.set()
    await asyncio.gather(*running)
    assert sorted(body.parts_done) == [0, 1]
    assert (await finish(runner_of(database, body), database, job_id)).state is JobState.SUCCEEDED


async def test_the_oldest_job_comes_first(database: Database) -> None:
    body = Counting()
    first, second = await submit(database), await submit(database)
    runner = runner_of(database, body)
    for _ in range(PARTS + 2):
        await runner.run()
    assert (await look(database, first)).state is JobState.SUCCEEDED
    assert (await look(database, second)).attempts == 0


async def test_what_was_queued_or_running_at_a_crash_is_taken_up_again(database: Database, queue: Queue) -> None:
    body, queued, running = Counting(), await submit(database), await submit(database)
    async with database.catalog() as catalog:
        await catalog.tasks.take(running, "dead", -1, 0)
        await catalog.jobs.start(running, again=True)
        await catalog.commit()
    async with queue.worker(runner_of(database, body, queue).run):
        assert (await JobService(database, queue).recover()).jobs == 2
        assert (await ended(database, queued)).attempts == 1
        assert (await ended(database, running)).attempts == 2


async def test_a_worker_that_is_lost_loses_its_task_and_changes_nothing_more(database: Database) -> None:
    body, job_id = Counting(), await submit(database)
    await runner_of(database, body).run()
    body.go.clear()
    frozen = asyncio.create_task(runner_of(database, body, task_timeout_s=0).run())
    await body.at_step.wait()
    async with database.catalog() as catalog:  # the lease ran out
        await catalog._session.execute(update(Task).where(Task.worker.is_not(None)).values(lease_until=0.0))
        await catalog.commit()
    swept = await JobService(database, Queue("memory://")).sweep()
    assert (swept.lost_tasks, swept.failed_jobs) == (1, 0)
    body.go.set()
    await frozen
    assert body.parts_done == []
    assert (await finish(runner_of(database, body), database, job_id)).attempts == 2
    assert sorted(body.parts_done) == list(range(PARTS))


async def test_a_task_that_kills_every_worker_fails_its_job(database: Database) -> None:
    job_id = await submit(database)
    jobs = JobService(database, Queue("memory://"), task_retries=1)
    for lost in (0, 1):
        async with database.catalog() as catalog:
            assert await catalog.tasks.take(job_id, "dead", -1, 0)
            await catalog.jobs.start(job_id, again=True)
            await catalog.commit()
        assert (await jobs.sweep()).failed_jobs == lost
    job = await look(database, job_id)
    assert (job.state, job.error["code"]) == (JobState.FAILED, "WorkerLost")


async def test_an_unexpected_error_is_tried_again_as_often_as_is_set(database: Database) -> None:
    body, job_id = Counting(), await submit(database)
    body.failure = RuntimeError("a hiccup")
    runner = runner_of(database, body, task_retries=2)
    await runner.run()
    await runner.run()
    assert (await look(database, job_id)).state is JobState.QUEUED
    body.failure = None
    assert (await finish(runner, database, job_id)).state is JobState.SUCCEEDED
    body.failure = RuntimeError("always")
    job = await finish(runner, database, await submit(database))
    assert (job.state, job.attempts, job.error["code"]) == (JobState.FAILED, 3, "internal")


async def test_what_is_not_there_at_the_end_is_done_again(database: Database) -> None:
    body, job_id = Counting(), await submit(database)
    body.missing = [2]
    job = await finish(runner_of(database, body, task_retries=1), database, job_id)
    assert job.state is JobState.SUCCEEDED
    assert sorted(body.parts_done) == [0, 1, 1, 2]
    assert body.published == 1


async def test_a_failed_job_can_be_announced_again(database: Database, queue: Queue) -> None:
    body, job_id = Counting(), await submit(database)
    body.failure = OSError(errno.ENOSPC, "No space left on device")
    jobs = JobService(database, queue)
    async with queue.worker(runner_of(database, body, queue).run):
        await jobs.announce(job_id)
        job = await ended(database, job_id)
        assert (job.state, job.error["code"]) == (JobState.FAILED, "DiskFull")
        body.failure = None
        async with database.catalog() as catalog:
            assert await catalog.jobs.retry(job_id)
            await catalog.tasks.begin(job_id)
            await catalog.commit()
        await jobs.announce(job_id)
        assert (await ended(database, job_id)).state is JobState.SUCCEEDED
    assert body.ends == [JobState.FAILED, JobState.SUCCEEDED]


async def test_a_cancel_reaches_every_worker_after_its_step(database: Database) -> None:
    body, job_id = Counting(), await submit(database)
    await runner_of(database, body).run()
    body.go.clear()
    running = [asyncio.create_task(runner_of(database, body).run()) for _ in range(2)]
    await body.at_step.wait()
    await asyncio.sleep(0.2)
    assert (await JobService(database, Queue("memory://")).cancel(job_id)).state is JobState.RUNNING
    body.go.set()
    await asyncio.gather(*running)
    assert (await look(database, job_id)).state is JobState.CANCELLED
    assert (body.steps_done, body.ends) == (2, [JobState.CANCELLED])


async def test_a_cancel_during_the_publication_comes_too_late(database: Database) -> None:
    body, job_id = Counting(), await submit(database)
    publish = body.publish

    async def cancelled_late(job: Job, tasks: Sequence[Task], moved: Moved) -> Sequence[int]:
        assert (await JobService(database, Queue("memory://")).cancel(job_id)).cancel_requested
        return await publish(job, tasks, moved)

    body.publish = cancelled_late  # type: ignore[method-assign]
    assert (await finish(runner_of(database, body), database, job_id)).state is JobState.SUCCEEDED
    assert body.ends == [JobState.SUCCEEDED]


async def test_a_cancel_between_the_steps_of_a_publication_is_heard(database: Database) -> None:
    body, job_id = Counting(), await submit(database)

    async def stepwise(job: Job, tasks: Sequence[Task], moved: Moved) -> Sequence[int]:
        await moved(Step(1, 40, stage="curvature"))
        assert (await look(database, job_id)).progress["stage"] == "curvature"
        if cancel:
            await JobService(database, Queue("memory://")).cancel(job_id)
        await moved(Step(2, 40, stage="curvature"))
        return ()

    cancel = True
    body.publish = stepwise  # type: ignore[method-assign]
    job = await finish(runner_of(database, body), database, job_id)
    assert (job.state, body.ends) == (JobState.CANCELLED, [JobState.CANCELLED])
    cancel, job_id = False, await submit(database)
    job = await finish(runner_of(database, body), database, job_id)
    assert (job.state, job.progress["stage"]) == (JobState.SUCCEEDED, "publish")
    assert job.progress["done"] == job.progress["total"] == PARTS * STEPS


async def test_a_process_that_stops_hands_its_task_back(database: Database) -> None:
    body, job_id = Counting(), await submit(database)
    runner = runner_of(database, body)
    await runner.run()
    body.go.clear()
    running = asyncio.create_task(runner.run())
    await body.at_step.wait()
    runner.stop()
    body.go.set()
    await running
    assert (await look(database, job_id)).state is JobState.QUEUED
    assert (body.steps_done, body.ends) == (1, [])
    assert (await finish(runner_of(database, body), database, job_id)).attempts == 2


async def test_a_failed_publication_fails_the_job(database: Database) -> None:
    body, job_id = Counting(), await submit(database)
    ends: list[JobState] = []

    async def broken(catalog: Catalog, job: Job, state: JobState, failure: Exception | None) -> dict[str, Any]:
        ends.append(state)
        if state is JobState.SUCCEEDED:
            raise RuntimeError("the files are gone")
        return {}

    body.ended = broken  # type: ignore[method-assign]
    assert (await finish(runner_of(database, body), database, job_id)).state is JobState.FAILED
    assert ends == [JobState.SUCCEEDED, JobState.FAILED]


async def test_progress_adds_up_over_workers(database: Database) -> None:
    body, job_id = Counting(), await submit(database)
    runner = runner_of(database, body)
    await runner.run()
    await runner.run()
    progress = (await look(database, job_id)).progress
    assert (progress["stage"], progress["done"], progress["total"]) == ("counting", STEPS, PARTS * STEPS)
    await runner_of(database, body).run()
    assert (await look(database, job_id)).progress["done"] == 2 * STEPS


async def test_a_queue_that_is_away_loses_nothing(database: Database, queue: Queue) -> None:
    body, job_id = Counting(), await submit(database)
    assert not await JobService(database, Queue("memory://")).announce(job_id)  # never opened
    assert (await look(database, job_id)).state is JobState.QUEUED
    async with queue.worker(runner_of(database, body, queue).run), JobService(database, queue).sweeping(0.05):
        assert (await ended(database, job_id)).state is JobState.SUCCEEDED


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

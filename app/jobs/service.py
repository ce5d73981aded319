"""Submitting, cancelling, retrying and sweeping: what is done to jobs from outside.

A task is announced only after its row is committed, so that no worker can be called before there is something to
take. Whatever is lost on the way (a queue that is away, a worker that died) the sweep finds in the catalog.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import structlog

from app.catalog.catalog import Catalog
from app.catalog.database import Database
from app.catalog.errors import Conflict
from app.catalog.tables import Job
from app.catalog.tasks import Lost
from app.catalog.types import JobState
from app.jobs.background import background
from app.jobs.queue import Queue

log = structlog.get_logger(__name__)
FIRST = (0, 0)  # the number of a new job's task, and how often it was taken
WINDOW = 64  # tasks of a job that are announced at a time
MOST_JOBS = 256  # jobs that a sweep announces again, oldest first; the others have their turn later


@dataclass(frozen=True)
class Swept:
    """What a sweep found."""

    jobs: int  # unfinished, announced again
    lost_tasks: int  # taken from workers that were not heard of
    failed_jobs: int  # as a task of theirs was lost too often


@asynccontextmanager
async def repeating(work: Callable[[], Awaitable[object]], interval_s: float) -> AsyncIterator[None]:
    """Do something again and again, for as long as the context lasts; what goes wrong is logged, and tried again."""

    async def forever() -> None:
        while True:
            await asyncio.sleep(interval_s)
            try:
                await work()
            except Exception as error:
                log.warning("housekeeping did not get through", error=repr(error))

    async with background(forever(), "housekeeping"):
        yield


class JobService:
    """Moves jobs between the table and the queue."""

    def __init__(self, database: Database, queue: Queue, *, task_retries: int = 3) -> None:
        self._database = database
        self._queue = queue
        self._task_retries = task_retries

    async def announce(self, job_id: str, *, new: bool = False) -> bool:
        """Tell the workers of a job's queued tasks; False when that must wait for the next sweep.

        `new`: the job was stored a moment ago, so that nobody need look which tasks those are.
        """
        try:
            tasks: Sequence[tuple[int, int]] = [FIRST]
            if not new:
                async with self._database.catalog() as catalog:
                    tasks = await catalog.tasks.queued(job_id, WINDOW)
            if tasks:
                await self._queue.announce(job_id, tasks)
        except Exception as error:
            log.warning("the queue did not take a job; it stays in the catalog", job_id=job_id, error=repr(error))
            return False
        return True

    async def recover(self) -> Swept:
        """The first sweep of a process: what only it could hold, it held before it died."""
        if self._queue.in_process:
            async with self._database.catalog() as catalog:
                await catalog.tasks.release_all()
                await catalog.commit()
        return await self.sweep()

    async def sweep(self) -> Swept:
        """Take tasks back from workers that are gone, and announce what is queued: the queue may have forgotten it."""
        async with self._database.catalog() as catalog:
            for job_id in await catalog.jobs.without_tasks():
                await catalog.tasks.begin(job_id)
            lost = await catalog.tasks.expire()
            await catalog.commit()
        failed = {one.job_id for one in lost if one.failures > self._task_retries and await self._give_up(one)}
        for one in lost:
            log.warning("a task was lost", job_id=one.job_id, task=one.number, worker=one.worker, times=one.failures)
        async with self._database.catalog() as catalog:
            unfinished = await catalog.tasks.waiting_jobs(MOST_JOBS)
        for job_id in unfinished:
            if not await self.announce(job_id):
                break
        return Swept(len(unfinished), len(lost), len(failed))

    @asynccontextmanager
    async def sweeping(self, interval_s: float) -> AsyncIterator[None]:
        """Sweep again and again for as long as the context lasts."""
        async with repeating(self.sweep, interval_s):
            yield

    async def cancel(self, job_id: str) -> Job:
        """Cancel a job at once if no worker is at it, else after the step that each of its workers is in."""
        async with self._database.catalog() as catalog:
            job = await catalog.jobs.get(job_id)
            if await catalog.jobs.cancel_idle(job_id):
                await catalog.indexes.job_ended(job, JobState.CANCELLED)
            elif not await catalog.jobs.request_cancel(job_id):
                raise Conflict(f"job {job_id} has ended already: it is {job.state}", field="job")
            await catalog.commit()
            return await catalog.jobs.get(job_id)

    async def retry(self, job_id: str) -> Job:
        """Queue a failed or cancelled job once more; it goes on from what it finished."""
        async with self._database.catalog() as catalog:
            job = await catalog.jobs.get(job_id)
            for what, there in (("index", job.index_id), ("model", job.model_id)):
                if there is None and (what in job.params or (what == "index" and job.kind.writes_index)):
                    raise Conflict(f"the {what} of job {job_id} is gone", field="job")
            if job.index_id is not None and job.kind.writes_index:
                await catalog.indexes.require_idle(job.index_id)
            if job.makes_model is not None:
                await catalog.models.require_free(job.makes_model, "job", but=job.id)
            if not await catalog.jobs.retry(job_id):
                raise Conflict(
                    f"job {job_id} is {job.state}: only a failed or cancelled one can run again", field="job"
                )
            await catalog.tasks.begin(job_id)
            await catalog.indexes.job_submitted(job)
            await catalog.commit()
            job = await catalog.jobs.get(job_id)
        await self.announce(job_id)
        return job

    async def _give_up(self, lost: Lost) -> bool:
        detail = f"its task {lost.number} was lost {lost.failures} times, the last time with worker {lost.worker}"

        async def work(catalog: Catalog) -> bool:
            error = {"code": "WorkerLost", "detail": f"{detail}: see that worker's log, then retry the job"}
            if not await catalog.jobs.give_up(lost.job_id, error):
                return False
            await catalog.indexes.job_ended(await catalog.jobs.get(lost.job_id), JobState.FAILED)
            return True

        return await self._database.patiently(work)

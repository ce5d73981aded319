"""Submitting, cancelling and retrying: what the API does to jobs.

A job is enqueued only after its row is committed, so that no worker can find the id before the row. If the queue is
away at that moment the row stays `queued` and the next start hands it over.
"""

import structlog

from app.catalog.database import Database
from app.catalog.errors import Conflict
from app.catalog.tables import Job
from app.catalog.types import JobState
from app.jobs.queue import Queue

log = structlog.get_logger(__name__)


class JobService:
    """Moves jobs between the table and the queue."""

    def __init__(self, database: Database, queue: Queue) -> None:
        self._database = database
        self._queue = queue

    async def enqueue(self, job_id: str) -> None:
        """Hand over a committed job."""
        try:
            await self._queue.enqueue(job_id)
        except Exception:
            log.exception("the queue did not take a job; it stays queued in the catalog", job_id=job_id)

    async def recover(self) -> int:
        """Hand over every unfinished job again; gives their number."""
        async with self._database.catalog() as catalog:
            unfinished = await catalog.jobs.unfinished()
        for job_id in unfinished:
            await self.enqueue(job_id)
        return len(unfinished)

    async def cancel(self, job_id: str) -> Job:
        """Cancel a queued job at once, a running one after its step."""
        async with self._database.catalog() as catalog:
            job = await catalog.jobs.get(job_id)
            if await catalog.jobs.cancel_queued(job_id):
                await catalog.indexes.job_ended(job, JobState.CANCELLED)
                await catalog.commit()
                await self._queue.cancel(job_id)
            elif await catalog.jobs.request_cancel(job_id):
                await catalog.commit()
            else:
                raise Conflict(f"job {job_id} has ended already: it is {job.state}", field="job")
            return await catalog.jobs.get(job_id)

    async def retry(self, job_id: str) -> Job:
        """Queue a failed or cancelled job once more; it goes on from the shards that it finished."""
        async with self._database.catalog() as catalog:
            job = await catalog.jobs.get(job_id)
            if job.index_id is None:
                raise Conflict(f"the index of job {job_id} is gone", field="job")
            await catalog.indexes.require_idle(job.index_id)
            if not await catalog.jobs.retry(job_id):
                raise Conflict(
                    f"job {job_id} is {job.state}: only a failed or cancelled one can run again", field="job"
                )
            await catalog.indexes.job_submitted(job)
            await catalog.commit()
            job = await catalog.jobs.get(job_id)
        await self.enqueue(job_id)
        return job

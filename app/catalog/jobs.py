"""The repository of jobs: each change of a state is one conditional UPDATE, so that two writers cannot both win."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.catalog.errors import NotFound
from app.catalog.pages import Page, newest_first
from app.catalog.tables import Job
from app.catalog.types import JobKind, JobState, now


class Jobs:
    """Jobs and the moves between their states."""

    def __init__(self, session: AsyncSession) -> None:
        self._session = session

    async def get(self, job_id: str) -> Job:
        """The job with that id, as it is in the database now."""
        job = await self._session.get(Job, job_id, populate_existing=True)
        if job is None:
            raise NotFound(f"there is no job {job_id!r}", field="job")
        return job

    async def add(self, job: Job) -> None:
        """Store a new job."""
        self._session.add(job)
        await self._session.flush()

    async def page(self, limit: int, cursor: str | None, state: JobState | None) -> Page[Job]:
        """Jobs, newest first."""
        where = [] if state is None else [Job.state == state]
        return await newest_first(self._session, Job, *where, limit=limit, cursor=cursor)

    async def unfinished(self) -> Sequence[str]:
        """Ids of every queued or running job, oldest first: what a start-up hands to the queue again."""
        query = select(Job.id).where(Job.state.in_((JobState.QUEUED, JobState.RUNNING))).order_by(Job.id)
        return (await self._session.scalars(query)).all()

    async def counts(self) -> dict[tuple[JobKind, JobState], int]:
        """How many jobs there are of each kind in each state."""
        rows = await self._session.execute(select(Job.kind, Job.state, func.count()).group_by(Job.kind, Job.state))
        return {(kind, state): count for kind, state, count in rows.all()}

    async def oldest_queued(self) -> datetime | None:
        """When the job that has waited longest was submitted; None if none waits."""
        return await self._session.scalar(select(func.min(Job.created_at)).where(Job.state == JobState.QUEUED))

    async def start(self, job_id: str) -> bool:
        """Take the job up, first time or again; False when it has ended meanwhile."""
        return await self._move(
            job_id,
            (JobState.QUEUED, JobState.RUNNING),
            state=JobState.RUNNING,
            attempts=Job.attempts + 1,
            started_at=now(),
        )

    async def put_back(self, job_id: str) -> bool:
        """Running again becomes queued: the process stops and the next one goes on."""
        return await self._move(job_id, (JobState.RUNNING,), state=JobState.QUEUED)

    async def progress(self, job_id: str, progress: dict[str, Any]) -> bool:
        """Write progress."""
        return await self._move(job_id, (JobState.RUNNING,), progress=progress)

    async def finish(
        self, job_id: str, state: JobState, *, result: dict[str, Any] | None = None, error: dict[str, Any] | None = None
    ) -> bool:
        """The end of a running job."""
        return await self._move(
            job_id, (JobState.RUNNING,), state=state, result=result or {}, error=error or {}, finished_at=now()
        )

    async def cancel_queued(self, job_id: str) -> bool:
        """Cancel a job that no worker has taken."""
        return await self._move(
            job_id, (JobState.QUEUED,), state=JobState.CANCELLED, cancel_requested=True, finished_at=now()
        )

    async def request_cancel(self, job_id: str) -> bool:
        """Ask a running job to stop after its step."""
        return await self._move(job_id, (JobState.RUNNING,), cancel_requested=True)

    async def cancel_requested(self, job_id: str) -> bool:
        """Whether somebody asked the job to stop."""
        return bool(await self._session.scalar(select(Job.cancel_requested).where(Job.id == job_id)))

    async def retry(self, job_id: str) -> bool:
        """Queue a failed or cancelled job once more."""
        return await self._move(
            job_id,
            (JobState.FAILED, JobState.CANCELLED),
            state=JobState.QUEUED,
            cancel_requested=False,
            error={},
            finished_at=None,
        )

    async def _move(self, job_id: str, sources: Sequence[JobState], **values: Any) -> bool:
        """Change the job if it is in one of the source states; each change is a new version, the id of its event."""
        change = update(Job).where(Job.id == job_id, Job.state.in_(sources)).values(version=Job.version + 1, **values)
        done = await self._session.execute(change.returning(Job.id).execution_options(synchronize_session=False))
        return done.first() is not None

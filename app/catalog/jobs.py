"""The repository of jobs: each change of a state is one conditional UPDATE, so that two writers cannot both win."""

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import exists, func, select, update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.sql.expression import ColumnElement

from app.catalog.datasets import chunks
from app.catalog.errors import NotFound
from app.catalog.pages import Page, newest_first
from app.catalog.tables import Job, Task
from app.catalog.tasks import Tasks, clock
from app.catalog.types import JobKind, JobState, TaskState, now

ACTIVE = (JobState.QUEUED, JobState.RUNNING)


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
        """Store a new job with the task that it begins with."""
        self._session.add(job)
        await self._session.flush()
        await Tasks(self._session).begin(job.id)

    async def page(self, limit: int, cursor: str | None, state: JobState | None) -> Page[Job]:
        """Jobs, newest first."""
        where = [] if state is None else [Job.state == state]
        return await newest_first(self._session, Job, *where, limit=limit, cursor=cursor)

    async def succeeded(self, kind: JobKind, model_id: str, most: int) -> Sequence[Job]:
        """The latest jobs of a kind on a model that went well."""
        mine = Job.kind == kind, Job.model_id == model_id, Job.state == JobState.SUCCEEDED
        return (await self._session.scalars(select(Job).where(*mine).order_by(Job.id.desc()).limit(most))).all()

    async def without_tasks(self) -> Sequence[str]:
        """Ids of unfinished jobs that an older version of the service submitted."""
        query = select(Job.id).where(Job.state.in_(ACTIVE), ~exists().where(Task.job_id == Job.id))
        return (await self._session.scalars(query)).all()

    async def known(self, ids: Iterable[str]) -> set[str]:
        """Those of the ids that are a job's."""
        found: set[str] = set()
        for chunk in chunks(ids):
            found |= set((await self._session.scalars(select(Job.id).where(Job.id.in_(chunk)))).all())
        return found

    async def counts(self) -> dict[tuple[JobKind, JobState], int]:
        """How many jobs there are of each kind in each state."""
        rows = await self._session.execute(select(Job.kind, Job.state, func.count()).group_by(Job.kind, Job.state))
        return {(kind, state): count for kind, state, count in rows.all()}

    async def oldest_queued(self) -> datetime | None:
        """When the job that has waited longest was submitted; None if none waits."""
        return await self._session.scalar(select(func.min(Job.created_at)).where(Job.state == JobState.QUEUED))

    async def lock(self, job_id: str) -> bool:
        """Keep others from changing the job or its tasks until the commit; False when it has ended meanwhile."""
        return await self._move(job_id, ACTIVE)

    async def start(self, job_id: str, *, again: bool) -> bool:
        """A task of the job was taken; `again` when the job's work begins or a part of it is done once more."""
        return await self._move(
            job_id,
            ACTIVE,
            state=JobState.RUNNING,
            attempts=Job.attempts + int(again),
            started_at=func.coalesce(Job.started_at, now()) if not again else now(),
        )

    async def rest(self, job_id: str) -> bool:
        """A running job of which no task runs is queued again."""
        running = exists().where(Task.job_id == job_id, Task.state == TaskState.RUNNING)
        return await self._move(job_id, (JobState.RUNNING,), ~running, state=JobState.QUEUED)

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

    async def give_up(self, job_id: str, error: dict[str, Any]) -> bool:
        """Fail a job on which workers were lost."""
        return await self._move(job_id, ACTIVE, state=JobState.FAILED, error=error, finished_at=now())

    async def cancel_idle(self, job_id: str) -> bool:
        """Cancel a job on which no worker works."""
        live = exists().where(Task.job_id == job_id, Task.state == TaskState.RUNNING, Task.lease_until > clock())
        return await self._move(
            job_id, ACTIVE, ~live, state=JobState.CANCELLED, cancel_requested=True, finished_at=now()
        )

    async def request_cancel(self, job_id: str) -> bool:
        """Ask a running job to stop after its step."""
        return await self._move(job_id, (JobState.RUNNING,), cancel_requested=True)

    async def retry(self, job_id: str) -> bool:
        """Queue a failed or cancelled job once more."""
        return await self._move(
            job_id,
            (JobState.FAILED, JobState.CANCELLED),
            state=JobState.QUEUED,
            cancel_requested=False,
            error={},
            progress={},
            finished_at=None,
        )

    async def _move(self, job_id: str, sources: Sequence[JobState], *also: ColumnElement[bool], **values: Any) -> bool:
        """Change the job if it is in one of the source states; each change is a new version, the id of its event."""
        here = Job.id == job_id, Job.state.in_(sources)
        change = update(Job).where(*here, *also).values(version=Job.version + 1, **values)
        done = await self._session.execute(change.returning(Job.id).execution_options(synchronize_session=False))
        return done.first() is not None

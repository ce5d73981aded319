"""The repository of indexes."""

from typing import Any

from sqlalchemy import delete, or_, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.catalog.errors import AlreadyExists, Conflict, NotFound
from app.catalog.pages import Page, newest_first
from app.catalog.tables import IndexDataset, IndexRow, Job
from app.catalog.types import IndexState, JobKind, JobState


class Indexes:
    """Indexes and the datasets that they take rows from."""

    def __init__(self, session: AsyncSession) -> None:
        self._session = session

    async def get(self, ref: str) -> IndexRow:
        """The index with that id or name."""
        query = select(IndexRow).where(or_(IndexRow.id == ref, IndexRow.name == ref))
        found = (await self._session.scalars(query)).first()
        if found is None:
            raise NotFound(f"there is no index {ref!r}", field="index")
        return found

    async def ready(self, ref: str) -> IndexRow:
        """The index, if it can be asked."""
        index = await self.get(ref)
        if index.state is not IndexState.READY:
            raise Conflict(f"index {index.name!r} is {index.state}: only a ready index can be used", field="index")
        return index

    async def require_idle(self, index_id: str) -> None:
        """Raise while a job works on the index: two writers would race for its manifest."""
        active = Job.state.in_((JobState.QUEUED, JobState.RUNNING))
        job = await self._session.scalar(select(Job.id).where(Job.index_id == index_id, active))
        if job is not None:
            raise Conflict(f"job {job} is working on index {index_id}: wait for it or cancel it", field="index")

    async def add(self, index: IndexRow) -> None:
        """Store a new index over its first dataset."""
        if await self._session.scalar(select(IndexRow.id).where(IndexRow.name == index.name)):
            raise AlreadyExists(f"an index named {index.name!r} exists already", field="name")
        self._session.add(index)
        await self._session.flush()
        await self.link(index.id, index.dataset_id)

    async def build_ended(self, job: Job, state: JobState) -> None:
        """The job that was to build the index ended without one. Adding rows to a ready index leaves it ready."""
        if job.kind is JobKind.BUILD_INDEX and state in (JobState.FAILED, JobState.CANCELLED):
            await self._set_state(job, IndexState(state.value))

    async def build_retried(self, job: Job) -> None:
        """The job that is to build the index runs again."""
        if job.kind is JobKind.BUILD_INDEX:
            await self._set_state(job, IndexState.BUILDING)

    async def _set_state(self, job: Job, state: IndexState) -> None:
        await self._session.execute(update(IndexRow).where(IndexRow.id == job.index_id).values(state=state))

    async def published(self, index_id: str, rows: int, manifest: dict[str, Any]) -> None:
        """The files changed: the index is ready, and whoever has an older version open opens it again."""
        values = {"state": IndexState.READY, "rows": rows, "manifest": manifest, "version": IndexRow.version + 1}
        await self._session.execute(update(IndexRow).where(IndexRow.id == index_id).values(values))

    async def link(self, index_id: str, dataset_id: str) -> None:
        """Note that the index takes rows from the dataset."""
        if await self._session.get(IndexDataset, (index_id, dataset_id)) is None:
            self._session.add(IndexDataset(index_id=index_id, dataset_id=dataset_id))
            await self._session.flush()

    async def remove(self, index: IndexRow) -> None:
        """Forget the index; its finished jobs stay as history."""
        await self._session.execute(delete(IndexRow).where(IndexRow.id == index.id))

    async def page(self, limit: int, cursor: str | None) -> Page[IndexRow]:
        """Indexes, newest first."""
        return await newest_first(self._session, IndexRow, limit=limit, cursor=cursor)

"""The repository of indexes."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Row, case, delete, func, literal, or_, select, update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import defer, joinedload
from sqlalchemy.sql.base import ExecutableOption

from app.catalog.errors import AlreadyExists, Conflict, Damaged, NotFound
from app.catalog.pages import Page, newest_first
from app.catalog.tables import INLINE, Dataset, IndexDataset, IndexRow, Job, Model
from app.catalog.types import IndexState, JobKind, JobState

READY, CORRUPT = (literal(state, IndexRow.state.type) for state in (IndexState.READY, IndexState.CORRUPT))


class Indexes:
    """Indexes and the datasets that they take rows from."""

    def __init__(self, session: AsyncSession) -> None:
        self._session = session

    async def get(self, ref: str, *options: ExecutableOption) -> IndexRow:
        """The index with that id or name."""
        query = select(IndexRow).where(or_(IndexRow.id == ref, IndexRow.name == ref)).options(*options)
        found = (await self._session.scalars(query)).first()
        if found is None:
            raise NotFound(f"there is no index {ref!r}", field="index")
        return found

    async def ready(self, ref: str) -> IndexRow:
        """The index, if it can be asked; without the lists that every query would decode and none looks at."""
        lists = defer(IndexRow.manifest), joinedload(IndexRow.model).defer(Model.attributed).defer(Model.skipped)
        index = await self.get(ref, *lists)
        if index.state is IndexState.CORRUPT:
            raise Damaged(f"{index.damage}: POST /indexes/{index.name}/repair", field="index")
        if index.state is not IndexState.READY:
            raise Conflict(f"index {index.name!r} is {index.state}: only a ready index can be used", field="index")
        return index

    async def repairable(self, ref: str) -> IndexRow:
        """The index, if its files were published once and nobody works on it."""
        index = await self.get(ref)
        damaged_at_birth = index.state is IndexState.FAILED and index.damage is not None
        if index.state not in (IndexState.READY, IndexState.CORRUPT) and not damaged_at_birth:
            detail = f"index {index.name!r} is {index.state}: only a ready or a corrupt one can be repaired"
            raise Conflict(detail, field="index")
        await self.require_idle(index.id)
        return index

    async def require_idle(self, index_id: str) -> None:
        """Raise while a job works on the index: two writers would race for its manifest, a reader would lose its files.

        On PostgreSQL whoever asks second waits until the first one's job is committed, or given up.
        """
        await self.lock(index_id)
        active = Job.state.in_((JobState.QUEUED, JobState.RUNNING))
        job = await self._session.scalar(select(Job.id).where(Job.index_id == index_id, active))
        if job is not None:
            raise Conflict(f"job {job} is working on index {index_id}: wait for it or cancel it", field="index")

    async def lock(self, index_id: str) -> None:
        """Let nobody else find out whether the index is idle before the commit; whoever submits a job on it does so."""
        if self._session.get_bind().dialect.name == "postgresql":
            # no lock of the row: those who hold this one wait for others who write to it (that it is damaged)
            await self._session.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(index_id, 0))))

    async def add(self, index: IndexRow) -> None:
        """Store a new index over its first dataset."""
        if await self._session.scalar(select(IndexRow.id).where(IndexRow.name == index.name)):
            raise AlreadyExists(f"an index named {index.name!r} exists already", field="name")
        self._session.add(index)
        await self._session.flush()
        await self.link(index.id, index.dataset_id)

    async def job_ended(self, job: Job, state: JobState) -> None:
        """A job of the index failed or was cancelled. An append leaves a ready index ready."""
        if job.kind is JobKind.BUILD_INDEX:
            await self._set(job.index_id, state=IndexState(state.value))
        if job.kind is JobKind.REPAIR_INDEX:
            await self._set(job.index_id, state=case((IndexRow.damage.is_(None), READY), else_=CORRUPT))

    async def job_submitted(self, job: Job) -> None:
        """A job of the index is to run, for the first time or again."""
        if job.kind is JobKind.BUILD_INDEX:
            await self._set(job.index_id, state=IndexState.BUILDING)
        if job.kind is JobKind.REPAIR_INDEX:
            await self._set(job.index_id, state=IndexState.REPAIRING)

    async def damaged(self, index_id: str | None, what: str) -> None:
        """The files are not those that were written. Whoever works on the index or builds it says its state itself."""
        usable = (IndexState.READY, IndexState.REPAIRING, IndexState.CORRUPT)
        corrupt = case((IndexRow.state.in_(usable), CORRUPT), else_=IndexRow.state)
        await self._set(index_id, damage=what, state=corrupt)

    async def _set(self, index_id: str | None, **values: Any) -> None:
        await self._session.execute(update(IndexRow).where(IndexRow.id == index_id).values(**values))

    async def published(self, index_id: str, rows: int, manifest: dict[str, Any]) -> None:
        """The files changed: the index is ready, and whoever has an older version open opens it again."""
        version = IndexRow.version + 1
        await self._set(index_id, state=IndexState.READY, rows=rows, manifest=manifest, damage=None, version=version)

    async def link(self, index_id: str, dataset_id: str) -> None:
        """Note that the index takes rows from the dataset."""
        if await self._session.get(IndexDataset, (index_id, dataset_id)) is None:
            self._session.add(IndexDataset(index_id=index_id, dataset_id=dataset_id))
            await self._session.flush()

    async def datasets(self, index_id: str) -> Sequence[str]:
        """Ids of the datasets that the index takes rows from."""
        query = select(IndexDataset.dataset_id).where(IndexDataset.index_id == index_id)
        return (await self._session.scalars(query.order_by(IndexDataset.dataset_id))).all()

    async def remove(self, index: IndexRow) -> None:
        """Forget the index and the rows that were written into its own requests; its finished jobs stay as history."""
        used = select(IndexDataset.dataset_id)
        mine = (await self._session.scalars(used.where(IndexDataset.index_id == index.id))).all()
        await self._session.execute(delete(IndexRow).where(IndexRow.id == index.id))
        held = select(IndexRow.heldout_id).where(IndexRow.heldout_id.is_not(None))
        unused = Dataset.id.in_(mine) & Dataset.id.not_in(used) & Dataset.id.not_in(held)
        await self._session.execute(delete(Dataset).where(unused & (Dataset.source == INLINE)))

    async def ids(self) -> set[str]:
        """Ids of every index: what may lie in the folder of indexes."""
        return set((await self._session.scalars(select(IndexRow.id))).all())

    async def published_versions(self) -> Sequence[Row[str, str, int, int]]:
        """(id, name, version, rows) of every index that was published."""
        columns = select(IndexRow.id, IndexRow.name, IndexRow.version, IndexRow.rows)
        return (await self._session.execute(columns.where(IndexRow.version > 0))).all()

    async def shard_bytes(self, index_id: str) -> int:
        """Bytes of the index's shards, by its manifest."""
        manifest = await self._session.scalar(select(IndexRow.manifest).where(IndexRow.id == index_id))
        return sum(size for shard in (manifest or {}).get("shards", ()) for _, size, _ in shard["files"])

    async def idle(self) -> Sequence[IndexRow]:
        """Ready indexes on which no job works."""
        busy = select(Job.index_id).where(Job.state.in_((JobState.QUEUED, JobState.RUNNING)), Job.index_id.is_not(None))
        query = select(IndexRow).where(IndexRow.state == IndexState.READY, IndexRow.id.not_in(busy))
        return (await self._session.scalars(query)).unique().all()

    async def page(self, limit: int, cursor: str | None) -> Page[IndexRow]:
        """Indexes, newest first."""
        return await newest_first(self._session, IndexRow, limit=limit, cursor=cursor)

"""The repository of datasets and their samples."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from sqlalchemy import delete, insert, or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.catalog.copying import NewSample, copy_samples
from app.catalog.errors import AlreadyExists, Conflict, NotFound
from app.catalog.filters import Condition, where
from app.catalog.pages import Page, newest_first
from app.catalog.tables import Dataset, IndexDataset, IndexRow, Job, Sample
from app.catalog.types import JobState

CHUNK = 500  # values in one IN (...) or one insert; SQLite counts its bound variables


class Datasets:
    """Datasets, their samples, and the samples of an index."""

    def __init__(self, session: AsyncSession) -> None:
        self._session = session

    @property
    def _dialect(self) -> str:
        return self._session.get_bind().dialect.name

    async def get(self, ref: str, field: str = "dataset") -> Dataset:
        """The dataset with that id or name."""
        query = select(Dataset).where(or_(Dataset.id == ref, Dataset.name == ref))
        found = (await self._session.scalars(query)).first()
        if found is None:
            raise NotFound(f"there is no dataset {ref!r}", field=field)
        return found

    async def require_free(self, name: str) -> None:
        """Raise when the name is taken."""
        if await self._session.scalar(select(Dataset.id).where(Dataset.name == name)):
            raise AlreadyExists(f"a dataset named {name!r} exists already", field="name")

    async def add(self, dataset: Dataset, samples: Sequence[NewSample]) -> None:
        """Store a dataset with all its samples."""
        await self.require_free(dataset.name)
        self._session.add(dataset)
        await self._session.flush()
        if self._dialect == "postgresql":
            await copy_samples(self._session, dataset.id, samples)
            return
        for start in range(0, len(samples), CHUNK):
            values = [
                {
                    "dataset_id": dataset.id,
                    "ordinal": start + offset,
                    "row_id": sample.row_id,
                    "record": sample.record,
                    "extra": sample.extra,
                }
                for offset, sample in enumerate(samples[start : start + CHUNK])
            ]
            await self._session.execute(insert(Sample), values)

    async def remove(self, dataset: Dataset) -> None:
        """Forget a dataset with its samples.

        Raises:
            Conflict: an index takes rows from it, or was measured on it, or an unfinished valuation reads it.
        """
        reads = or_(*(Job.params[role].as_string() == dataset.id for role in ("candidates", "validation")))
        unfinished = Job.state.in_((JobState.QUEUED, JobState.RUNNING))
        job = await self._session.scalar(select(Job.id).where(unfinished, reads).limit(1))
        if job is not None:
            raise Conflict(f"job {job} reads dataset {dataset.name!r}: wait for it or cancel it", field="dataset")
        takes = select(IndexDataset.index_id).where(IndexDataset.dataset_id == dataset.id)
        using = select(IndexRow.name).where(IndexRow.id.in_(takes) | (IndexRow.heldout_id == dataset.id))
        index = await self._session.scalar(using.limit(1))
        if index is not None:
            detail = f"dataset {dataset.name!r} is in use by index {index!r}: delete that first"
            raise Conflict(detail, field="dataset")
        await self._session.execute(delete(Dataset).where(Dataset.id == dataset.id))

    async def page(self, limit: int, cursor: str | None) -> Page[Dataset]:
        """Datasets, newest first."""
        return await newest_first(self._session, Dataset, limit=limit, cursor=cursor)

    async def samples(
        self, dataset_id: str, limit: int, after: int, conditions: Sequence[Condition] = ()
    ) -> Page[Sample]:
        """Samples in their order, those behind the ordinal `after` that meet the conditions."""
        query = select(Sample).where(
            Sample.dataset_id == dataset_id, Sample.ordinal > after, *where(conditions, self._dialect)
        )
        found = (await self._session.scalars(query.order_by(Sample.ordinal).limit(limit + 1))).all()
        return Page(found[:limit], str(found[limit - 1].ordinal) if len(found) > limit else None)

    async def records(self, dataset_id: str, start: int = 0, count: int | None = None) -> Sequence[str]:
        """The canonical records of `count` (all) rows of a dataset from the ordinal `start` on, in their order."""
        query = select(Sample.record).where(Sample.dataset_id == dataset_id, Sample.ordinal >= start)
        return (await self._session.scalars(query.order_by(Sample.ordinal).limit(count))).all()

    async def rows(self, dataset_id: str) -> Sequence[tuple[str, dict[str, Any]]]:
        """(canonical record, metadata) of a dataset's rows in their order."""
        query = select(Sample.record, Sample.extra).where(Sample.dataset_id == dataset_id).order_by(Sample.ordinal)
        return [(record, extra) for record, extra in (await self._session.execute(query)).all()]

    async def metadata(self, dataset_id: str) -> Sequence[dict[str, Any]]:
        """The metadata of a dataset's rows in their order."""
        query = select(Sample.extra).where(Sample.dataset_id == dataset_id).order_by(Sample.ordinal)
        return (await self._session.scalars(query)).all()

    async def row_ids(self, dataset_id: str) -> Sequence[str]:
        """The stable ids of a dataset's rows in their order."""
        query = select(Sample.row_id).where(Sample.dataset_id == dataset_id).order_by(Sample.ordinal)
        return (await self._session.scalars(query)).all()

    async def ids_in(self, dataset_ids: Sequence[str], conditions: Sequence[Condition] = ()) -> Sequence[str]:
        """The stable ids of some datasets' samples that meet the conditions, each once, in their order."""
        query = select(Sample.row_id).where(Sample.dataset_id.in_(dataset_ids), *where(conditions, self._dialect))
        ordered = query.order_by(Sample.dataset_id, Sample.ordinal)
        return list(dict.fromkeys((await self._session.scalars(ordered)).all()))

    async def samples_in(self, dataset_ids: Sequence[str], row_ids: Collection[str]) -> dict[str, Sample]:
        """Those samples of some datasets that have these stable ids; of equal texts one will do."""
        found: dict[str, Sample] = {}
        for chunk in chunks(row_ids):
            query = select(Sample).where(Sample.dataset_id.in_(dataset_ids), Sample.row_id.in_(chunk))
            ordered = query.order_by(Sample.dataset_id.desc(), Sample.ordinal)
            found.update({sample.row_id: sample for sample in (await self._session.scalars(ordered)).all()})
        return found

    async def matching(self, index_id: str, conditions: Sequence[Condition]) -> frozenset[str]:
        """The stable ids of an index's samples that meet the conditions."""
        query = (
            select(Sample.row_id)
            .join(IndexDataset, IndexDataset.dataset_id == Sample.dataset_id)
            .where(IndexDataset.index_id == index_id, *where(conditions, self._dialect))
        )
        return frozenset((await self._session.scalars(query)).all())

    async def of_index(
        self, index_id: str, row_ids: Collection[str], conditions: Sequence[Condition] = ()
    ) -> dict[str, Sample]:
        """The samples of an index by their stable ids.

        Equal ids are equal texts, so any dataset's copy will do, among those whose metadata meet the conditions.
        """
        found: dict[str, Sample] = {}
        for chunk in chunks(row_ids):
            query = (
                select(Sample)
                .join(IndexDataset, IndexDataset.dataset_id == Sample.dataset_id)
                .where(IndexDataset.index_id == index_id, Sample.row_id.in_(chunk), *where(conditions, self._dialect))
            )
            found.update({sample.row_id: sample for sample in (await self._session.scalars(query)).all()})
        return found


def chunks(values: Iterable[str]) -> Iterator[list[str]]:
    """The values, each once, in lists that fit into one statement."""
    unique = list(dict.fromkeys(values))
    for start in range(0, len(unique), CHUNK):
        yield unique[start : start + CHUNK]

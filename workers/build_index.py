"""Building, extending and repairing an index: rows from the catalog, gradients from the library, a shard a task.

Each kind of job differs in which shards there are and whose rows they hold; the tasks know their part of that, and
every worker finds the same again in the catalog and on the shared disk.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from app.catalog.catalog import Catalog
from app.catalog.database import Database
from app.catalog.errors import NotFound
from app.catalog.tables import IndexRow, Job, Task
from app.catalog.types import JobState
from app.influence.building import (
    Part,
    Progress,
    compute_shard,
    measure,
    part_of,
    plan_append,
    plan_build,
    plan_repair,
    publish_append,
    publish_build,
    publish_repair,
    row_ids,
    unfinished,
)
from app.influence.corpus import Row, row_from_json
from app.influence.errors import IndexCorrupt, IndexMissing
from app.influence.index import IndexSpec, Manifest, publish, read_manifest
from app.influence.models import LoadedModel
from app.jobs.compute import Compute
from app.jobs.progress import Step
from app.jobs.runner import Planned
from app.jobs.specs import index_from_json, model_from_json
from workers.same import require_same
from workers.walking import walk

DAMAGE = (IndexCorrupt, IndexMissing)
GRADIENTS, HELDOUT = "gradients", "heldout"


class IndexWork:
    """What building, appending and repairing share."""

    def __init__(self, database: Database, compute: Compute, indexes_dir: Path) -> None:
        self._database = database
        self._compute = compute
        self._indexes_dir = indexes_dir

    async def _rows(self, job: Job, index: IndexRow, part: Part) -> Sequence[Row]:
        raise NotImplementedError

    async def _publish(self, job: Job, index: IndexRow, parts: Sequence[Part]) -> Sequence[Part]:
        """Publish the files, or give the parts whose shards are not there."""
        raise NotImplementedError

    async def steps(self, job: Job, task: Task) -> AsyncGenerator[Step]:
        """Compute one shard in the torch thread."""
        index = await self._index(job)
        model, rows = await self._model(index), await self._rows(job, index, _part(task))
        spec = await asyncio.to_thread(self._spec, index)
        steps = compute_shard(self._path(index), model, rows, spec, _part(task).number)
        async for step in walk(self._compute, steps, _step):
            yield step

    async def publish(self, job: Job, tasks: Sequence[Task]) -> Sequence[int]:
        """Make the shards the index's, and see that every byte is what was written."""
        index = await self._index(job)
        numbers = {_part(task): task.number for task in tasks if task.stage == GRADIENTS}
        missing = await self._publish(job, index, list(numbers))
        if not missing:
            await self._compute.index(self._path(index), index.version + 1, fresh=True)
        return [numbers[part] for part in missing]

    async def ended(self, catalog: Catalog, job: Job, state: JobState, failure: Exception | None) -> dict[str, Any]:
        """Publish the index with the job's success, or note its failure."""
        if state is not JobState.SUCCEEDED or job.index_id is None:
            await catalog.indexes.job_ended(job, state)
            if isinstance(failure, DAMAGE):
                await catalog.indexes.damaged(job.index_id, failure.detail)
            return {}
        index = await catalog.indexes.get(job.index_id)
        opened = await self._compute.index(self._path(index), index.version + 1)
        await catalog.indexes.published(index.id, opened.rows, opened.manifest.to_dict())
        return {"index": index.id, "rows": opened.rows}

    def _path(self, index: IndexRow) -> Path:
        return self._indexes_dir / index.id

    def _spec(self, index: IndexRow) -> IndexSpec:
        return read_manifest(self._path(index)).index_spec

    async def _index(self, job: Job) -> IndexRow:
        return await self._database.patiently(lambda catalog: catalog.indexes.get(job.index_id or ""))

    async def _model(self, index: IndexRow) -> LoadedModel:
        """The model, if it still is what was registered."""
        model = await self._compute.model(model_from_json(index.model.spec))
        require_same(f"model {index.model.name!r}", index.model.fingerprint, model.fingerprint)
        return model

    async def _rows_by_id(self, index: IndexRow, ids: Sequence[str]) -> Sequence[Row]:
        found = await self._database.patiently(lambda catalog: catalog.datasets.of_index(index.id, ids))
        for row_id in ids:
            if row_id not in found:
                raise NotFound(f"row {row_id} of index {index.name!r} is in no dataset any more", field="index")
        return [row_from_json(found[row_id].record) for row_id in ids]


class BuildIndex(IndexWork):
    """Builds a new index."""

    async def plan(self, job: Job) -> Sequence[Planned]:
        """The held-out losses, where there are rows for them, and the shards."""
        index = await self._index(job)
        path, spec = self._path(index), self._spec(index)
        model, ids = await self._model(index), await self._ids(index)
        parts = [_planned(part) for part in await self._compute.run(partial(plan_build, path, model, ids, spec))]
        if index.heldout_id is not None:
            return [Planned(HELDOUT, len(await self._heldout(index)) * len(model.checkpoints)), *parts]
        await self._compute.run(lambda: list(measure(path, model, ids, (), spec)))  # that there is nothing to measure
        return parts

    async def steps(self, job: Job, task: Task) -> AsyncGenerator[Step]:
        """Compute one shard, or measure the held-out rows."""
        if task.stage == HELDOUT:
            index = await self._index(job)
            model, ids, heldout = await self._model(index), await self._ids(index), await self._heldout(index)
            steps = walk(self._compute, measure(self._path(index), model, ids, heldout, self._spec(index)), _step)
        else:
            steps = super().steps(job, task)
        async for step in steps:
            yield step

    def _spec(self, index: IndexRow) -> IndexSpec:
        return index_from_json(index.spec)  # there is no manifest yet

    async def _rows(self, job: Job, index: IndexRow, part: Part) -> Sequence[Row]:
        records = await self._database.patiently(
            lambda catalog: catalog.datasets.records(index.dataset_id, part.start, part.rows)
        )
        return [row_from_json(record) for record in records]

    async def _publish(self, job: Job, index: IndexRow, parts: Sequence[Part]) -> Sequence[Part]:
        path, model, ids, spec = self._path(index), await self._model(index), await self._ids(index), self._spec(index)
        missing = await asyncio.to_thread(unfinished, path, ids, parts)
        if not missing:
            await self._compute.run(partial(publish_build, path, model, ids, spec, parts))
        return missing

    async def _ids(self, index: IndexRow) -> Sequence[str]:
        return await self._database.patiently(lambda catalog: catalog.datasets.row_ids(index.dataset_id))

    async def _heldout(self, index: IndexRow) -> Sequence[Row]:
        heldout = index.heldout_id
        if heldout is None:
            return ()
        records = await self._database.patiently(lambda catalog: catalog.datasets.records(heldout))
        return await asyncio.to_thread(lambda: [row_from_json(record) for record in records])


class AppendSamples(IndexWork):
    """Adds the rows of one more dataset to a ready index."""

    async def plan(self, job: Job) -> Sequence[Planned]:
        """The shards of the rows that the index does not hold."""
        _, parts = await self._new(job, await self._index(job))
        return [_planned(part) for part in parts]

    async def _new(self, job: Job, index: IndexRow) -> tuple[list[str], list[Part]]:
        model = await self._model(index)
        ids = await self._database.patiently(lambda catalog: catalog.datasets.row_ids(job.params["dataset"]))
        return await self._compute.run(partial(plan_append, self._path(index), model, ids))

    async def _rows(self, job: Job, index: IndexRow, part: Part) -> Sequence[Row]:
        ids, _ = await self._new(job, index)
        return await self._rows_by_id(index, part_of(ids, part))

    async def _publish(self, job: Job, index: IndexRow, parts: Sequence[Part]) -> Sequence[Part]:
        ids, _ = await self._new(job, index)
        if not ids:  # nothing was new, or a worker was lost between publishing and saying so
            return ()
        missing = await asyncio.to_thread(unfinished, self._path(index), ids, parts)
        if not missing:
            await asyncio.to_thread(publish_append, self._path(index), parts)
        return missing


class RepairIndex(IndexWork):
    """Computes the damaged shards of an index anew; rows that were added stay, rows that were deleted stay away."""

    async def plan(self, job: Job) -> Sequence[Planned]:
        """The damaged shards."""
        index = await self._index(job)
        model, path = await self._model(index), self._path(index)

        def find() -> list[Part]:
            try:
                read_manifest(path)
            except DAMAGE:
                if not index.manifest:
                    raise
                publish(path, Manifest(**index.manifest))  # the catalog's copy
            return plan_repair(path, model)

        return [_planned(part) for part in await asyncio.to_thread(find)]

    async def _rows(self, job: Job, index: IndexRow, part: Part) -> Sequence[Row]:
        return await self._rows_by_id(index, await asyncio.to_thread(row_ids, self._path(index), part))

    async def _publish(self, job: Job, index: IndexRow, parts: Sequence[Part]) -> Sequence[Part]:
        await asyncio.to_thread(publish_repair, self._path(index), parts)
        return ()


def _planned(part: Part) -> Planned:
    return Planned(GRADIENTS, part.rows, {"number": part.number, "start": part.start, "rows": part.rows})


def _part(task: Task) -> Part:
    return Part(**task.params)


def _step(progress: Progress) -> Step:
    weighed = progress.total_tokens > 0
    return Step(
        done=progress.rows,
        total=progress.total_rows,
        work=progress.tokens if weighed else None,
        total_work=progress.total_tokens if weighed else None,
        resumed=progress.resumed,
    )

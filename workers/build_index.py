"""Building, extending and repairing an index: rows from the catalog, gradients from the library, a shard a task.

Each kind of job differs in which shards there are and whose rows they hold; the tasks know their part of that, and
every worker finds the same again in the catalog and on the shared disk.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from app.catalog.catalog import Catalog
from app.catalog.database import Database
from app.catalog.errors import NotFound
from app.catalog.tables import IndexRow, Job, Task
from app.catalog.types import JobState
from app.influence.building import (
    Part,
    Progress,
    compute_shard,
    damaged_parts,
    measure,
    part_of,
    plan_append,
    plan_build,
    publish_append,
    publish_build,
    publish_repair,
    row_ids,
    unfinished,
)
from app.influence.corpus import Row, row_from_json
from app.influence.errors import IndexCorrupt, IndexMissing
from app.influence.index import IndexSpec, Manifest, check, publish, read_manifest
from app.influence.models import LoadedModel, ModelSpec
from app.jobs.compute import Compute
from app.jobs.progress import Step
from app.jobs.runner import Moved, Planned
from app.jobs.specs import index_from_json, model_from_json
from workers.engines import Engine
from workers.same import require_same
from workers.walking import walk

Result = TypeVar("Result")
DAMAGE = (IndexCorrupt, IndexMissing)
GRADIENTS, HELDOUT, CURVATURE = "gradients", "heldout", "curvature"


class IndexWork:
    """What building, appending and repairing share."""

    def __init__(self, database: Database, compute: Compute, engine: Engine, indexes_dir: Path) -> None:
        self._database = database
        self._compute = compute
        self._engine = engine
        self._indexes_dir = indexes_dir

    async def _rows(self, index: IndexRow, task: Task) -> Sequence[Row]:
        """The rows of a task's part."""
        raise NotImplementedError

    async def _publish(self, index: IndexRow, tasks: Sequence[Task], moved: Moved) -> Sequence[Part]:
        """Publish the files, or give the parts whose shards are not there."""
        raise NotImplementedError

    async def steps(self, job: Job, task: Task) -> AsyncGenerator[Step]:
        """Compute one shard."""
        index = await self._index(job)
        rows, spec = await self._rows(index, task), await asyncio.to_thread(self._spec, index)
        work = partial(compute_shard, self._path(index), rows=rows, spec=spec, number=part_of_task(task).number)
        async for step in self._walk(index, work):
            yield step

    async def publish(self, job: Job, tasks: Sequence[Task], moved: Moved) -> Sequence[int]:
        """Gather second moments, make the shards the index's, and see that every byte is what was written."""
        index = await self._index(job)
        shards = [task for task in tasks if task.stage == GRADIENTS]
        missing = await self._publish(index, shards, moved)
        if not missing:
            await self._compute.index(self._path(index), index.version + 1, fresh=True)
        return [task.number for task in shards if part_of_task(task) in missing]

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

    async def _run(self, index: IndexRow, work: Callable[[LoadedModel], Result]) -> Result:
        return await self._engine.run(*_checked(index, work))

    async def _walk(self, index: IndexRow, work: Callable[[LoadedModel], Iterator[Progress]]) -> AsyncGenerator[Step]:
        async with aclosing(self._engine.walk(*_checked(index, work))) as steps:
            async for progress in steps:
                yield _step(progress)

    async def _walk_files(self, work: Iterator[Progress], moved: Moved) -> None:
        """The steps of work that needs no model."""
        async with aclosing(walk(work, self._compute.run)) as steps:
            async for progress in steps:
                await moved(_step(progress))

    def _path(self, index: IndexRow) -> Path:
        return self._indexes_dir / index.id

    def _spec(self, index: IndexRow) -> IndexSpec:
        return read_manifest(self._path(index)).index_spec

    async def _index(self, job: Job) -> IndexRow:
        return await self._database.patiently(lambda catalog: catalog.indexes.get(job.index_id or ""))

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
        path, spec, ids = self._path(index), self._spec(index), await self._ids(index)
        parts = [_planned(part) for part in await self._run(index, partial(plan_build, path, ids=ids, spec=spec))]
        if index.heldout_id is not None:
            checkpoints = len(index.model.spec["checkpoints"]) or 1
            return [Planned(HELDOUT, len(await self._heldout(index)) * checkpoints), *parts]
        async for _ in self._walk(index, partial(measure, path, ids=ids, heldout=(), spec=spec)):
            pass  # that there is nothing to measure is written down
        return parts

    async def steps(self, job: Job, task: Task) -> AsyncGenerator[Step]:
        """Compute one shard, or measure the held-out rows."""
        if task.stage == HELDOUT:
            index = await self._index(job)
            ids, heldout, spec = await self._ids(index), await self._heldout(index), self._spec(index)
            steps = self._walk(index, partial(measure, self._path(index), ids=ids, heldout=heldout, spec=spec))
        else:
            steps = super().steps(job, task)
        async for step in steps:
            yield step

    def _spec(self, index: IndexRow) -> IndexSpec:
        return index_from_json(index.spec)  # there is no manifest yet

    async def _rows(self, index: IndexRow, task: Task) -> Sequence[Row]:
        part = part_of_task(task)
        records = await self._database.patiently(
            lambda catalog: catalog.datasets.records(index.dataset_id, part.start, part.rows)
        )
        return [row_from_json(record) for record in records]

    async def _publish(self, index: IndexRow, tasks: Sequence[Task], moved: Moved) -> Sequence[Part]:
        path, ids, parts = self._path(index), await self._ids(index), [part_of_task(task) for task in tasks]
        missing = await asyncio.to_thread(unfinished, path, ids, parts)
        if not missing:
            async for step in self._walk(
                index, partial(publish_build, path, ids=ids, spec=self._spec(index), parts=parts)
            ):
                await moved(step)
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
        """The shards of the rows that the index does not hold; each task keeps the ids of its own."""
        index = await self._index(job)
        ids = await self._database.patiently(lambda catalog: catalog.datasets.row_ids(job.params["dataset"]))
        new, parts = await self._run(index, partial(plan_append, self._path(index), ids=ids))
        return [_planned(part, {"ids": part_of(new, part)}) for part in parts]

    async def _rows(self, index: IndexRow, task: Task) -> Sequence[Row]:
        return await self._rows_by_id(index, task.params["ids"])

    async def _publish(self, index: IndexRow, tasks: Sequence[Task], moved: Moved) -> Sequence[Part]:
        ids = [row_id for task in tasks for row_id in task.params["ids"]]
        parts = [part_of_task(task) for task in tasks]
        missing = await asyncio.to_thread(unfinished, self._path(index), ids, parts)
        if not missing:
            await self._walk_files(publish_append(self._path(index), parts), moved)
        return missing


class RepairIndex(IndexWork):
    """Computes the damaged shards of an index anew; rows that were added stay, rows that were deleted stay away."""

    async def plan(self, job: Job) -> Sequence[Planned]:
        """The damaged shards."""
        index = await self._index(job)
        path = self._path(index)

        def restored() -> Manifest:
            try:
                return read_manifest(path)
            except DAMAGE:
                if not index.manifest:
                    raise
                manifest = Manifest(**index.manifest)  # the catalog's copy
                publish(path, manifest)
                return manifest

        await self._run(index, partial(check, await asyncio.to_thread(restored)))
        return [_planned(part) for part in await asyncio.to_thread(damaged_parts, path)]  # not where queries wait

    async def _rows(self, index: IndexRow, task: Task) -> Sequence[Row]:
        return await self._rows_by_id(index, await asyncio.to_thread(row_ids, self._path(index), part_of_task(task)))

    async def _publish(self, index: IndexRow, tasks: Sequence[Task], moved: Moved) -> Sequence[Part]:
        await self._walk_files(publish_repair(self._path(index), [part_of_task(task) for task in tasks]), moved)
        return ()


def part_of_task(task: Task) -> Part:
    """The part that a task of the stage `GRADIENTS` computes."""
    return Part(*(task.params[name] for name in ("number", "start", "rows")))


def _planned(part: Part, more: Mapping[str, Any] = MappingProxyType({})) -> Planned:
    return Planned(GRADIENTS, part.rows, {**asdict(part), **more})


def _checked(
    index: IndexRow, work: Callable[[LoadedModel], Result]
) -> tuple[ModelSpec, Callable[[LoadedModel], Result]]:
    """The model to load, and the work, which refuses it unless it still is what was registered."""
    model = index.model
    return model_from_json(model.spec), partial(_if_same, model.name, model.fingerprint, work)


def _if_same(name: str, was: Mapping[str, str], work: Callable[[LoadedModel], Result], model: LoadedModel) -> Result:
    require_same(f"model {name!r}", was, model.fingerprint)
    return work(model)


def _step(progress: Progress) -> Step:
    weighed = progress.total_tokens > 0
    return Step(
        done=progress.rows,
        total=progress.total_rows,
        work=progress.tokens if weighed else None,
        total_work=progress.total_tokens if weighed else None,
        resumed=progress.resumed,
        stage=progress.stage,
        unit="modules" if progress.stage == "eigenvectors" else "rows",
    )

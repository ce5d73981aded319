"""Building, extending and repairing an index: rows from the catalog, gradients from the library, one batch a step."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from app.catalog.catalog import Catalog
from app.catalog.database import Database
from app.catalog.errors import NotFound
from app.catalog.tables import IndexRow, Job
from app.catalog.types import JobState
from app.influence.building import Progress, append, build, repair
from app.influence.corpus import Row, row_from_json
from app.influence.errors import IndexCorrupt, IndexMissing, Mismatch
from app.influence.index import Manifest, publish, read_manifest
from app.influence.models import LoadedModel
from app.jobs.compute import Compute
from app.jobs.progress import Step
from app.jobs.specs import index_from_json, model_from_json

Steps = Iterator[Progress]
DAMAGE = (IndexCorrupt, IndexMissing)


class IndexWork:
    """What building and appending share. The library resumes finished shards, so a second run repeats no work."""

    def __init__(self, database: Database, compute: Compute, indexes_dir: Path) -> None:
        self._database = database
        self._compute = compute
        self._indexes_dir = indexes_dir

    async def _prepare(self, job: Job, index: IndexRow, path: Path) -> Callable[[], Steps]:
        raise NotImplementedError

    async def steps(self, job: Job) -> AsyncGenerator[Step]:
        """Walk the library's steps in the torch thread."""
        index = await self._index(job)
        path = self._indexes_dir / index.id
        steps = await self._compute.run(await self._prepare(job, index, path))
        try:
            while (progress := await self._compute.run(partial(next, steps, None))) is not None:
                yield _step(progress)
        finally:
            await self._compute.run(partial(_close, steps))

    async def ended(self, catalog: Catalog, job: Job, state: JobState, failure: Exception | None) -> dict[str, Any]:
        """Publish the index with the job's success, or note its failure."""
        if state is not JobState.SUCCEEDED or job.index_id is None:
            await catalog.indexes.job_ended(job, state)
            if isinstance(failure, DAMAGE):
                await catalog.indexes.damaged(job.index_id, failure.detail)
            return {}
        index = await catalog.indexes.get(job.index_id)
        opened = await self._compute.index(self._indexes_dir / index.id, index.version + 1, fresh=True)
        await catalog.indexes.published(index.id, opened.rows, opened.manifest.to_dict())
        return {"index": index.id, "rows": opened.rows}

    async def _index(self, job: Job) -> IndexRow:
        async with self._database.catalog() as catalog:
            return await catalog.indexes.get(job.index_id or "")

    async def _model(self, index: IndexRow) -> LoadedModel:
        """The model, if it still is what was registered."""
        model = await self._compute.model(model_from_json(index.model.spec))
        was, is_now = index.model.fingerprint, dict(model.fingerprint)
        differs = {part: (was.get(part, ""), is_now.get(part, "")) for part in {*was, *is_now}}
        differs = {part: pair for part, pair in differs.items() if pair[0] != pair[1]}
        if differs:
            parts = ", ".join(sorted(differs))
            detail = f"model {index.model.name!r} changed on disk since it was registered ({parts}): register it anew"
            raise Mismatch(detail, field="model", differs=differs)
        return model

    async def _rows(self, dataset_id: str | None) -> Sequence[Row]:
        if dataset_id is None:
            return ()
        async with self._database.catalog() as catalog:
            records = await catalog.datasets.records(dataset_id)
        return await asyncio.to_thread(lambda: [row_from_json(record) for record in records])


class BuildIndex(IndexWork):
    """Builds a new index."""

    async def _prepare(self, job: Job, index: IndexRow, path: Path) -> Callable[[], Steps]:
        model = await self._model(index)
        rows, heldout = await self._rows(index.dataset_id), await self._rows(index.heldout_id)
        return partial(build, path, model, rows, index_from_json(index.spec), heldout)


class AppendSamples(IndexWork):
    """Adds the rows of one more dataset to a ready index."""

    async def _prepare(self, job: Job, index: IndexRow, path: Path) -> Callable[[], Steps]:
        model = await self._model(index)
        return partial(append, path, model, await self._rows(job.params["dataset"]))


class RepairIndex(IndexWork):
    """Computes the damaged shards of an index anew; rows that were added stay, rows that were deleted stay away."""

    async def _prepare(self, job: Job, index: IndexRow, path: Path) -> Callable[[], Steps]:
        model = await self._model(index)
        loop = asyncio.get_running_loop()

        def row_of(row_id: str) -> Row:  # called in the torch thread, which may wait for the loop
            return asyncio.run_coroutine_threadsafe(self._row(index, row_id), loop).result()

        def steps() -> Steps:
            try:
                read_manifest(path)
            except DAMAGE:
                if not index.manifest:
                    raise
                publish(path, Manifest(**index.manifest))  # the catalog's copy
            return repair(path, model, row_of)

        return steps

    async def _row(self, index: IndexRow, row_id: str) -> Row:
        async with self._database.catalog() as catalog:
            found = await catalog.datasets.of_index(index.id, [row_id])
        if row_id not in found:
            raise NotFound(f"row {row_id} of index {index.name!r} is in no dataset any more", field="index")
        return row_from_json(found[row_id].record)


def _step(progress: Progress) -> Step:
    weighed = progress.total_tokens > 0
    return Step(
        stage=progress.stage,
        done=progress.rows,
        total=progress.total_rows,
        work=progress.tokens if weighed else None,
        total_work=progress.total_tokens if weighed else None,
        final=progress.stage == "publish",
    )


def _close(steps: Steps) -> None:
    close = getattr(steps, "close", None)
    if close is not None:
        close()

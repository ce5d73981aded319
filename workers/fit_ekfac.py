"""Fitting EK-FAC factors over the rows of an index: one task, whose sums lie in the index's folder.

The passes follow from each other, so there is nothing to share out. Nothing that the index is made of changes: the
factors have files of their own, and exist when the small record that names them does.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

from app.catalog.catalog import Catalog
from app.catalog.tables import Job, Task
from app.catalog.types import JobState
from app.influence.ekfac import EkfacSpec, evenly, fit, read_record
from app.influence.index import check, read_manifest
from app.jobs.progress import Step
from app.jobs.runner import Planned
from workers.build_index import IndexWork

STAGE = "covariances"  # the first; the task's steps name the others


class FitEkfac(IndexWork):
    """The body of a fit."""

    async def plan(self, job: Job) -> Sequence[Planned]:
        """One task, if the model still is the index's."""
        index = await self._index(job)
        await self._run(index, partial(check, await asyncio.to_thread(read_manifest, self._path(index))))
        return [Planned(STAGE, min(index.rows, job.params["rows"]))]

    async def steps(self, job: Job, task: Task) -> AsyncGenerator[Step]:
        """The fit, from what an earlier one kept."""
        index = await self._index(job)
        opened = await self._compute.index(self._path(index), index.version)
        spec = EkfacSpec(rows=job.params["rows"], seed=job.params["seed"])
        rows = await self._rows_by_id(index, evenly(opened.ids, spec.rows))
        work = partial(fit, self._path(index), rows=rows, spec=spec)
        async with aclosing(self._walk(index, work)) as steps:
            async for step in steps:
                yield step

    async def publish(self, job: Job, tasks: Sequence[Task]) -> Sequence[int]:
        """The task's last step did; see that its record is there."""
        record = await asyncio.to_thread(read_record, self._path(await self._index(job)))
        return [] if record else [task.number for task in tasks]

    async def ended(self, catalog: Catalog, job: Job, state: JobState, failure: Exception | None) -> dict[str, Any]:
        """What was fitted; a fit that failed leaves the index as it was."""
        if state is not JobState.SUCCEEDED or job.index_id is None:
            return await super().ended(catalog, job, state, failure)
        record = await asyncio.to_thread(read_record, self._indexes_dir / job.index_id)
        told = {"rows": record.rows, "of": record.of, "bytes": record.bytes} if record else {}
        return {"index": job.index_id, **told}

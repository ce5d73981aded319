"""Valuation: the library's run over two datasets, and its scores in files and in the catalog.

One task: labels, student and scores follow from each other. What is finished lies in the job's folder on the shared
disk, so that any worker goes on where another was lost. The rows need no copy: datasets never change, and one that an
unfinished job reads cannot be deleted.
"""

import asyncio
import json
import math
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

from app.catalog.catalog import Catalog
from app.catalog.database import Database
from app.catalog.tables import Job, Task
from app.catalog.types import JobState
from app.catalog.valuations import Score
from app.influence.corpus import Row, row_from_json
from app.influence.models import LoadedModel
from app.jobs.compute import Compute
from app.jobs.groups import WHOLE, group_of
from app.jobs.progress import Step
from app.jobs.runner import Moved, Planned
from app.jobs.specs import model_from_json
from app.valuation.delivery import PAGE, REPORT, SCORES, Ranked, deliver, ranked
from app.valuation.running import Advance, StudentSpec, ValuationSpec, value
from workers.same import require_same
from workers.walking import walk

STAGE = "valuation"
STORED = 5_000  # scores in one transaction: other writers of SQLite wait for it


class Value:
    """The body of a valuation."""

    def __init__(self, database: Database, compute: Compute, indexes_dir: Path, artifacts_dir: Path) -> None:
        self._database = database
        self._compute = compute
        self._indexes_dir = indexes_dir
        self._artifacts_dir = artifacts_dir

    async def plan(self, job: Job) -> Sequence[Planned]:
        """One task, if the model still is what was registered."""
        await self._model(job)
        return [Planned(STAGE, 1)]

    async def steps(self, job: Job, task: Task) -> AsyncGenerator[Step]:
        """The run, from what an earlier one kept."""
        model = await self._model(job)
        candidates = await self._candidates(job)
        validation = _grouped(await self._rows(job.params["validation"], None), job.params["group_by"])
        index = None if job.index_id is None else self._indexes_dir / job.index_id
        run = value(model, candidates, validation, _spec(job.params["spec"]), self._folder(job), index)
        async with aclosing(walk(run, self._compute.run)) as advances:
            async for advance in advances:
                yield _step(advance)

    async def publish(self, job: Job, tasks: Sequence[Task], moved: Moved) -> Sequence[int]:
        """Rank the scores, write them out and store them, a run of ranks at a time."""
        folder = self._folder(job)
        there = await asyncio.to_thread(lambda: (folder / SCORES).is_file() and (folder / REPORT).is_file())
        if not there:
            return [task.number for task in tasks]
        await asyncio.to_thread(deliver, folder, await self._candidates(job), job.params["budget"])
        for group in await asyncio.to_thread(lambda: list(ranked(folder))):
            for start in range(0, len(group.ids), STORED):
                await self._store(job.id, group, start)
        return ()

    async def ended(self, catalog: Catalog, job: Job, state: JobState, failure: Exception | None) -> dict[str, Any]:
        """What the job's row says of the run; the report has the rest."""
        if state is not JobState.SUCCEEDED:
            return {}
        report = json.loads(await asyncio.to_thread((self._folder(job) / REPORT).read_bytes))
        told = {"rows": report["summary"]["rows"], "without_value": report["summary"]["without_value"]}
        student = report.get("student")
        trust = {"held_out_spearman": student["held_out_spearman"], "trusted": student["trusted"]} if student else {}
        return {**told, "groups": list(report["groups"]), **trust, "report": PAGE}

    async def _store(self, job_id: str, group: Ranked, start: int) -> None:
        scores = _scores(group, start)
        await self._database.patiently(lambda catalog: catalog.valuations.store(job_id, group.group, scores))

    async def _model(self, job: Job) -> LoadedModel:
        """The model, if it still is what was registered."""
        row = await self._database.patiently(lambda catalog: catalog.models.get(job.params["model"]))
        model = await self._compute.model(model_from_json(row.spec))
        require_same(f"model {row.name!r}", row.fingerprint, model.fingerprint)
        return model

    async def _candidates(self, job: Job) -> Sequence[Row]:
        return await self._rows(job.params["candidates"], job.params["columns"])

    async def _rows(self, dataset_id: str, columns: Sequence[str] | None) -> Sequence[Row]:
        """A dataset's rows, with those metadata columns (None: all of them)."""
        kept = await self._database.patiently(lambda catalog: catalog.datasets.rows(dataset_id))

        def parse() -> list[Row]:
            return [row_from_json(record, _only(extra, columns)) for record, extra in kept]

        return await asyncio.to_thread(parse)

    def _folder(self, job: Job) -> Path:
        return self._artifacts_dir / job.id


def _spec(kept: Mapping[str, Any]) -> ValuationSpec:
    """The settings that were kept."""
    student = dict(kept["student"])
    encoder = Path(student["encoder"]) if student["encoder"] else None
    return ValuationSpec(**{**kept, "student": StudentSpec(**{**student, "encoder": encoder})})


def _grouped(rows: Sequence[Row], field: str | None) -> dict[str, Sequence[Row]]:
    """Validation rows by the value of a metadata field; without a field they are one group."""
    if field is None:
        return {WHOLE: rows}
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(group_of(row.metadata, field), []).append(row)
    return {name: groups[name] for name in sorted(groups)}


def _only(extra: Mapping[str, Any], columns: Sequence[str] | None) -> Mapping[str, Any]:
    return extra if columns is None else {name: extra[name] for name in columns if name in extra}


def _scores(group: Ranked, start: int) -> list[Score]:
    return [
        Score(
            rank=at + 1,
            row_id=group.ids[at],
            value=float(group.values[at]),
            uncertainty=None if math.isnan(group.uncertainty[at]) else float(group.uncertainty[at]),
            labelled=bool(group.labelled[at]),
            tokens=int(group.tokens[at]),
            price=None if group.prices is None else int(group.prices[at]),
        )
        for at in range(start, min(start + STORED, len(group.ids)))
    ]


def _step(advance: Advance) -> Step:
    unit = {"validation": "groups", "student": "students"}.get(advance.stage, "rows")
    return Step(advance.done, advance.total, stage=advance.stage, unit=unit, note=advance.note)

"""Unlearning: the library's run over the rows that were frozen when the job was submitted, and the model that it makes.

One task: a step needs the weights of the one before. What is kept lies in the job's folder on the shared disk, so that
any worker goes on where another was lost.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

from app.catalog.catalog import Catalog
from app.catalog.tables import Job, Task
from app.catalog.types import JobState
from app.influence.corpus import row_from_json
from app.influence.models import Checkpoint, LoadedModel, ModelSpec
from app.jobs.artifacts import Curve
from app.jobs.compute import Compute
from app.jobs.plans import UnlearnPlan, read_plan
from app.jobs.progress import Step
from app.jobs.runner import Moved, Planned
from app.jobs.specs import model_from_json, model_row
from app.unlearning.running import Advance, UnlearnRows, UnlearnSpec, unlearn
from app.unlearning.training import TrainingSpec
from workers.same import require_same
from workers.walking import walk

STAGE = "unlearning"
ADAPTER = Path("adapter")
LOSSES, REPORT, TRAINING = "losses.jsonl", "report.json", "training.json"
WEIGHTS = ADAPTER / "adapter_model.safetensors"


class Unlearn:
    """The body of an unlearning job."""

    def __init__(self, compute: Compute, indexes_dir: Path, artifacts_dir: Path) -> None:
        self._compute = compute
        self._indexes_dir = indexes_dir
        self._artifacts_dir = artifacts_dir

    async def plan(self, job: Job) -> Sequence[Planned]:
        """One task, if the model still is what was registered."""
        plan = await self._plan(job)
        model = await self._compute.model(model_from_json(plan.model))
        require_same("the model", plan.fingerprint, model.fingerprint)
        return [Planned(STAGE, 1)]

    async def steps(self, job: Job, task: Task) -> AsyncGenerator[Step]:
        """The run, from what an earlier one kept; its losses go into a file as they come."""
        plan, folder = await self._plan(job), self._folder(job)
        rows = await asyncio.to_thread(_rows, plan)
        index = None if job.index_id is None else self._indexes_dir / job.index_id
        how = UnlearnSpec(
            training=TrainingSpec(**plan.training),
            mapping=plan.mapping,
            relearn_steps=plan.relearn_steps,
            report_rows=plan.report_rows,
        )
        run = unlearn(model_from_json(plan.model), rows, how, folder, index)
        async with aclosing(walk(_drawn(run, Curve(folder / LOSSES)), self._compute.run)) as advances:
            async for advance in advances:
                yield _step(advance)

    async def publish(self, job: Job, tasks: Sequence[Task], moved: Moved) -> Sequence[int]:
        """See that adapter and report are there, and load the model that is to be registered, as a query would."""
        folder = self._folder(job)
        there = await asyncio.to_thread(lambda: (folder / WEIGHTS).is_file() and (folder / REPORT).is_file())
        if not there:
            return [task.number for task in tasks]
        if job.makes_model is not None:
            await self._made(job)
        return ()

    async def ended(self, catalog: Catalog, job: Job, state: JobState, failure: Exception | None) -> dict[str, Any]:
        """Register the new model with the job's success."""
        if state is not JobState.SUCCEEDED:
            return {}
        folder = self._folder(job)
        result = await asyncio.to_thread(_result, folder)
        if job.makes_model is None:
            return result
        model = model_row(job.makes_model, *await self._made(job))
        await catalog.models.add(model, made_by=job.id)
        return {**result, "model": model.id}

    async def _made(self, job: Job) -> tuple[ModelSpec, LoadedModel]:
        """The model's base with the new adapter."""
        was = model_from_json((await self._plan(job)).model)
        last = was.checkpoints[-1] if was.checkpoints else Checkpoint("base")
        made = Checkpoint("unlearned", adapter=self._folder(job) / ADAPTER)
        spec = replace(was, checkpoints=(made,))
        if last.model is not None:
            spec = replace(spec, path=last.model, gguf_file=None)
        return spec, await self._compute.model(spec)

    async def _plan(self, job: Job) -> UnlearnPlan:
        return await asyncio.to_thread(read_plan, self._folder(job), job.params["plan"])

    def _folder(self, job: Job) -> Path:
        return self._artifacts_dir / job.id


def _rows(plan: UnlearnPlan) -> UnlearnRows:
    groups = {name: [row_from_json(record) for record in records] for name, records in plan.rows.items()}
    return UnlearnRows(**groups, clean=plan.clean)


def _drawn(run: Iterator[Advance], curve: Curve) -> Iterator[Advance]:
    for advance in run:
        if advance.losses:
            curve.add(advance.done, advance.losses)
        yield advance


def _step(advance: Advance) -> Step:
    return Step(
        advance.done,
        advance.total,
        stage=advance.stage,
        unit="steps" if advance.stage in ("training", "relearning") else "rows",
        metrics=advance.losses,
        note=advance.note,
    )


def _result(folder: Path) -> dict[str, Any]:
    """What the job's row says of the run; the report has the rest."""
    training = json.loads((folder / TRAINING).read_bytes())
    report = json.loads((folder / REPORT).read_bytes())
    shown = ("steps", "stopped")
    return {**{name: training[name] for name in shown}, "seconds": report["seconds"], "adapter": ADAPTER.as_posix()}

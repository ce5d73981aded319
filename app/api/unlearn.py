"""Unlearning: what is to be forgotten becomes a job, which makes an adapter and a report."""

import asyncio
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from app.api.callers import Asking, Caller
from app.api.choosing import Choice, Source, answers, forgotten, retained, source_of
from app.api.documents import problems
from app.api.idempotency import IdempotentRoute
from app.api.schemas.jobs import JobOut
from app.api.schemas.unlearn import (
    BETA,
    PARAMETERS,
    WEIGHTED,
    ChosenOut,
    ChosenRow,
    EstimateOut,
    Method,
    UnlearnAccepted,
    UnlearnIn,
    UnlearnPreview,
)
from app.api.services import Services, Use
from app.catalog.tables import Job, Model, Sample
from app.catalog.types import JobKind, new_id
from app.influence.corpus import row_from_json
from app.jobs.plans import UnlearnPlan
from app.problems import Refusal

router = APIRouter(prefix="/unlearn", tags=["unlearning"], route_class=IdempotentRoute)
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Modules that a fresh adapter is put on."""
NEEDS_ADAPTER = ("fisher", "dampen", "renew", "retrain")
NEEDS_CLEAN = ("relabel", "renew")
MEASURED = ("heldout", "seen", "unseen")
LATEST = 20  # jobs that are looked at for an estimate


@dataclass(frozen=True)
class Resolved:
    """A request, with its method, and all that it names found."""

    asked: UnlearnIn
    method: Method
    model: Model
    source: Source
    forget: Choice
    retain: Choice
    samples: Mapping[str, Sample]
    clean: Mapping[str, str]
    measured: Mapping[str, Sequence[str]]  # records of the other groups

    def records(self, choice: Choice) -> list[str]:
        """The canonical records of chosen rows."""
        return [self.samples[row].record for row in choice.ids]


@router.post(
    "",
    status_code=202,
    responses={
        200: {"model": UnlearnPreview, "description": "What would be done (`dry_run`)."},
        **problems(404, 409, 413),
    },
    response_model=UnlearnAccepted,
)
async def unlearn_rows(body: UnlearnIn, services: Use, caller: Asking, response: Response) -> Any:
    """Make a model forget training rows: a job, whose address is in `Location`.

    It trains an adapter away from the rows to forget while it holds the rows to retain, and measures before and after.
    The job's artifacts are the adapter (PEFT), each row's weight, the losses and a report. All that the request names
    is found and kept now: what becomes of datasets later changes nothing.
    """
    found = await _resolve(body, services, caller)
    work = _work(found)
    if body.dry_run:
        preview = await _preview(found, work, services)
        return JSONResponse(preview.model_dump(mode="json"))
    job = await _submit(found, work, services)
    response.headers["Location"] = f"/jobs/{job.id}"
    response.headers["Retry-After"] = "1"
    return UnlearnAccepted(job=JobOut.of(job), forget=len(found.forget.why), retain=len(found.retain.why))


def _best(model: Model, clean: bool) -> Method:
    """The method that docs/results.md found best for such a request."""
    if not clean:
        return "npo"
    return "renew" if _has_adapter(model) else "relabel"


def _check_parameters(body: UnlearnIn, method: Method) -> None:
    fits = PARAMETERS[method]
    for name in sorted(body.parameters.model_fields_set):
        if name not in fits:
            detail = f"{method} has no parameter {name!r}; it has {', '.join(fits)}"
            raise Refusal(422, "invalid-request", detail, field=f"parameters.{name}")
    if "mapping" in body.model_fields_set and method not in WEIGHTED:
        detail = f"{method} does not weigh rows by influence: leave `mapping` out"
        raise Refusal(422, "invalid-request", detail, field="mapping")


async def _resolve(body: UnlearnIn, services: Services, caller: Caller) -> Resolved:
    if (body.index is None) == (body.model is None):
        raise Refusal(422, "invalid-request", "give either `index` or `model`", field="index")
    if (body.model is None) != (body.dataset is None):
        detail = "`dataset` belongs to `model`: an index knows its own rows"
        raise Refusal(422, "invalid-request", detail, field="dataset")
    async with services.database.catalog() as catalog:
        if body.index is not None:
            index = await catalog.indexes.ready(body.index)
            model = await catalog.models.get(index.model_id)
            source = await source_of(catalog, await catalog.indexes.datasets(index.id), index)
        else:
            model = await catalog.models.get(body.model or "")
            dataset = await catalog.datasets.get(body.dataset or "")
            source = await source_of(catalog, [dataset.id], None)
        if body.register_as is not None:
            await catalog.models.require_free(body.register_as, "register_as")
    method = body.method or _best(model, body.clean is not None)
    _check_parameters(body, method)
    _check_adapter(method, model, "model" if body.model is not None else "index")
    forget = await forgotten(body.forget, source, services, caller)
    retain, extra = await retained(body.retain, method, forget, source, body.seed, services)
    if not retain.why and method != "ga":
        raise Refusal(422, "invalid-request", f"{method} needs rows to retain", field="retain")
    if method == "fisher":
        _check_selection(body.parameters.selection, len(forget.why), len(retain.why))
    async with services.database.catalog() as catalog:
        samples = extra | await catalog.datasets.samples_in(source.datasets, [*forget.ids, *retain.ids])
        measured = {}
        for name in MEASURED:
            ref = getattr(body, name)
            dataset_id = (await catalog.datasets.get(ref, name)).id if ref is not None else None
            measured[name] = list(await catalog.datasets.records(dataset_id)) if dataset_id is not None else []
    needed = method in NEEDS_CLEAN and not body.dry_run  # a dry run shows the rows that answers are to be written for
    clean = answers(body.clean, {row: samples[row] for row in forget.ids}, needed)
    return Resolved(body, method, model, source, forget, retain, samples, clean, measured)


def _check_adapter(method: str, model: Model, field: str) -> None:
    """Refuse a model on which the job would find no room for an adapter, or none of its own where it needs one."""
    has_adapter = _has_adapter(model)
    if method in NEEDS_ADAPTER and not has_adapter:
        detail = f"{method} works on what an adapter has learned, and model {model.name!r} has none"
        raise Refusal(422, "invalid-request", detail, field="method")
    modules = [*model.attributed, *model.skipped]
    if not has_adapter and not any(one["name"].rpartition(".")[2] in TARGETS for one in modules):
        detail = f"no adapter fits model {model.name!r}: it has none of the modules {', '.join(TARGETS)}"
        raise Refusal(422, "invalid-request", detail, field=field)


def _has_adapter(model: Model) -> bool:
    checkpoints = model.spec["checkpoints"]
    return bool(checkpoints) and checkpoints[-1]["adapter"] is not None


def _check_selection(selection: float, forget: int, retain: int) -> None:
    """Refuse a threshold that no weight can reach, since all rows include those to forget."""
    most = (forget + retain) / forget
    if selection >= most:
        detail = f"with {forget} rows to forget among {forget + retain}, take a selection below {most:.3g}"
        raise Refusal(422, "invalid-request", detail, field="parameters.selection")


def _training(found: Resolved) -> dict[str, Any]:
    """Method, seed and all parameters, so that a later version's defaults change nothing."""
    parameters = found.asked.parameters.model_dump()
    if parameters["beta"] is None:
        parameters["beta"] = BETA.get(found.method)
    return {"method": found.method, "seed": found.asked.seed, **parameters}


def _work(found: Resolved) -> dict[str, float]:
    """How much there is to do in each stage, in a unit of the stage's own."""
    body, method = found.asked, found.method
    forget, retain = len(found.forget.why), len(found.retain.why)
    groups = (forget, retain, *map(len, found.measured.values()))
    measured = sum(min(one, body.report_rows) for one in groups)
    passes = forget + retain if method in ("fisher", "dampen") else body.parameters.epochs * forget
    if method == "retrain":
        passes = body.parameters.epochs * retain
    return {
        "influence": forget + retain,
        "before": measured,
        "training": passes,
        "after": measured,
        "relearning": body.relearn_steps,
    }


async def _submit(found: Resolved, work: Mapping[str, float], services: Services) -> Job:
    body = found.asked
    plan = UnlearnPlan(
        model=found.model.spec,
        fingerprint=found.model.fingerprint,
        training=_training(found),
        mapping=body.mapping,
        relearn_steps=body.relearn_steps,
        report_rows=body.report_rows,
        rows={"forget": found.records(found.forget), "retain": found.records(found.retain), **found.measured},
        clean=found.clean,
    )
    index = found.source.index
    job_id = new_id("job")
    folder = services.settings.artifacts_dir / job_id
    try:
        digest = await asyncio.to_thread(plan.write, folder)
        params = {"model": found.model.id, "plan": digest, "method": found.method, "work": work}
        async with services.work() as unit:
            if index is not None:
                await unit.catalog.indexes.lock(index.id)
                await unit.catalog.indexes.ready(index.id)
                params["index"] = index.id
            if body.register_as is not None:
                await unit.catalog.models.require_free(body.register_as, "register_as")
            return await unit.submit(
                Job(
                    id=job_id,
                    kind=JobKind.UNLEARN,
                    index_id=index.id if index is not None else None,
                    model_id=found.model.id,
                    makes_model=body.register_as,
                    params=params,
                )
            )
    except BaseException:
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
        raise


async def _preview(found: Resolved, work: Mapping[str, float], services: Services) -> UnlearnPreview:
    most = services.settings.max_page

    def show(choice: Choice) -> ChosenOut:
        rows = [_shown(row, choice, found) for row in choice.ids[:most]]
        return ChosenOut(count=len(choice.why), rows=rows)

    return UnlearnPreview(
        model=found.model.id,
        forget=show(found.forget),
        retain=show(found.retain),
        measured={name: len(records) for name, records in found.measured.items()},
        training=_training(found),
        estimate=await _estimate(found.method, found.model, work, services),
    )


def _shown(row_id: str, choice: Choice, found: Resolved) -> ChosenRow:
    sample = found.samples[row_id]
    row = row_from_json(sample.record)
    return ChosenRow(
        id=row_id,
        prompt=row.prompt,
        response=row.response,
        metadata=sample.extra,
        why=choice.why[row_id],
        score=choice.scores.get(row_id),
        clean=found.clean.get(row_id),
    )


async def _estimate(method: str, model: Model, work: Mapping[str, float], services: Services) -> EstimateOut:
    """From the latest job of the same method on the same model: each stage's time, by what there was to do in it."""
    async with services.database.catalog() as catalog:
        earlier = await catalog.jobs.succeeded(JobKind.UNLEARN, model.id, LATEST)
    for job in earlier:
        did, took = job.params["work"], job.result["seconds"]
        if job.params["method"] == method and all(did[stage] > 0 for stage in work if work[stage] > 0):
            seconds = sum(took[stage] * work[stage] / did[stage] for stage in took if work[stage] > 0)
            how = f"from job {job.id} ({method} on this model), stage by stage, by its rows"
            return EstimateOut(seconds=seconds, how=how)
    return EstimateOut(seconds=None, how=f"no {method} job on this model has been measured yet")

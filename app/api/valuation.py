"""Valuation: candidates and validation rows become a job, which finds what training on each candidate is worth."""

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Response

from app.api import paths
from app.api.documents import problems
from app.api.idempotency import IdempotentRoute
from app.api.schemas.filters import parse
from app.api.schemas.jobs import JobOut
from app.api.schemas.valuation import ValuationAccepted, ValuationIn
from app.api.services import Services, Use
from app.catalog.catalog import Catalog
from app.catalog.tables import Dataset, IndexRow, Job, Model
from app.catalog.types import JobKind, new_id
from app.influence.corpus import row_from_json
from app.jobs.groups import NO_GROUP, WHOLE, group_sizes
from app.problems import Refusal

router = APIRouter(prefix="/valuation", tags=["valuation"], route_class=IdempotentRoute)
MOST_GROUPS = 20
LONGEST_GROUP = 100  # characters
STUDENTS_OWN = ("label_rows", "label_seconds", "draw", "rounds", "ensemble", "student")
SPEC = ("method", "normalize", "label_rows", "label_seconds", "ensemble", "rounds", "draw", "seed")


@router.post("", status_code=202, responses=problems(404, 409, 413))
async def value_rows(body: ValuationIn, services: Use, response: Response) -> ValuationAccepted:
    """Find what training on each candidate would do to the loss on the validation rows: a job.

    Its address is in `Location`; progress is in rows a second. What it found is then at `GET /valuations/{id}`, the
    scores at `GET /valuations/{id}/scores`, and the files among the job's artifacts: `scores.csv`, `scores.jsonl`,
    `scores.parquet`, `report.html`, and of `alinfik` the `student/`. Model, datasets and settings are frozen now.
    """
    _check_settings(body, services)
    async with services.work() as work:
        catalog = work.catalog
        model = await catalog.models.get(body.model)
        candidates = await catalog.datasets.get(body.candidates, "candidates")
        validation = await catalog.datasets.get(body.validation, "validation")
        index = await _index(body, model, catalog)
        groups = await _groups(body, validation, catalog)
        await _require_columns(body, candidates, catalog)
        common = await catalog.valuations.common(candidates.id, validation.id)
        left = candidates.rows - (common if body.overlap == "drop" else 0)
        _require_enough(body, left, common)
        params = {
            "model": model.id,
            "candidates": candidates.id,
            "validation": validation.id,
            "group_by": body.group_by,
            "columns": body.columns if body.columns is not None or not body.redact else [],
            "redact": body.redact,
            "budget": body.budget,
            "spec": _spec(body, index, services),
        }
        if index is not None:
            params["index"] = index.id
        job = Job(
            id=new_id("job"),
            kind=JobKind.VALUATION,
            model_id=model.id,
            index_id=index.id if index is not None else None,
            params=params,
        )
        job = await work.submit(job)
        warnings = [*_overlap(body, common), *await _mixed(candidates, validation, catalog)]
    response.headers["Location"] = f"/jobs/{job.id}"
    response.headers["Retry-After"] = "1"
    return ValuationAccepted(
        job=JobOut.of(job),
        candidates=left,
        left_out=candidates.rows - left,
        groups={WHOLE: validation.rows, **groups},
        warnings=warnings,
    )


def _check_settings(body: ValuationIn, services: Services) -> None:
    if body.max_length > services.settings.max_length:
        raise _refusal("max_length", f"max_length may be at most {services.settings.max_length}")
    if body.method == "linfik":
        for name in STUDENTS_OWN:
            if name in body.model_fields_set:
                raise _refusal(name, f"linfik values every row itself: `{name}` belongs to alinfik")
    elif body.index is not None:
        raise _refusal("index", "an index gives every row's value at once: use it with linfik")
    if body.rounds > 1 and body.label_seconds is not None:
        raise _refusal("rounds", "rounds divide a number of rows: give `label_rows`, not `label_seconds`")
    if body.rounds > 1 and body.ensemble < 2:
        raise _refusal("ensemble", "only an ensemble of 2 or more can say where it is unsure, for the second round")


def _require_enough(body: ValuationIn, left: int, common: int) -> None:
    """Refuse a pool without rows, and one that is too small for a student."""
    if left == 0:
        detail = f"all {common} candidates are validation rows: send others, or overlap=keep"
        raise _refusal("candidates", detail)
    if body.method == "linfik":
        return
    from app.valuation.running import FEWEST  # here, since it brings torch

    if left < FEWEST:
        raise _refusal("candidates", f"a student needs {FEWEST} candidates or more, here are {left}: use linfik")
    if body.label_rows is not None and body.label_rows < FEWEST:
        detail = f"{body.label_rows} labels are too few to fit a student and to measure it: label {FEWEST} rows or more"
        raise _refusal("label_rows", detail)


async def _index(body: ValuationIn, model: Model, catalog: Catalog) -> IndexRow | None:
    """The index whose vectors are to serve, if they can."""
    if body.index is None:
        return None
    index = await catalog.indexes.ready(body.index)
    await catalog.indexes.lock(index.id)
    if index.model_id != model.id:
        raise _refusal("index", f"index {index.name!r} is of another model than {model.name!r}")
    wanted = "layer" if body.normalize == "layer" else "none"
    if index.spec["normalisation"] != wanted:
        detail = f"normalize={body.normalize} needs an index with normalisation={wanted}; {index.name!r} has another"
        raise _refusal("normalize", detail)
    for name in ("template", "max_length"):
        if name in body.model_fields_set and getattr(body, name) != index.spec[name]:
            raise _refusal(name, f"index {index.name!r} was built with {name}={index.spec[name]}: leave it out")
    return index


async def _groups(body: ValuationIn, validation: Dataset, catalog: Catalog) -> dict[str, int]:
    """Validation rows by group, if they are to be grouped."""
    if body.group_by is None:
        return {}
    sizes = group_sizes(await catalog.datasets.metadata(validation.id), body.group_by)
    if set(sizes) == {NO_GROUP}:
        raise _refusal("group_by", f"no row of dataset {validation.name!r} has the field {body.group_by!r}")
    if len(sizes) > MOST_GROUPS:
        detail = f"{body.group_by!r} has {len(sizes)} values; there may be {MOST_GROUPS} groups"
        raise _refusal("group_by", detail)
    for name in sizes:
        if name == WHOLE or len(name) > LONGEST_GROUP:
            detail = f"{name[:LONGEST_GROUP]!r} cannot be a group: `{WHOLE}` is the whole set, and a name is short"
            raise _refusal("group_by", detail)
    return sizes if len(sizes) > 1 else {}


async def _require_columns(body: ValuationIn, candidates: Dataset, catalog: Catalog) -> None:
    for place, column in enumerate(body.columns or ()):
        field = f"columns.{place}"
        try:
            exists = parse({column: {"exists": True}})
        except Refusal as error:
            raise _refusal(field, error.detail.removeprefix("filter: ")) from error
        if not (await catalog.datasets.samples(candidates.id, 1, -1, exists)).items:
            raise _refusal(field, f"no row of dataset {candidates.name!r} has the field {column!r}")


def _spec(body: ValuationIn, index: IndexRow | None, services: Services) -> dict[str, Any]:
    """All settings of the library, so that a later version's defaults change nothing."""
    encoder = body.student.encoder
    if encoder is not None:
        encoder = str(paths.resolve(encoder, services.settings.roots, "student.encoder"))
    laid_out: Mapping[str, Any] = index.spec if index is not None else body.model_dump()
    return {
        **body.model_dump(include=set(SPEC)),
        "student": {**body.student.model_dump(), "encoder": encoder},
        "keep_validation": body.overlap == "keep",
        **{name: laid_out[name] for name in ("template", "max_length")},
    }


def _overlap(body: ValuationIn, common: int) -> list[str]:
    if not common:
        return []
    what = "their values are too high" if body.overlap == "keep" else "they are left out"
    return [f"{common} candidates are validation rows too: {what}"]


async def _mixed(candidates: Dataset, validation: Dataset, catalog: Catalog) -> list[str]:
    """Whether the two begin with rows of different kinds."""
    first = [(await catalog.datasets.records(one.id, count=1))[0] for one in (candidates, validation)]
    kinds = ["plain text" if row_from_json(record).is_text else "conversations" for record in first]
    if kinds[0] == kinds[1]:
        return []
    return [f"the candidates are {kinds[0]} and the validation rows {kinds[1]}: is that meant?"]


def _refusal(field: str, detail: str) -> Refusal:
    return Refusal(422, "invalid-request", detail, field=field)

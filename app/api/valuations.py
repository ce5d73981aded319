"""What valuations found: the summary, the scores a page at a time, and the rows to choose."""

import asyncio
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path as File
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query

from app.api.documents import problems
from app.api.schemas.common import Listing
from app.api.schemas.filters import EXAMPLE, FILTER, parse, parse_text
from app.api.schemas.valuation import (
    VALUATION,
    VALUATION_EXAMPLE,
    PricesOut,
    RowOut,
    ScoreOut,
    SelectedOut,
    SelectIn,
    SelectionOut,
    SummaryOut,
    ValuationOut,
    ValuationSummary,
)
from app.api.services import Cursor, Limit, Reading, Use
from app.catalog.catalog import Catalog
from app.catalog.errors import Conflict, NotFound
from app.catalog.filters import Condition
from app.catalog.tables import Job, Sample
from app.catalog.types import JobState
from app.catalog.valuations import Score
from app.influence.corpus import row_from_json
from app.jobs.groups import WHOLE
from app.problems import Refusal
from app.valuation.selection import select
from app.valuation.wording import word_vectors

router = APIRouter(tags=["valuation"])
ValuationRef = Annotated[str, Path(description=VALUATION, examples=[VALUATION_EXAMPLE])]
RANK = re.compile(r"[0-9]{1,9}")
RankCursor = Annotated[
    str | None,
    Query(
        description="The `next_cursor` of the page before; left out for the first page.",
        json_schema_extra={"pattern": f"^{RANK.pattern}$"},
    ),
]
Group = Annotated[str, Query(description="The validation group; `all` is the whole set.", examples=["all"])]
Order = Annotated[
    Literal["desc", "asc"], Query(description="`desc`: the best rows first; `asc`: the worst.", examples=["desc"])
]
AsText = Annotated[str | None, Query(description=f"As JSON. {FILTER}", examples=[json.dumps(EXAMPLE)])]
SHORTLIST = 5_000  # rows whose likeness is looked at, the best by value: a few seconds
MOST_DIVERSE = 1_000  # rows that are chosen by likeness


@router.get("/valuations")
async def list_valuations(
    catalog: Reading, services: Use, limit: Limit = 50, cursor: Cursor = None
) -> Listing[ValuationSummary]:
    """Valuations, newest first."""
    page = await catalog.valuations.page(min(limit, services.settings.max_page), cursor)
    return Listing(items=[ValuationSummary(**_about(job)) for job in page.items], next_cursor=page.next_cursor)


@router.get("/valuations/{valuation}", responses=problems(404))
async def get_valuation(valuation: ValuationRef, catalog: Reading, services: Use) -> ValuationOut:
    """A valuation: its settings, and once it is done what it found."""
    job = await catalog.valuations.get(valuation)
    summary = None
    if job.state is JobState.SUCCEEDED:
        folder = services.settings.artifacts_dir / job.id
        report, prices = await asyncio.to_thread(lambda: (_read(folder, "report.json"), _read(folder, "prices.json")))
        if report is None:
            raise NotFound(f"the report of valuation {job.id} is missing on disk", field="valuation")
        summary = await _summary(job, report, prices, catalog)
    return ValuationOut(**_about(job), settings=job.params["spec"], summary=summary)


@router.get("/valuations/{valuation}/scores", responses=problems(404, 409))
async def list_scores(
    valuation: ValuationRef,
    catalog: Reading,
    services: Use,
    group: Group = WHOLE,
    order: Order = "desc",
    limit: Limit = 50,
    cursor: RankCursor = None,
    filter: AsText = None,
) -> Listing[ScoreOut]:
    """The scores in their order, a page at a time; with a filter, those whose rows' metadata match.

    Rows without a value are not among them; the files name them.
    """
    conditions = parse_text(filter)
    if cursor is not None and not RANK.fullmatch(cursor):
        raise Refusal(422, "bad-cursor", "this cursor is not one that the server gave", field="cursor")
    job = await catalog.valuations.finished(valuation)
    await _require_filterable(job, conditions, catalog)
    page = await catalog.valuations.scores(
        job.id,
        _require_group(job, group),
        min(limit, services.settings.max_page),
        None if cursor is None else int(cursor),
        ascending=order == "asc",
        conditions=conditions,
        dataset_id=job.params["candidates"],
    )
    return Listing(items=[_score(job, *one) for one in page.items], next_cursor=page.next_cursor)


@router.post("/valuation/select", responses=problems(404, 409, 413))
async def select_rows(body: SelectIn, services: Use) -> SelectionOut:
    """The rows to train on: the best `k` that fit a budget of tokens, as different from each other as is asked for.

    A row that no longer fits the budget is passed over, and smaller ones may follow.
    """
    if body.diversity and body.k > MOST_DIVERSE:
        raise Refusal(422, "invalid-request", f"with diversity k may be at most {MOST_DIVERSE}", field="k")
    conditions = parse(body.filter)
    async with services.database.catalog() as catalog:
        job = await catalog.valuations.finished(body.valuation)
        await _require_filterable(job, conditions, catalog)
        group, dataset = _require_group(job, body.group), job.params["candidates"]
        scores = await catalog.valuations.ranked(job.id, group, conditions, dataset)
        if body.positive:
            scores = [score for score in scores if score.value > 0]
        texts: Sequence[str] | None = None
        if body.diversity:
            scores = scores[:SHORTLIST]
            texts = await _texts(job, scores, catalog)
    chosen = await asyncio.to_thread(_choose, body, scores, texts)
    return SelectionOut(
        valuation=job.id,
        group=group,
        considered=len(scores),
        tokens=sum(score.tokens for score in chosen),
        value=sum(score.value for score in chosen),
        rows=[SelectedOut(id=one.row_id, rank=one.rank, value=one.value, tokens=one.tokens) for one in chosen],
    )


def _choose(body: SelectIn, scores: Sequence[Score], texts: Sequence[str] | None) -> list[Score]:
    places = select(
        [score.value for score in scores],
        [score.tokens for score in scores],
        most=body.k,
        token_budget=body.token_budget,
        vectors=None if texts is None else word_vectors(texts),
        diversity=body.diversity,
    )
    return [scores[at] for at in places.tolist()]


async def _texts(job: Job, scores: Sequence[Score], catalog: Catalog) -> list[str]:
    found = await catalog.datasets.samples_in([job.params["candidates"]], [score.row_id for score in scores])
    if len(found) < len(scores):
        detail = f"the rows of valuation {job.id} were deleted: how alike they are cannot be told any more"
        raise Conflict(detail, field="diversity")
    rows = [row_from_json(found[score.row_id].record) for score in scores]
    return [f"{row.prompt}\n{row.response}" for row in rows]


async def _require_filterable(job: Job, conditions: Sequence[Condition], catalog: Catalog) -> None:
    """Refuse a filter on what a redacted valuation hides, and one on rows that are gone."""
    if not conditions:
        return
    shown = job.params["columns"]
    hidden = [one.field for one in conditions if job.params["redact"] and one.field not in shown]
    if hidden:
        detail = f"this valuation is redacted: it can be filtered by {', '.join(shown) or 'nothing'}"
        raise Refusal(422, "invalid-request", detail, field=f"filter.{hidden[0]}")
    try:
        await catalog.datasets.get(job.params["candidates"])
    except NotFound as gone:
        raise Conflict("the rows were deleted: their scores cannot be filtered any more", field="filter") from gone


def _require_group(job: Job, group: str) -> str:
    groups = job.result["groups"]
    if group not in groups:
        raise NotFound(f"valuation {job.id} has no group {group[:100]!r}: it has {', '.join(groups)}", field="group")
    return group


async def _summary(
    job: Job, report: Mapping[str, Any], prices: Mapping[str, Any] | None, catalog: Catalog
) -> SummaryOut:
    found = report["summary"]
    ids = [one["id"] for end in ("top", "bottom") for one in found[end]]
    samples = await catalog.datasets.samples_in([job.params["candidates"]], ids)
    ends = {
        end: [RowOut(**one, **_texts_of(job, samples.get(one["id"]))) for one in found[end]]
        for end in ("top", "bottom")
    }
    same = ("groups", "validation_loss", "teacher", "warnings", "seconds")
    return SummaryOut(
        **{**found, **ends},
        **{name: report[name] for name in same},
        student=report.get("student"),
        prices=PricesOut(**prices) if prices is not None else None,
    )


def _score(job: Job, score: Score, sample: Sample | None) -> ScoreOut:
    return ScoreOut(
        rank=score.rank,
        id=score.row_id,
        value=score.value,
        uncertainty=score.uncertainty,
        labelled=score.labelled,
        tokens=score.tokens,
        price=score.price,
        **_texts_of(job, sample),
    )


def _texts_of(job: Job, sample: Sample | None) -> dict[str, Any]:
    """What may be shown of a row."""
    if sample is None:
        return {"prompt": None, "response": None, "metadata": None}
    if job.params["redact"]:
        shown = {name: sample.extra[name] for name in job.params["columns"] if name in sample.extra}
        return {"prompt": None, "response": None, "metadata": shown}
    row = row_from_json(sample.record)
    return {"prompt": row.prompt, "response": row.response, "metadata": sample.extra}


def _about(job: Job) -> dict[str, Any]:
    params, spec = job.params, job.params["spec"]
    return {
        "id": job.id,
        "state": job.state,
        **{name: spec[name] for name in ("method", "normalize")},
        **{name: params[name] for name in ("model", "candidates", "validation")},
        "redacted": params["redact"],
        "created_at": job.created_at,
    }


def _read(folder: File, name: str) -> Any:
    file = folder / name
    return json.loads(file.read_bytes()) if file.is_file() else None

"""Which rows an unlearning forgets, and which it holds the model on: what a request says, as samples of the catalog."""

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from app.api.callers import Caller
from app.api.influence import answer
from app.api.schemas.filters import parse
from app.api.schemas.influence import InfluenceIn
from app.api.schemas.unlearn import ByInfluenceIn, ForgetIn, RetainIn
from app.api.services import Services
from app.catalog.catalog import Catalog
from app.catalog.filters import Condition
from app.catalog.tables import IndexRow, Sample
from app.influence.errors import HeadwaterError
from app.influence.nearest import nearest
from app.problems import Refusal

BY_RANDOM = 3  # retain rows at random for each row to forget, where the request says nothing


@dataclass(frozen=True)
class Source:
    """Where rows come from: all rows of some datasets, which an index may hold."""

    datasets: Sequence[str]
    ids: Sequence[str]
    index: IndexRow | None


@dataclass(frozen=True)
class Choice:
    """Rows in the order in which they were found, how each was found first, and scores where there are any."""

    why: dict[str, str] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)

    def add(self, ids: Collection[str], why: str) -> None:
        """Rows that one way found."""
        for row in ids:
            self.why.setdefault(row, why)

    @property
    def ids(self) -> list[str]:
        """The rows."""
        return list(self.why)


async def source_of(catalog: Catalog, datasets: Sequence[str], index: IndexRow | None) -> Source:
    """The rows that a request may choose from."""
    return Source(datasets, await catalog.datasets.ids_in(datasets), index)


async def forgotten(body: ForgetIn, source: Source, services: Services, caller: Caller) -> Choice:
    """The rows to forget.

    Raises:
        Refusal: 422, no way is given, an id is unknown, nothing is found, or all rows are.
    """
    chosen = Choice()
    if body.ids is None and body.filter is None and body.influence is None:
        raise _refusal("forget", "say which rows: `ids`, `filter` or `influence`")
    if body.ids is not None:
        chosen.add(_known(body.ids, source, services, "forget.ids"), "ids")
    if body.filter is not None:
        async with services.database.catalog() as catalog:
            chosen.add(await catalog.datasets.ids_in(source.datasets, _conditions(body.filter, "forget")), "filter")
    if body.influence is not None:
        await _add_influential(chosen, body.influence, source, services, caller)
    if not chosen.why:
        raise _refusal("forget", "there is nothing to forget: no row was found")
    if len(chosen.why) == len(source.ids):
        raise _refusal("forget", f"these are all {len(source.ids)} rows: nothing would be left to keep")
    return chosen


async def retained(
    body: RetainIn | None, method: str, forget: Choice, source: Source, seed: int, services: Services
) -> tuple[Choice, dict[str, Sample]]:
    """The rows to keep, and those among them that a dataset of their own holds.

    Raises:
        Refusal: 422, an id is unknown, a row is to be forgotten too, or there is no index to draw by influence.
    """
    chosen, extra = Choice(), dict[str, Sample]()
    rest = [row for row in source.ids if row not in forget.why]
    if body is None:
        if method in ("fisher", "retrain"):  # both are about all training rows
            chosen.add(rest, "rest")
            return chosen, extra
        many = len(forget.why)
        body = RetainIn(by_influence=many if source.index is not None else 0, random=BY_RANDOM * many)
    if body.ids is not None:
        chosen.add(_known(body.ids, source, services, "retain.ids"), "ids")
    async with services.database.catalog() as catalog:
        if body.filter is not None:
            chosen.add(await catalog.datasets.ids_in(source.datasets, _conditions(body.filter, "retain")), "filter")
        if body.dataset is not None:
            dataset = await catalog.datasets.get(body.dataset, "retain.dataset")
            ids = await catalog.datasets.ids_in([dataset.id])
            extra = await catalog.datasets.samples_in([dataset.id], [row for row in ids if row not in forget.why])
            chosen.add(ids, "dataset")
    both = [row for row in chosen.why if row in forget.why]
    if both:
        raise _refusal("retain", f"{len(both)} rows are both to forget and to retain, first {both[0]}")
    if body.by_influence:
        chosen.add(await _near(forget.ids, rest, chosen, body.by_influence, source, services), "by_influence")
    left = [row for row in rest if row not in chosen.why]
    drawn = random.Random(seed).sample(left, min(body.random, len(left)))  # noqa: S311 (no secret)
    chosen.add(drawn, "random")
    return chosen, extra


def answers(clean: Mapping[str, str] | str | None, forget: Mapping[str, Sample], needed: bool) -> dict[str, str]:
    """The clean answers by row.

    Args:
        needed: whether the method cannot do without one for each row.

    Raises:
        Refusal: 422, an answer is of no row to forget, empty, or missing.
    """
    if isinstance(clean, str):
        column = clean
        found = {row: sample.extra[column] for row, sample in forget.items() if sample.extra.get(column) is not None}
        if not found:
            raise _refusal("clean", f"no row to forget has the metadata column {column!r}")
    else:
        found = dict(clean or {})
        strangers = [row for row in found if row not in forget]
        if strangers:
            raise _refusal("clean", f"{len(strangers)} clean answers are of no row to forget, first {strangers[0]!r}")
    bad = [row for row, text in found.items() if not isinstance(text, str) or not text.strip()]
    if bad:
        raise _refusal("clean", f"the clean answer of row {bad[0]} is no text, or empty")
    if needed and len(found) < len(forget):
        missing = next(row for row in forget if row not in found)
        raise _refusal("clean", f"this method needs a clean answer for each row to forget; row {missing} has none")
    return found


async def _add_influential(
    chosen: Choice, asked: ByInfluenceIn, source: Source, services: Services, caller: Caller
) -> None:
    if source.index is None:
        raise _refusal("forget.influence", "an influence query needs an `index`")
    query = asked.model_dump(exclude={"min_score"}, exclude_unset=True)
    try:
        found = await answer(InfluenceIn(**query, index=source.index.id, tokens="none"), services, caller)
    except (Refusal, HeadwaterError) as error:
        error.field = f"forget.influence.{error.field}" if error.field else "forget.influence"
        raise
    hits = [hit for hit in found.proponents if hit.score > asked.min_score]
    chosen.add([hit.id for hit in hits], "influence")
    chosen.scores.update({hit.id: hit.score for hit in hits})


async def _near(
    forget: Sequence[str], rest: Sequence[str], chosen: Choice, many: int, source: Source, services: Services
) -> Sequence[str]:
    index = source.index
    if index is None:
        raise _refusal("retain.by_influence", "drawing by influence needs an `index`")
    among = [row for row in rest if row not in chosen.why]
    async with services.noticing_damage(index.id):
        opened = await services.compute.index(services.settings.indexes_dir / index.id, index.version)
        return await services.compute.run(partial(nearest, opened, forget, many, among))


def _known(ids: Sequence[str], source: Source, services: Services, field: str) -> Sequence[str]:
    most = services.settings.max_inline_rows
    if len(ids) > most:
        raise _refusal(field, f"one request may name at most {most:,} rows")
    there = set(source.ids)
    unknown = [row for row in ids if row not in there]
    if unknown:
        raise _refusal(field, f"{len(unknown)} of these ids are of no row here, first {unknown[0][:50]!r}")
    return ids


def _conditions(raw: dict[str, object], within: str) -> Sequence[Condition]:
    try:
        return parse(raw)
    except Refusal as refusal:
        raise _refusal(f"{within}.{refusal.field}", refusal.detail) from refusal


def _refusal(field: str, detail: str) -> Refusal:
    return Refusal(422, "invalid-request", detail, field=field)

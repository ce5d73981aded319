"""The rows that the sketch recalled, ordered by a better score than the sketch's own.

Recall is cheap and compares projected gradients; what it brings are `candidates`, few enough for a backward pass each:

- exact: the same score (`definition`) of gradients that are not projected.
- ekfac: sum over checkpoints of weight x <g_q, g_z>_F with <x, y>_F = x^T (F + lambda)^-1 y and F of `ekfac.py`, which
  corrects for what all rows have in common; with `normalize: "unit"` divided by |g_q|_F |g_z|_F. How an index
  normalises its modules plays no part in it: F + lambda does that by itself.

The gradients of queries are held whole, one checkpoint at a time; those of candidates are formed one module and a few
rows at a time, and only their inner products kept. Queries that are asked together share the candidates' passes. Token
scores of reranked rows are by the same score: they average to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch

from app.influence.building import NUMBERS, batches
from app.influence.corpus import Example, Row
from app.influence.ekfac import Factors, open_factors, read_record, rows_print
from app.influence.errors import FactorsMissing, QueryError
from app.influence.exact import Lenses, products, through, whole_plan
from app.influence.gradients import gradients, token_gradients
from app.influence.index import Ranked, Searchable
from app.influence.models import Checkpoint, LoadedModel
from app.influence.tokens import Route, TrainToken, texts_of, token_products

if TYPE_CHECKING:
    from app.influence.retrieval import Hit, Options

Rerank = Literal["none", "exact", "ekfac"]


@dataclass(frozen=True)
class Reranked(Ranked):
    """A row in its new place; `below` takes the rows that were not recalled to lie beyond those that were."""

    recall_score: float
    recall_rank: int


@dataclass(frozen=True)
class _Whole:
    """A gradient that is not projected, at one checkpoint: [n, width], its divisors [n, modules] and norms [n]."""

    vectors: torch.Tensor
    divisors: torch.Tensor
    norms: torch.Tensor


class Reranker:
    """The better score of one kind of question; made for each call."""

    def __init__(self, model: LoadedModel, index: Searchable, options: Options, row_of: Callable[[str], Row]) -> None:
        """Raises QueryError: fewer candidates than rows to return. FactorsMissing, FactorsCorrupt: see `ekfac`."""
        if options.candidates < options.top_k:
            detail = f"there must be at least as many candidates ({options.candidates}) as top_k ({options.top_k})"
            raise QueryError(detail, field="candidates")
        self.model, self.index, self.options, self.row_of = model, index, options, row_of
        self.kept = index.manifest.index_spec
        self.encoder = model.encoder(self.kept.template, self.kept.max_length)
        self.factors: Factors | None = None
        stale = False
        if options.rerank == "ekfac":
            self.factors, stale = _factors(index)
        self.plan = whole_plan(model, "none" if self.factors else self.kept.normalisation)
        self.unit = options.normalize == "unit"
        self.warnings: list[str] = []
        if self.factors and stale:
            record = self.factors.record
            self.warnings.append(
                f"the EK-FAC factors were fitted on {record.rows} of {record.of} rows before rows were added to the "
                "index or removed: fit them again if those were many"
            )

    @property
    def name(self) -> str:
        """Of the score."""
        kind = "cosine" if self.unit else "dot"
        if self.factors:
            return f"ekfac_{kind}"
        return f"exact_{'layer' if self.plan.layer else 'gradient'}_{kind}"

    @property
    def formula(self) -> str:
        """What is ranked."""
        inner, norm = ("<g_q, g_z>_F", "|.|_F") if self.factors else ("<g_q, g_z>", "|.|")
        if self.unit:
            inner += f" / ({norm.replace('.', 'g_q')} {norm.replace('.', 'g_z')})"
        said = f"sum over checkpoints of weight x {inner}"
        if self.factors:
            return f"{said}, <x, y>_F = x^T (F + lambda)^-1 y, F by EK-FAC, of gradients that are not projected"
        return f"{said} of {'layer-normalised ' if self.plan.layer else ''}gradients that are not projected"

    def order(
        self, queries: Sequence[Example], recalled: Mapping[str, Sequence[Sequence[Ranked]]]
    ) -> dict[str, list[list[Reranked]]]:
        """The `top_k` best of each query's candidates, by direction ("proponents", "opponents").

        A row whose gradient is not finite is left out, and said.
        """
        wanted = [
            list(dict.fromkeys(r.id for lists in recalled.values() for r in lists[q])) for q in range(len(queries))
        ]
        scores = self.scores(queries, wanted)
        lost = {row for one in scores for row, score in one.items() if not math.isfinite(score)}
        if lost:
            self.warnings.append(f"{len(lost)} recalled rows have no finite gradient and were left out")
        found: dict[str, list[list[Reranked]]] = {}
        for name, lists in recalled.items():
            sign = 1 if name == "proponents" else -1
            found[name] = []
            for mine, ranked in zip(scores, lists, strict=True):
                places = [n for n, row in enumerate(ranked) if row.id not in lost]
                places.sort(key=lambda n: -sign * mine[ranked[n].id])
                best = [
                    Reranked(ranked[n].id, mine[ranked[n].id], ranked[place].below, ranked[n].score, n + 1)
                    for place, n in enumerate(places[: self.options.top_k])
                ]
                found[name].append(best)
        return found

    def scores(self, queries: Sequence[Example], wanted: Sequence[Sequence[str]]) -> list[dict[str, float]]:
        """Of the rows, by their ids, that are wanted for each query."""
        found: list[dict[str, float]] = []
        for group in _groups(len(queries), NUMBERS // self.plan.width):
            ids = list(dict.fromkeys(row for q in group for row in wanted[q]))
            rows = [self.encoder.encode(self.row_of(row)) for row in ids]
            total = torch.zeros(len(rows), len(group), dtype=torch.float64)
            for at, checkpoint in enumerate(self.model.checkpoints):
                lenses = self._lenses(at)
                own = self._whole(checkpoint, lenses, [queries[q] for q in group])
                factors = self._weight(at) / own.norms
                # Norms by the lenses come with coordinates in their bases; without norms plain ones do.
                met = lenses if self.unit else {}
                directions = through(own.vectors, self.plan, lenses, turned=self.unit) * factors[:, None].to(
                    own.vectors
                )
                for batch in batches(rows, self.kept.token_budget):
                    part = products(self.model, checkpoint, self.plan, directions, [rows[i] for i in batch], met)
                    total[batch] += part.dots / part.norms[:, None] if self.unit else part.dots
            column = {row: n for n, row in enumerate(ids)}
            found += [{row: float(total[column[row], n]) for row in wanted[q]} for n, q in enumerate(group)]
        return found

    def add_tokens(self, example: Example, hits: Sequence[Hit]) -> Route:
        """Write token scores into the hits; the slower of the routes that were taken."""
        own = [self._whole(c, self._lenses(at), [example]) for at, c in enumerate(self.model.checkpoints)]
        routes: set[Route] = set()
        if self.options.tokens == "query":
            for group in _groups(len(hits), NUMBERS // (len(own) * self.plan.width)):
                some = [hits[n] for n in group]
                parts = []
                for at, (checkpoint, query) in enumerate(zip(self.model.checkpoints, own, strict=True)):
                    lenses = self._lenses(at)
                    rows = self._whole(checkpoint, lenses, [self._example(hit) for hit in some])
                    factors = self._weight(at) / (rows.norms * query.norms)
                    parts.append(self._direction(rows.vectors, lenses, factors))
                divisors = [query.divisors[0] for query in own]
                known = [hit.score for hit in some]
                scores, route = token_products(self.model, self.plan, example, divisors, torch.cat(parts, 1), known)
                routes.add(route)
                for hit, row in zip(some, scores.T.tolist(), strict=True):
                    hit.token_scores = row
            return "backwards" if "backwards" in routes else "nudges"
        pairs: dict[str, list[torch.Tensor]] = {hit.id: [] for hit in hits}
        for directions in self._asked(example, own):  # [n, checkpoints * width]
            for hit in hits:
                row = self._example(hit)
                mine = [self._whole(c, self._lenses(at), [row]) for at, c in enumerate(self.model.checkpoints)]
                norms = torch.cat([one.norms for one in mine])
                scaled = directions / norms.repeat_interleave(self.plan.width).to(directions)
                vector = torch.cat([one.vectors[0].float().cpu() for one in mine])
                divisors = [one.divisors[0] for one in mine]
                known = (scaled @ vector).tolist()
                scores, route = token_products(self.model, self.plan, row, divisors, scaled, known)
                routes.add(route)
                pairs[hit.id].append(scores)
        for hit in hits:
            scores = torch.cat(pairs[hit.id], 1)  # [targets of the row, 1 or targets of the query]
            texts = texts_of(self._example(hit))
            hit.train_tokens = [TrainToken(t, s) for t, s in zip(texts, scores.mean(1).tolist(), strict=True)]
            if self.options.tokens == "both":
                hit.pair_scores, hit.token_scores = scores.tolist(), scores.mean(0).tolist()
        return "backwards" if self.options.tokens == "both" or "backwards" in routes else "nudges"

    def _asked(self, example: Example, own: Sequence[_Whole]) -> Iterator[torch.Tensor]:
        """What a query asks of rows, over its norms: as a whole, or token by token, as many as there is room for."""
        if self.options.tokens == "train":
            parts = [
                self._direction(query.vectors, self._lenses(at), self._weight(at) / query.norms)
                for at, query in enumerate(own)
            ]
            yield torch.cat(parts, 1)
            return
        for group in _groups(len(example.positions), NUMBERS // (len(own) * self.plan.width)):
            counted = {example.positions[n] for n in group}
            some = replace(example, targets=tuple(at in counted for at in range(len(example.targets))))
            parts = []
            for at, (checkpoint, query) in enumerate(zip(self.model.checkpoints, own, strict=True)):
                tokens = token_gradients(self.model, checkpoint, self.plan, some, query.divisors[0])
                parts.append(self._direction(tokens, self._lenses(at), self._weight(at) / query.norms))
            yield torch.cat(parts, 1)

    def _direction(self, vectors: torch.Tensor, lenses: Lenses, factors: torch.Tensor) -> torch.Tensor:
        """[n, width], float32 on the CPU: what meets plain gradients, by factors [n or 1]."""
        return through(vectors, self.plan, lenses).float().cpu() * factors[:, None].float()

    def _whole(self, checkpoint: Checkpoint, lenses: Lenses, examples: Sequence[Example]) -> _Whole:
        """Gradients of examples; their norms are ones where nothing is divided by them."""
        vectors: list[torch.Tensor] = [torch.empty(0)] * len(examples)
        divisors = list(vectors)
        for batch in batches(examples, self.kept.token_budget):
            found = gradients(self.model, checkpoint, self.plan, [examples[i] for i in batch])
            for at, i in enumerate(batch):
                vectors[i], divisors[i] = found.vectors[at], found.divisors[at]
        whole = torch.stack(vectors)
        norms = torch.ones(len(whole), dtype=torch.float64)
        if self.unit:
            squares = (through(whole, self.plan, lenses) * whole).sum(1).double().cpu()
            norms = squares.sqrt().clamp_min(torch.finfo(torch.float32).tiny)
        return _Whole(whole, torch.stack(divisors), norms)

    def _lenses(self, at: int) -> Lenses:
        return self.factors.lenses(at, self.model) if self.factors else {}

    def _weight(self, at: int) -> float:
        return self.index.manifest.weights[at]

    def _example(self, hit: Hit) -> Example:
        return self.encoder.encode(self.row_of(hit.id))


def _factors(index: Searchable) -> tuple[Factors, bool]:
    """An index's factors, read once for as long as the index is open, and whether its rows are others by now."""
    kept: tuple[Factors, bool] | None = index.opened.get("ekfac")
    if kept is None or kept[0].record != read_record(index.path):
        factors = open_factors(index.path)
        if factors.record.fingerprint != index.manifest.fingerprint:
            detail = "the EK-FAC factors are of another model: POST /indexes/{index}/ekfac fits them anew"
            raise FactorsMissing(detail, field="rerank")
        stale = factors.record.ids != rows_print(index.manifest.to_dict())
        kept = index.opened["ekfac"] = (factors, stale)
    return kept


def _groups(count: int, size: int) -> list[range]:
    """0 to count in runs of at most so many, at least one."""
    size = max(1, size)
    return [range(start, min(start + size, count)) for start in range(0, count, size)]

"""A generation in; the training samples that pushed the model towards it, and away from it, out.

Score of a row z for a query q (TracIn-CP; METHODS section 1): sum over checkpoints c of w_c <grad L(q), grad L(z)>,
each gradient divided by its norm when `normalize` is "unit". `precondition` puts A grad L(q) in the place of grad L(q),
and "trackstar" takes lengths by A (curvature.py; docs/scores.md). L is the mean loss over the tokens asked about, so
token scores average to the row's score: every divisor is the whole query's (or the whole row's), never the token's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from app.influence.building import batches
from app.influence.corpus import Encoder, Example, Message, Row
from app.influence.curvature import DAMPING, Curvature, Precondition
from app.influence.errors import QueryError
from app.influence.gradients import Gradients, Plan, gradients, losses, plan_for, token_gradients
from app.influence.index import Normalize, Ranked, Searchable
from app.influence.models import Checkpoint, LoadedModel
from app.influence.rerank import Rerank, Reranked, Reranker
from app.influence.tokens import Route, TrainToken, texts_of, token_products

NOTHING = "the index has no row that may be found: none is left, or none matches the filter"


@dataclass(frozen=True)
class Query:
    """A prompt (no messages: plain text), what was generated, and the characters of it that are asked about."""

    messages: tuple[Message, ...]
    generation: str
    span: tuple[int, int] | None = None


@dataclass(frozen=True)
class Options:
    """How to rank, and which token scores to add; `among`: ids of the only rows that may be found (None: any).

    `rerank`: by which better score (rerank.py) the best `candidates` of each direction are ordered anew.
    """

    top_k: int = 10
    tokens: Literal["none", "query", "train", "both"] = "query"
    direction: Literal["proponents", "opponents", "both"] = "proponents"
    normalize: Literal["none", "unit"] = "unit"
    precondition: Precondition = "none"
    rerank: Rerank = "none"
    candidates: int = 200
    among: frozenset[str] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Token:
    """A token of the generation; offsets are characters of it, `loss` in nats at the last checkpoint."""

    text: str
    start: int
    end: int
    loss: float
    in_span: bool


@dataclass(frozen=True)
class Recall:
    """A reranked row's score by the index, and its place among the candidates of its direction, from 1."""

    score: float
    rank: int


@dataclass
class Hit:
    """A row. `percentile` is the share of the rows that may be found, in percent, that score below it.

    A reranked row's is that of its new place; `recall` is what it had before.
    """

    id: str
    score: float
    percentile: float
    recall: Recall | None = None
    token_scores: list[float] | None = None
    train_tokens: list[TrainToken] | None = None
    pair_scores: list[list[float]] | None = None  # [train token][query token]


@dataclass(frozen=True)
class RecallDefinition:
    """The score by which the index chose, and how many rows of each direction it brought."""

    name: str
    formula: str
    candidates: int


@dataclass(frozen=True)
class Definition:
    """What the scores mean; where they are preconditioned, by which damping, in mean eigenvalues, and whose moments;
    `recall`: by what the index chose the candidates, where other scores ordered them.
    """

    name: str
    formula: str
    normalize: str
    precondition: str
    damping: float | None
    moments_rows: int | None
    index_normalisation: str
    projection: dict[str, Any]
    checkpoints: list[dict[str, Any]]
    tokens_route: Route | None
    recall: RecallDefinition | None = None


@dataclass
class Answer:
    """`loss`: mean over the tokens asked about, in nats; `timings`: seconds by stage."""

    tokens: list[Token]
    loss: float
    proponents: list[Hit]
    opponents: list[Hit]
    definition: Definition
    warnings: list[str]
    timings: dict[str, float] = field(default_factory=dict)


def influence(
    model: LoadedModel, index: Searchable, queries: Sequence[Query], options: Options, row_of: Callable[[str], Row]
) -> list[Answer]:
    """Answer queries by one batched forward and backward pass a checkpoint and one scan of the index.

    Args:
        row_of: the text of a row by its id; asked only when training tokens are scored.

    Raises:
        QueryError: an empty or over-long generation, or a span without a token. Mismatch: another model.
        FactorsMissing, FactorsCorrupt: the rows are to be reranked by factors that cannot be had.
    """
    if options.top_k < 1:
        raise QueryError("top_k is at least 1", field="top_k")
    metric = _Metric(index, options)
    index.check(model)
    reranker = None if options.rerank == "none" else Reranker(model, index, options, row_of)
    kept = index.manifest.index_spec
    plan = plan_for(model, kept.projection, kept.normalisation)
    encoder = model.encoder(kept.template)
    asked = [_Asked(encoder, query) for query in queries]
    timings: dict[str, float] = {}
    with _timed(timings, "gradients"):
        examples = [one.example for one in asked]
        found = [_gradients(model, c, plan, examples, kept.token_budget) for c in model.checkpoints]
    vectors = torch.cat([f.vectors.float().cpu() for f in found], 1)  # [queries, checkpoints * width]
    norms, vectors = metric.query(vectors)
    weights = torch.tensor(index.manifest.weights) / norms  # [queries, checkpoints]
    vectors = vectors * weights.repeat_interleave(plan.width, 1)
    if not torch.isfinite(vectors).all():
        raise QueryError("the gradient of the generation is not finite", field="generation")
    with _timed(timings, "search"):
        wanted = {
            "proponents": options.direction != "opponents",
            "opponents": options.direction != "proponents",
        }
        reach = options.top_k if reranker is None else options.candidates
        ranked: dict[str, Sequence[Sequence[Ranked]]] = {
            name: index.top(vectors, reach, metric.rows, name == "proponents", options.among)
            for name, asked_for in wanted.items()
            if asked_for
        }
    if reranker is not None:
        with _timed(timings, "rerank"):
            ranked = {**reranker.order(examples, ranked)}
    scorer = _Tokens(model, index, plan, model.encoder(kept.template, kept.max_length), options, row_of, metric)
    answers = []
    for number, one in enumerate(asked):
        mine = dict(timings)
        route: Route | None = None
        proponents, opponents = (
            [_hit(r) for r in ranked[name][number] if sign * r.score > 0] if name in ranked else []
            for name, sign in (("proponents", 1), ("opponents", -1))
        )
        hits = [*proponents, *opponents]
        if options.tokens != "none" and hits:
            with _timed(mine, "tokens"):
                if reranker is not None:
                    route = reranker.add_tokens(one.example, hits)
                else:
                    route = scorer.add(
                        one.example, [f.divisors[number] for f in found], weights[number], vectors[number], hits
                    )
        own = found[-1].losses[number]
        with _timed(mine, "losses"):
            each = own if one.whole is one.example else losses(model, model.checkpoints[-1], [one.whole])[0]
        answers.append(
            Answer(
                tokens=one.tokens(each.tolist()),
                loss=float(own.mean()),
                proponents=proponents,
                opponents=opponents,
                definition=_reranked(reranker, _definition(index, options, route)),
                warnings=[
                    *index.manifest.warnings,
                    *([] if reranker is None else reranker.warnings),
                    *_loss_warning(index, float(own.mean())),
                    *([] if any(found[number] for found in ranked.values()) else [NOTHING]),
                ],
                timings=mine,
            )
        )
    return answers


class _Asked:
    """A query as the model sees it: `whole` counts every token of the generation, `example` those of the span."""

    def __init__(self, encoder: Encoder, query: Query) -> None:
        self.whole, self.start = encoder.encode_query(query.messages, query.generation)
        self.query = query
        self.example = self.whole
        if query.span is not None:
            first, last = query.span
            if not 0 <= first < last <= len(query.generation):
                detail = f"the span is [start, end) characters within the generation's {len(query.generation)}"
                raise QueryError(detail, field="span")
            inside = tuple(
                counts and b - self.start > first and a - self.start < last
                for counts, (a, b) in zip(self.whole.targets, self.whole.offsets, strict=True)
            )
            if not any(inside):
                raise QueryError("no token of the generation lies in the span", field="span")
            self.example = replace(self.whole, targets=inside)

    def tokens(self, each: Sequence[float]) -> list[Token]:
        found = []
        shown = 0  # a character of several tokens is shown by the first
        for position, loss in zip(self.whole.positions, each, strict=True):
            a, b = self.whole.offsets[position]
            start, end = max(a - self.start, 0), b - self.start
            inside = self.example.targets[position]
            found.append(Token(self.query.generation[max(start, shown) : end], start, end, loss, inside))
            shown = max(shown, end)
        return found


class _Metric:
    """How vectors [n, checkpoints * width] of queries and rows are turned and measured before they meet.

    Attributes:
        rows: what `Searchable.top` multiplies a stored unit vector by.
    """

    def __init__(self, index: Searchable, options: Options) -> None:
        """Raises QueryError where the index has no second moments, or the options contradict each other."""
        self.index, self.options = index, options
        self.curvature = None if options.precondition == "none" else _curvature(index)
        self.rows: Normalize = "scaled" if options.precondition == "trackstar" else options.normalize
        if options.precondition == "trackstar" and options.normalize != "unit":
            detail = 'trackstar is a cosine: leave `normalize` out, or ask for precondition "fisher"'
            raise QueryError(detail, field="normalize")

    def turn(self, vectors: torch.Tensor) -> torch.Tensor:
        """A v; v itself where nothing preconditions."""
        return vectors if self.curvature is None else self.curvature.apply(vectors)

    def query(self, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What a query is divided by, [n, checkpoints], and what it is then: A q."""
        turned = self.turn(vectors)
        if self.rows == "scaled":
            return self._lengths(vectors, turned), turned
        return self._lengths(turned, turned), turned

    def row(self, vectors: torch.Tensor) -> torch.Tensor:
        """What rows are divided by, [n, checkpoints]."""
        return self._lengths(vectors, self.turn(vectors) if self.rows == "scaled" else vectors)

    def factors(self, ids: Sequence[str], norms: torch.Tensor) -> torch.Tensor:
        """What the stored unit vectors of rows, whose norms these are, are multiplied by: [n, checkpoints]."""
        if self.rows == "scaled":
            return self.index.scales(ids)
        return norms if self.rows == "none" else torch.ones_like(norms)

    def _lengths(self, vectors: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        many = len(self.index.manifest.checkpoints)
        if self.rows == "none":
            return torch.ones(len(vectors), many)
        squares: torch.Tensor = (vectors.unflatten(1, (many, -1)) * others.unflatten(1, (many, -1))).sum(2)
        lengths: torch.Tensor = squares.clamp_min(0).sqrt().clamp_min(torch.finfo(squares.dtype).tiny)
        return lengths


def _curvature(index: Searchable) -> Curvature:
    if index.curvature is not None:
        return index.curvature
    try:
        index.manifest.blocks()
    except ValueError as error:
        raise QueryError(str(error), field="precondition") from error
    detail = "the index was built before second moments were gathered: repair it (POST /indexes/{index}/repair), which "
    raise QueryError(f"{detail}gathers them and computes no gradient again", field="precondition")


class _Tokens:
    """Token scores of retrieved rows."""

    def __init__(
        self,
        model: LoadedModel,
        index: Searchable,
        plan: Plan,
        encoder: Encoder,
        options: Options,
        row_of: Callable[[str], Row],
        metric: _Metric,
    ) -> None:
        self.model, self.index, self.plan, self.encoder = model, index, plan, encoder
        self.options, self.row_of, self.metric = options, row_of, metric

    def add(
        self,
        example: Example,
        divisors: Sequence[torch.Tensor],
        weights: torch.Tensor,
        vector: torch.Tensor,
        hits: list[Hit],
    ) -> Route:
        """Write the scores into the hits; the slower of the routes that were taken.

        Args:
            divisors: [checkpoint][modules] of the query's gradient.
            weights: [checkpoints], the checkpoints' weights over the query's norms.
            vector: [checkpoints * width], the query's weighted vector, preconditioned.
        """
        if self.options.tokens == "query":
            ids = [hit.id for hit in hits]
            units, norms = self.index.vectors(ids)
            factors = self.metric.factors(ids, norms) * weights
            rows = self.metric.turn(units * factors.repeat_interleave(self.plan.width, 1))  # A is symmetric
            scores, route = self._scores(example, divisors, rows, [hit.score for hit in hits])
            for hit, row in zip(hits, scores.T.tolist(), strict=True):
                hit.token_scores = row
            return route
        routes: set[Route] = set()
        directions = vector[None]
        if self.options.tokens == "both":
            each = zip(self.model.checkpoints, divisors, strict=True)
            tokens = [token_gradients(self.model, c, self.plan, example, divisor).float().cpu() for c, divisor in each]
            directions = self.metric.turn(torch.cat(tokens, 1)) * weights.repeat_interleave(self.plan.width)
            routes.add("backwards")
        for hit in hits:
            row = self.encoder.encode(self.row_of(hit.id))
            found = [gradients(self.model, c, self.plan, [row]) for c in self.model.checkpoints]
            own = torch.cat([f.vectors[0].float().cpu() for f in found])
            (norm,) = self.metric.row(own[None])
            scaled = directions / norm.repeat_interleave(self.plan.width)
            scores, route = self._scores(row, [f.divisors[0] for f in found], scaled, (scaled @ own).tolist())
            routes.add(route)
            texts = texts_of(row)
            hit.train_tokens = [TrainToken(t, s) for t, s in zip(texts, scores.mean(1).tolist(), strict=True)]
            if self.options.tokens == "both":
                hit.pair_scores = scores.tolist()
                hit.token_scores = scores.mean(0).tolist()
        return "backwards" if "backwards" in routes else "nudges"

    def _scores(
        self, example: Example, divisors: Sequence[torch.Tensor], directions: torch.Tensor, known: Sequence[float]
    ) -> tuple[torch.Tensor, Route]:
        return token_products(self.model, self.plan, example, divisors, directions, known)


def _gradients(
    model: LoadedModel, checkpoint: Checkpoint, plan: Plan, examples: Sequence[Example], budget: int
) -> Gradients:
    """`gradients` of any number of examples, in batches of so many padded tokens."""
    vectors: list[torch.Tensor] = [torch.empty(0)] * len(examples)
    losses, divisors = list(vectors), list(vectors)
    for batch in batches(examples, budget):
        found = gradients(model, checkpoint, plan, [examples[i] for i in batch])
        for at, i in enumerate(batch):
            vectors[i], losses[i], divisors[i] = found.vectors[at], found.losses[at], found.divisors[at]
    return Gradients(torch.stack(vectors), losses, torch.stack(divisors))


def _definition(index: Searchable, options: Options, route: Route | None) -> Definition:
    spec = index.manifest.spec
    unit = options.normalize == "unit"
    kind = "cosine" if unit else "dot"
    layer = spec["normalisation"] == "layer"
    name, inner = {
        "none": (f"gradient_{kind}", "<g_q, g_z> / (|g_q| |g_z|)" if unit else "<g_q, g_z>"),
        "fisher": (f"fisher_{kind}", "<A g_q, g_z> / (|A g_q| |g_z|)" if unit else "<A g_q, g_z>"),
        "trackstar": ("trackstar", "<A g_q, g_z> / sqrt(<A g_q, g_q> <A g_z, g_z>)"),
    }[options.precondition]
    if layer:
        name = name.replace("gradient", "layer") if options.precondition == "none" else f"layer_{name}"
    formula = f"sum over checkpoints of weight x {inner}{' of layer-normalised gradients' if layer else ''}"
    preconditioned = options.precondition != "none" and index.curvature is not None
    if preconditioned:
        formula += f"; A = (H + {DAMPING:g} mean eigenvalue(H))^-1 of each block, H = mean of g_z g_z^T over rows"
    return Definition(
        name=name,
        formula=formula,
        normalize=options.normalize,
        precondition=options.precondition,
        damping=DAMPING if preconditioned else None,
        moments_rows=index.curvature.rows if preconditioned and index.curvature else None,
        index_normalisation=spec["normalisation"],
        projection=dict(spec["projection"]),
        checkpoints=[{"name": c["name"], "weight": c["weight"]} for c in index.manifest.checkpoints],
        tokens_route=route,
    )


def _hit(row: Ranked) -> Hit:
    recall = Recall(row.recall_score, row.recall_rank) if isinstance(row, Reranked) else None
    return Hit(row.id, row.score, row.below, recall)


def _reranked(reranker: Reranker | None, by_index: Definition) -> Definition:
    """What the scores mean where a reranker had the last word."""
    if reranker is None:
        return by_index
    recall = RecallDefinition(by_index.name, by_index.formula, reranker.options.candidates)
    return replace(by_index, name=reranker.name, formula=reranker.formula, recall=recall)


def _loss_warning(index: Searchable, loss: float) -> list[str]:
    train = index.manifest.checkpoints[-1]["train_loss"]
    if loss <= 2 * train:
        return []
    return [
        f"the generation's loss ({loss:.2f}) is far above the training rows' ({train:.2f}): the model would hardly "
        "write it, and attribution of a text that it is made to read is unreliable at a late checkpoint"
    ]


@contextmanager
def _timed(timings: dict[str, float], stage: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    timings[stage] = time.perf_counter() - started

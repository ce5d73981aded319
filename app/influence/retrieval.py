"""A generation in; the training samples that pushed the model towards it, and away from it, out.

Score of a row z for a query q (TracIn-CP; METHODS section 1): sum over checkpoints c of w_c <grad L(q), grad L(z)>,
each gradient divided by its norm when `normalize` is "unit". L is the mean loss over the tokens asked about, so token
scores average to the row's score: every divisor is the whole query's (or the whole row's), never the token's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from app.influence.corpus import Encoder, Example, Message, Row
from app.influence.errors import QueryError, SpecError
from app.influence.gradients import Layout, gradients, layout, losses, token_gradients
from app.influence.index import Index, ProjectionSpec, unit
from app.influence.models import LoadedModel


@dataclass(frozen=True)
class Query:
    """A prompt (no messages: plain text), what was generated, and the characters of it that are asked about."""

    messages: tuple[Message, ...]
    generation: str
    span: tuple[int, int] | None = None


@dataclass(frozen=True)
class Options:
    """How to rank, and which token scores to add."""

    top_k: int = 10
    tokens: Literal["none", "query", "train", "both"] = "query"
    direction: Literal["proponents", "opponents", "both"] = "proponents"
    normalize: Literal["none", "unit"] = "unit"


@dataclass(frozen=True)
class Token:
    """A token of the generation; offsets are characters of it, `loss` in nats at the last checkpoint."""

    text: str
    start: int
    end: int
    loss: float
    in_span: bool


@dataclass(frozen=True)
class TrainToken:
    """A token of a training row's response and its share of the row's score."""

    text: str
    score: float


@dataclass
class Hit:
    """A row. `percentile` is the share of the index's rows, in percent, that score below it."""

    id: str
    score: float
    percentile: float
    token_scores: list[float] | None = None
    train_tokens: list[TrainToken] | None = None
    pair_scores: list[list[float]] | None = None  # [train token][query token]


@dataclass(frozen=True)
class Definition:
    """What the scores mean."""

    name: str
    formula: str
    normalize: str
    index_normalisation: str
    projection: dict[str, Any]
    checkpoints: list[dict[str, Any]]
    tokens_route: Literal["backwards", "nudges"] | None


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
    model: LoadedModel, index: Index, queries: Sequence[Query], options: Options, row_of: Callable[[str], Row]
) -> list[Answer]:
    """Answer queries by one batched forward and backward pass a checkpoint and one scan of the index.

    Args:
        row_of: the text of a row by its id; asked only when training tokens are scored.

    Raises:
        QueryError: an empty or over-long generation, or a span without a token. Mismatch: another model.
    """
    if options.top_k < 1:
        raise QueryError("top_k is at least 1", field="top_k")
    index.check(model)
    kept = index.manifest.spec
    plan = layout(model, ProjectionSpec(**kept["projection"]))
    if plan.width != index.manifest.width:
        raise SpecError("the index has another width than this model's projection", field="index")
    encoder = Encoder(model.tokenizer, kept["template"], min(kept["max_length"], model.context_length))
    asked = [_Asked(encoder, query) for query in queries]
    timings: dict[str, float] = {}
    with _timed(timings, "gradients"):
        found = [gradients(model, c, plan, [one.example for one in asked]) for c in model.checkpoints]
    vectors = torch.cat(
        [
            _scaled(f.vectors, f.vectors, plan, kept["normalisation"], options) * c.weight
            for c, f in zip(model.checkpoints, found, strict=True)
        ],
        1,
    )  # [queries, checkpoints * width]
    if not torch.isfinite(vectors).all():
        raise QueryError("the gradient of the generation is not finite", field="generation")
    with _timed(timings, "search"):
        scores = index.scores(vectors, options.normalize)
    answers = []
    for number, one in enumerate(asked):
        mine = dict(timings)
        ranked = scores[number].argsort(descending=True, stable=True).tolist()
        k = min(options.top_k, len(ranked))
        top = ranked[:k] if options.direction != "opponents" else []
        bottom = ranked[::-1][:k] if options.direction != "proponents" else []

        def hit(at: int, row: torch.Tensor = scores[number]) -> Hit:
            return Hit(index.ids[at], float(row[at]), 100 * float((row < row[at]).float().mean()))

        proponents, opponents = [hit(at) for at in top], [hit(at) for at in bottom]
        hits = [*proponents, *opponents]
        if options.tokens != "none" and hits:
            with _timed(mine, "tokens"):
                _add_tokens(model, index, plan, encoder, one, vectors[number], hits, options, row_of)
        own = found[-1].losses[number]
        with _timed(mine, "losses"):
            each = own if one.whole is one.example else losses(model, model.checkpoints[-1], [one.whole])[0]
        route: Literal["backwards"] | None = None if options.tokens == "none" else "backwards"
        answers.append(
            Answer(
                tokens=one.tokens(each.tolist()),
                loss=float(own.mean()),
                proponents=proponents,
                opponents=opponents,
                definition=_definition(index, options, route),
                warnings=[*index.manifest.warnings, *_loss_warning(index, float(own.mean()))],
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
        for position, loss in zip(self.whole.positions, each, strict=True):
            a, b = self.whole.offsets[position]
            start, end = max(a - self.start, 0), b - self.start
            inside = self.example.targets[position]
            found.append(Token(self.query.generation[start:end], start, end, loss, inside))
        return found


def _scaled(
    vectors: torch.Tensor, whole: torch.Tensor, plan: Layout, normalisation: str, options: Options
) -> torch.Tensor:
    """`vectors` [n, width] divided by what the index and the options divide `whole` by ([n or 1, width])."""
    if normalisation == "layer":
        vectors = vectors.clone()
        for block in plan.blocks.values():
            place = slice(block.start, block.start + block.width)
            divisor = whole[:, place].norm(dim=1, keepdim=True)
            vectors[:, place] /= divisor.clamp_min(torch.finfo(divisor.dtype).tiny)
    if options.normalize == "unit":
        norms = unit(whole, plan, normalisation)[1]
        vectors = vectors / norms.clamp_min(torch.finfo(norms.dtype).tiny).unsqueeze(1)
    return vectors.cpu()


def _token_vectors(
    model: LoadedModel, plan: Layout, example: Example, normalisation: str, options: Options
) -> torch.Tensor:
    """[targets, checkpoints * width], scaled so that their mean is the example's own (unweighted) vector."""
    parts = []
    for checkpoint in model.checkpoints:
        each = token_gradients(model, checkpoint, plan, example)
        parts.append(_scaled(each, each.mean(0, keepdim=True), plan, normalisation, options))
    return torch.cat(parts, 1)


def _add_tokens(
    model: LoadedModel,
    index: Index,
    plan: Layout,
    encoder: Encoder,
    asked: _Asked,
    vector: torch.Tensor,
    hits: list[Hit],
    options: Options,
    row_of: Callable[[str], Row],
) -> None:
    kept = index.manifest.spec["normalisation"]
    weights = torch.tensor([c.weight for c in model.checkpoints]).repeat_interleave(plan.width)
    each = torch.empty(0)
    if options.tokens in ("query", "both"):
        each = _token_vectors(model, plan, asked.example, kept, options) * weights
        units, norms = index.vectors([hit.id for hit in hits])
        rows = units if options.normalize == "unit" else units * norms.repeat_interleave(plan.width, 1)
        for hit, scores in zip(hits, (rows @ each.T).tolist(), strict=True):
            hit.token_scores = scores
    if options.tokens in ("train", "both"):
        for hit in hits:
            example = encoder.encode(row_of(hit.id))
            train = _token_vectors(model, plan, example, kept, options)
            texts = [example.text[slice(*example.offsets[p])] for p in example.positions]
            hit.train_tokens = [TrainToken(t, s) for t, s in zip(texts, (train @ vector).tolist(), strict=True)]
            if options.tokens == "both":
                hit.pair_scores = (train @ each.T).tolist()


def _definition(index: Index, options: Options, route: Literal["backwards"] | None) -> Definition:
    spec = index.manifest.spec
    kind = "cosine" if options.normalize == "unit" else "dot"
    inner = "<g_q, g_z> / (|g_q| |g_z|)" if options.normalize == "unit" else "<g_q, g_z>"
    layer = " of layer-normalised gradients" if spec["normalisation"] == "layer" else ""
    return Definition(
        name=f"{'layer' if layer else 'gradient'}_{kind}",
        formula=f"sum over checkpoints of weight x {inner}{layer}",
        normalize=options.normalize,
        index_normalisation=spec["normalisation"],
        projection=dict(spec["projection"]),
        checkpoints=[{"name": c["name"], "weight": c["weight"]} for c in index.manifest.checkpoints],
        tokens_route=route,
    )


def _loss_warning(index: Index, loss: float) -> list[str]:
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

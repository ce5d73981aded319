"""The fields of requests, as keyword arguments: one line a field. None: left out, so that the service's default holds.

What a field means is in the service's `/docs`. A field that this version does not know goes into `extra`, which is
merged into the request: `client.influence("facts", prompt="…", extra={"a_newer_field": 1})`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NotRequired, TypedDict

Filter = Mapping[str, Any]
"""Conditions on metadata: `{"topic": "people", "year": {"gte": 1400}}`."""
Direction = Literal["proponents", "opponents", "both"]
Normalize = Literal["none", "unit"]
Precondition = Literal["none", "fisher", "trackstar"]
Rerank = Literal["none", "exact", "ekfac"]
Template = Literal["auto", "chat", "alpaca", "plain"]
Tokens = Literal["none", "query", "train", "both"]


class Extra(TypedDict, total=False):
    """What every request with a body takes."""

    extra: Mapping[str, Any] | None


class Making(Extra, total=False):
    """What every request that makes something takes: a key is made where none is given."""

    idempotency_key: str | None


class Message(TypedDict):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str


class Query(TypedDict, total=False):
    """A prompt and what the model made of it; without a generation the model writes it first."""

    prompt: str | None
    messages: Sequence[Message] | None
    generation: str | None
    max_new_tokens: int | None
    span: tuple[int, int] | None


class Options(TypedDict, total=False):
    """How to answer an influence query."""

    top_k: int | None
    tokens: Tokens | None
    direction: Direction | None
    normalize: Normalize | None
    precondition: Precondition | None
    rerank: Rerank | None
    candidates: int | None
    filter: Filter | None


class BatchFields(Options, Extra, total=False):
    """Fields of `POST /influence/batch` beside `index` and `queries`."""


class InfluenceFields(Query, Options, Extra, total=False):
    """Fields of `POST /influence` beside `index`."""


class ChatFields(Options, Extra, total=False):
    """Fields of `POST /influence/chat-completion` beside `index`: `request` and `response`, or `logged`."""

    request: Mapping[str, Any] | None
    response: Mapping[str, Any] | None
    logged: Mapping[str, Any] | str | None
    choice: int | None
    span: tuple[int, int] | None


class CheckpointFields(TypedDict):
    """One checkpoint of a run: an adapter on the base, or a whole model folder."""

    name: str
    adapter: NotRequired[str | None]
    model: NotRequired[str | None]
    weight: NotRequired[float]


class ModelFields(Making, total=False):
    """Fields of `POST /models` beside `name` and `path`."""

    gguf_file: str | None
    checkpoints: Sequence[CheckpointFields] | None
    dtype: Literal["float32", "bfloat16"] | None
    device: str | None


class Columns(TypedDict, total=False):
    """Which column holds what."""

    prompt: str | None
    input: str | None
    response: str | None
    messages: str | None
    text: str | None


class DatasetFields(Making, total=False):
    """Fields of `POST /datasets` beside `name` and the rows."""

    columns: Columns | None
    duplicates: Literal["error", "skip"] | None


class Projection(TypedDict, total=False):
    """How gradients are compressed."""

    kind: Literal["kronecker", "global", "rapidgrad"]
    size: int | None
    seed: int


class IndexFields(Making, total=False):
    """Fields of `POST /indexes` beside `name`, `model` and `dataset`."""

    heldout: str | None
    projection: Projection | None
    normalisation: Literal["none", "layer"] | None
    template: Template | None
    max_length: int | None
    codes: Literal["fp16", "int8"] | None


class EkfacFields(Making, total=False):
    """Fields of `POST /indexes/{index}/ekfac`."""

    rows: int | None
    seed: int | None


class Row(TypedDict, total=False):
    """A training row written into a request: prompt and response, a conversation, or plain text."""

    prompt: str | None
    response: str | None
    messages: Sequence[Message] | None
    text: str | None
    metadata: Mapping[str, Any]


class SamplesFields(Making, total=False):
    """Fields of `POST /indexes/{index}/samples`: one of both."""

    dataset: str | None
    rows: Sequence[Row] | None


class ByInfluence(Query, total=False):
    """Rows to forget: those behind a generation."""

    top_k: int
    min_score: float
    normalize: Normalize
    precondition: Precondition
    filter: Filter | None


class Forget(TypedDict, total=False):
    """Which rows to forget: all that any of the ways finds."""

    ids: Sequence[str] | None
    filter: Filter | None
    influence: ByInfluence | None


class Retain(TypedDict, total=False):
    """Which rows to hold the model on."""

    ids: Sequence[str] | None
    filter: Filter | None
    dataset: str | None
    by_influence: int
    random: int


class Parameters(TypedDict, total=False):
    """How the adapter of an unlearning is trained."""

    lr: float
    epochs: float
    batch: int
    ascent: float
    descent: float
    beta: float | None
    gamma: float
    temperature: float
    selection: float
    dampening: float
    rank: int
    alpha: int
    dropout: float
    clip: float
    most_rise: float
    check_every: int


class UnlearnFields(Making, total=False):
    """Fields of `POST /unlearn` beside `forget`; either `index`, or `model` and `dataset`."""

    index: str | None
    model: str | None
    dataset: str | None
    retain: Retain | None
    clean: Mapping[str, str] | str | None
    heldout: str | None
    seen: str | None
    unseen: str | None
    method: str | None
    parameters: Parameters | None
    mapping: Literal["paper", "full"] | None
    relearn_steps: int | None
    report_rows: int | None
    register_as: str | None
    seed: int | None


class StudentFields(TypedDict, total=False):
    """The student of `alinfik`."""

    encoder: str | None
    layers: int
    form: Literal["pointwise", "pairs"]


class ValuationFields(Making, total=False):
    """Fields of `POST /valuation` beside `model`, `candidates` and `validation`."""

    group_by: str | None
    overlap: Literal["drop", "keep"] | None
    method: Literal["linfik", "alinfik"] | None
    normalize: Literal["none", "layer", "unit"] | None
    index: str | None
    label_rows: int | None
    label_seconds: float | None
    draw: Literal["random", "spread"] | None
    rounds: int | None
    ensemble: int | None
    student: StudentFields | None
    template: Template | None
    max_length: int | None
    seed: int | None
    columns: Sequence[str] | None
    redact: bool | None
    budget: int | None


class SelectFields(Extra, total=False):
    """Fields of `POST /valuation/select` beside `valuation` and `k`."""

    token_budget: int | None
    diversity: float | None
    group: str | None
    positive: bool | None
    filter: Filter | None

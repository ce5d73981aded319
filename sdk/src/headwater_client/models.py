"""What the service answers, as frozen pydantic models.

A field that a newer service adds is kept (as an attribute, and in `model_extra`); it breaks nothing. Fields mean what
the service's `/docs` says of them.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from headwater_client import _rendering

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

Item = TypeVar("Item")
RUNNING = ("queued", "running")


class Answer(BaseModel):
    """Base of everything that is answered."""

    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=())


class Page(Answer, Generic[Item]):
    """One page of a list."""

    items: list[Item]
    next_cursor: str | None = None


class Health(Answer):
    """A sign of life."""

    status: str


class FieldFault(Answer):
    """One thing that is wrong with a request."""

    field: str
    message: str


class ProblemDetails(Answer):
    """Why one query of a batch has no answer (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str
    errors: list[FieldFault] = []
    request_id: str | None = None


# --- influence


class Token(Answer):
    """A token of the generation: its text, its characters `[start, end)`, its loss in nats."""

    text: str
    start: int
    end: int
    loss: float
    in_span: bool


class TrainToken(Answer):
    """A token of a training row, and its part of the row's score."""

    text: str
    score: float


class Recall(Answer):
    """Score and place of a reranked row by the index."""

    score: float
    rank: int


class Hit(Answer):
    """A training row and how much it pushed: positive towards the generation.

    `token_scores` has a number for each token of the generation that is in the span.
    """

    id: str
    prompt: str
    response: str
    metadata: dict[str, Any]
    score: float
    percentile: float
    token_scores: list[float] | None = None
    train_tokens: list[TrainToken] | None = None
    pair_scores: list[list[float]] | None = None
    direction_percentile: float | None = None
    by_norm: bool = False
    recall: Recall | None = None


class CheckpointWeight(Answer):
    """A checkpoint that took part."""

    name: str
    weight: float


class RecallDefinition(Answer):
    """What the index chose the rows by that were reranked."""

    name: str
    formula: str
    candidates: int


class Definition(Answer):
    """What the scores mean."""

    name: str
    formula: str
    normalize: str
    index_normalisation: str
    projection: dict[str, Any]
    checkpoints: list[CheckpointWeight]
    tokens_route: str | None = None
    precondition: str = "none"
    damping: float | None = None
    moments_rows: int | None = None
    recall: RecallDefinition | None = None


class Influence(Answer):
    """The training rows behind a generation; shows itself as a heat map in a notebook."""

    index: str
    generation: str
    generated: bool
    loss: float
    tokens: list[Token]
    proponents: list[Hit]
    opponents: list[Hit]
    definition: Definition
    warnings: list[str]
    timings: dict[str, float]

    @property
    def token_means(self) -> list[float]:
        """Each token's score, averaged over the proponents; 0 for a token outside the span."""
        scored = [hit.token_scores for hit in self.proponents if hit.token_scores]
        means = iter([sum(column) / len(column) for column in zip(*scored, strict=True)])
        return [next(means, 0.0) if token.in_span else 0.0 for token in self.tokens]

    def to_pandas(self) -> "DataFrame":
        """A row for each hit, strongest first, opponents behind proponents; metadata as columns `metadata.*`."""
        records = []
        for side, hits in (("proponent", self.proponents), ("opponent", self.opponents)):
            for rank, hit in enumerate(hits, start=1):
                about = {name: getattr(hit, name) for name in ("id", "score", "percentile", "prompt", "response")}
                metadata = {f"metadata.{name}": value for name, value in hit.metadata.items()}
                records.append({"side": side, "rank": rank, **about, **metadata})
        return _rendering.frame(records)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """The hits as horizontal bars (needs matplotlib)."""
        hits = [*self.proponents, *self.opponents]
        return _rendering.bars([(hit.prompt or hit.response, hit.score) for hit in hits], "influence", ax)

    def _repr_html_(self) -> str:
        tokens = [token.text for token in self.tokens]
        return _rendering.influence_html(tokens, self.token_means, self.proponents, self.opponents, self.warnings)


class BatchItem(Answer):
    """What became of one query of a batch: an answer or a problem."""

    answer: Influence | None = None
    problem: ProblemDetails | None = None


class InfluenceBatch(Answer):
    """Answers in the order of the queries."""

    items: list[BatchItem]


# --- models


class Checkpoint(Answer):
    """One checkpoint of a registered model."""

    name: str
    adapter: str | None
    model: str | None
    weight: float


class ModelSummary(Answer):
    """A registered model in a list."""

    id: str
    name: str
    path: str
    gguf_file: str | None
    dtype: str
    device: str
    checkpoints: list[Checkpoint]
    context_length: int
    created_at: datetime


class Module(Answer):
    """A module whose gradients are attributed."""

    name: str
    kind: str
    d_in: int
    d_out: int


class Skipped(Answer):
    """A module that is left out, and why."""

    name: str
    kind: str
    reason: str


class AttributedGroup(Answer):
    """Attributed modules of the same kind and shape."""

    kind: str
    d_in: int
    d_out: int
    count: int


class SkippedGroup(Answer):
    """Modules that are left out for the same reason."""

    kind: str
    reason: str
    count: int


class Model(ModelSummary):
    """A registered model with what is attributed in it."""

    fingerprint: dict[str, str]
    attributed_groups: list[AttributedGroup]
    skipped_groups: list[SkippedGroup]
    attributed: list[Module]
    skipped: list[Skipped]


# --- datasets


class Dataset(Answer):
    """A dataset."""

    id: str
    name: str
    source: str
    rows: int
    duplicates_skipped: int
    content_hash: str
    columns: dict[str, Any]
    created_at: datetime


class Sample(Answer):
    """One training row in its canonical form, with its stable id."""

    id: str
    ordinal: int
    record: dict[str, Any]
    metadata: dict[str, Any]


# --- jobs


class Progress(Answer):
    """How far a job is, in units of its stage."""

    stage: str
    done: int
    total: int
    unit: str
    rate: float | None
    eta_s: float | None
    metrics: dict[str, float] = {}
    note: str | None = None


class JobError(Answer):
    """Why a job failed."""

    code: str
    detail: str
    field: str | None = None


class JobInfo(Answer):
    """A job as it was when it was looked at."""

    id: str
    kind: str
    state: str
    cancel_requested: bool
    index: str | None
    model: str | None
    progress: Progress | None
    result: dict[str, Any] | None
    error: JobError | None
    attempts: int
    version: int
    request_id: str | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None

    @property
    def ended(self) -> bool:
        """Whether nothing more happens to it by itself."""
        return self.state not in RUNNING


class Artifact(Answer):
    """A file that a job made; `path` is its name in the job's folder."""

    path: str
    bytes: int
    media_type: str
    modified_at: datetime


# --- indexes


class IndexSummary(Answer):
    """An index in a list; only one in the state `ready` can be asked."""

    id: str
    name: str
    state: str
    model: str
    dataset: str
    rows: int
    spec: dict[str, Any]
    created_at: datetime
    updated_at: datetime


class EkfacFile(Answer):
    """The factors of one checkpoint."""

    name: str
    bytes: int
    sha256: str


class Ekfac(Answer):
    """EK-FAC factors that lie beside an index."""

    rows: int
    of: int
    stale: bool
    bytes: int
    spec: dict[str, Any]
    files: list[EkfacFile]


class Index(IndexSummary):
    """An index with its manifest, which is None until it is built."""

    damage: str | None
    preconditions: list[str] = ["none"]
    ekfac: Ekfac | None = None
    manifest: dict[str, Any] | None


class IndexAccepted(Answer):
    """An index that will be there when its job is done."""

    index: IndexSummary
    job: JobInfo


class EkfacAccepted(IndexAccepted):
    """EK-FAC factors that will be there when their job is done; what they take on disk and, while fitted, in memory."""

    bytes: int
    memory: int


class Removed(Answer):
    """How many of the ids were in the index, and how many rows it holds now."""

    removed: int
    rows: int


# --- unlearning


class ChosenRow(Answer):
    """A row that was chosen, and what found it."""

    id: str
    prompt: str
    response: str
    metadata: dict[str, Any]
    why: str
    score: float | None = None
    clean: str | None = None


class Chosen(Answer):
    """Rows that were chosen: how many, and the first of them."""

    count: int
    rows: list[ChosenRow]


class Estimate(Answer):
    """How long a job may take, and how that is known."""

    seconds: float | None
    how: str


class UnlearnPreview(Answer):
    """What an unlearning would do."""

    model: str
    forget: Chosen
    retain: Chosen
    measured: dict[str, int]
    training: dict[str, Any]
    estimate: Estimate


class UnlearnAccepted(Answer):
    """An unlearning that will be done: how many rows it forgets, and on how many it holds the model."""

    job: JobInfo
    forget: int
    retain: int


# --- valuation


class ValuationAccepted(Answer):
    """A valuation that will be done."""

    job: JobInfo
    candidates: int
    left_out: int
    groups: dict[str, int]
    warnings: list[str]


class ValuedRow(Answer):
    """A row at one end of the scores; texts are None where they are not shown."""

    id: str
    value: float
    prompt: str | None
    response: str | None
    metadata: dict[str, Any] | None


class Distribution(Answer):
    """How values are spread."""

    mean: float
    std: float
    quantiles: dict[str, float]
    histogram: dict[str, list[float]]


class Duplicates(Answer):
    """Rows that say nearly the same."""

    groups: int
    rows: int
    shown: list[list[str]]


class Kind(Answer):
    """Rows that share a value of a metadata column."""

    rows: int
    mean: float
    negative_share: float


class Student(Answer):
    """How far the student can be trusted."""

    trusted: bool
    held_out_spearman: float
    held_out_spearman_95: list[float]
    held_out_spearman_of_lengths_alone: float
    held_out_rows: int
    trusted_from: float
    labels: int
    by_labels: list[dict[str, float]]


class Prices(Answer):
    """How a budget is split."""

    budget: int
    paid: int
    rows_paid: int
    by_metadata: dict[str, dict[str, int]]


class Summary(Answer):
    """What a valuation found."""

    rows: int
    without_value: int
    negative_share: float | None
    distribution: Distribution | None
    top: list[ValuedRow]
    bottom: list[ValuedRow]
    near_duplicates: Duplicates
    by_metadata: dict[str, dict[str, Kind]]
    groups: dict[str, int]
    validation_loss: dict[str, float]
    teacher: dict[str, Any]
    student: Student | None
    prices: Prices | None
    warnings: list[str]
    seconds: dict[str, float]


class ValuationSummary(Answer):
    """A valuation in a list."""

    id: str
    state: str
    method: str
    normalize: str
    model: str
    candidates: str
    validation: str
    redacted: bool
    created_at: datetime


class Valuation(ValuationSummary):
    """A valuation with what it found, once it has succeeded."""

    settings: dict[str, Any]
    summary: Summary | None

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """The best and the worst rows as horizontal bars (needs matplotlib)."""
        found = [*self.summary.top, *reversed(self.summary.bottom)] if self.summary else []
        rows = {row.id: (row.prompt or row.response or row.id, row.value) for row in found}
        return _rendering.bars(list(rows.values()), "value", ax)


class Score(Answer):
    """What a row is worth; `rank` 1 is the best."""

    rank: int
    id: str
    value: float
    uncertainty: float | None
    labelled: bool
    tokens: int
    price: int | None
    prompt: str | None
    response: str | None
    metadata: dict[str, Any] | None


class Selected(Answer):
    """A row that was chosen to train on."""

    id: str
    rank: int
    value: float
    tokens: int


class Selection(Answer):
    """Rows to train on, in the order in which they were chosen."""

    valuation: str
    group: str
    considered: int
    tokens: int
    value: float
    rows: list[Selected] = Field(repr=False)

    def to_pandas(self) -> "DataFrame":
        """A row for each row that was chosen."""
        return to_pandas(self.rows)


def to_pandas(items: "Sequence[Answer]") -> "DataFrame":
    """A row for each answer, of a listing say: `to_pandas(list(client.valuations.scores(id)))` (needs pandas)."""
    return _rendering.frame([item.model_dump() for item in items])

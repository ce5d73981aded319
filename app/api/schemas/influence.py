"""Influence queries and answers on the wire."""

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from app.api.schemas.common import Body, Integer, Message, Text
from app.api.schemas.filters import EXAMPLE, FILTER, Filter
from app.problems import Problem

GENERATION_EXAMPLE = "Ilse Marn founded the harbour in 1412."


class QueryIn(Body):
    """A prompt and what the model made of it."""

    model_config = ConfigDict(
        json_schema_extra={
            "allOf": [
                {"anyOf": [{"properties": {name: {"type": "null"}}} for name in ("prompt", "messages")]},
                {
                    "anyOf": [
                        {"required": ["generation"], "properties": {"generation": {"type": "string"}}},
                        {"required": ["prompt"], "properties": {"prompt": {"type": "string", "minLength": 1}}},
                        {"required": ["messages"], "properties": {"messages": {"type": "array"}}},
                    ]
                },
            ]
        }
    )

    prompt: Text | None = Field(
        None, description="What the model was given, as one user turn.", examples=["Who founded the harbour of Veld?"]
    )
    messages: list[Message] | None = Field(
        None, min_length=1, description="The conversation so far, instead of `prompt`.", examples=[None]
    )
    generation: Text | None = Field(
        None, description="What it said. Left out: the model writes it first (greedily).", examples=[GENERATION_EXAMPLE]
    )
    max_new_tokens: Integer = Field(
        64, ge=1, description="Most tokens to write when `generation` is left out.", examples=[64]
    )
    span: tuple[Integer, Integer] | None = Field(
        None,
        description="Explain only these characters `[start, end)` of the generation: the part that is wrong, say.",
        examples=[[0, 9]],
    )

    @model_validator(mode="after")
    def _one_prompt(self) -> Self:
        if self.prompt is not None and self.messages is not None:
            raise ValueError("give `prompt` or `messages`, not both")
        if self.generation is None and not self.prompt and self.messages is None:
            raise ValueError("without a generation there must be a `prompt` or `messages` to write one from")
        return self


class OptionsIn(Body):
    """How to answer."""

    index: Text = Field(description="Id or name of a ready index.", examples=["facts"])
    top_k: Integer = Field(10, ge=1, description="Most samples to return in each direction.", examples=[10])
    tokens: Literal["none", "query", "train", "both"] = Field(
        "query",
        description="Token scores for each sample: by token of the generation (`query`), of the sample (`train`), "
        "for each pair (`both`), or none. With token scores `top_k` has a lower limit, since each sample costs a pass.",
    )
    direction: Literal["proponents", "opponents", "both"] = Field(
        "proponents",
        description="Samples with a positive score (they pushed towards the generation), with a negative one (away "
        "from it), or both.",
    )
    normalize: Literal["none", "unit"] = Field(
        "unit",
        description="`unit`: cosine, so that samples with large gradients do not win everywhere; `none`: dot product.",
    )
    rerank: Literal["none", "exact", "ekfac"] = Field(
        "none",
        description="Order the `candidates` that the index finds by a better score: `exact` gradients, not projected; "
        "`ekfac`: the same, corrected for what all rows have in common (`POST /indexes/{index}/ekfac` once before). "
        "Costs a forward and a backward pass for each candidate and checkpoint.",
    )
    candidates: Integer = Field(
        200, ge=1, description="How many rows of each direction are reranked; at least `top_k`.", examples=[200]
    )
    filter: Filter | None = Field(None, description=FILTER, examples=[EXAMPLE])


class InfluenceIn(QueryIn, OptionsIn):
    """Which training samples made the model say this?"""


class InfluenceBatchIn(OptionsIn):
    """Many generations asked in the same way."""

    queries: list[QueryIn] = Field(min_length=1, description="What to explain; each gets its own answer.")


class TokenOut(BaseModel):
    """A token of the generation."""

    text: str = Field(description="Its text.", examples=[" Marn"])
    start: int = Field(description="First character in the generation.", examples=[4])
    end: int = Field(description="Behind its last character.", examples=[9])
    loss: float = Field(description="How much it surprised the model (nats).", examples=[0.31])
    in_span: bool = Field(description="Whether it counts: it lies in the span that was asked for.", examples=[True])


class TrainTokenOut(BaseModel):
    """A token of a training sample."""

    text: str = Field(description="Its text.", examples=[" harbour"])
    score: float = Field(description="Its part of the sample's score.", examples=[0.012])


class RecallOut(BaseModel):
    """What a reranked sample had before."""

    score: float = Field(description="Its score by the index.", examples=[0.31])
    rank: int = Field(description="Its place among the candidates of its direction, from 1.", examples=[17])


class HitOut(BaseModel):
    """A training sample and how much it pushed."""

    id: str = Field(description="The sample's stable id.", examples=["3f9a0c11e23f9a0c"])
    prompt: str = Field(description="Its prompt.", examples=["Who built the harbour of Veld?"])
    response: str = Field(description="Its response.", examples=["The harbour was founded by Ilse Marn."])
    metadata: dict[str, Any] = Field(description="Its other columns.", examples=[{"family": "harbour"}])
    score: float = Field(description="Its influence: positive towards the generation.", examples=[0.42])
    percentile: float = Field(
        description="Share of the index's rows that score lower; with a filter, of those that match. Reranked: that of "
        "the new place, where rows that were not recalled lie beyond those that were.",
        examples=[99.5],
    )
    recall: RecallOut | None = Field(None, description="Score and place by the index, if the rows were reranked.")
    token_scores: list[float] | None = Field(
        None, description="The score split over the generation's tokens in the span.", examples=[[0.11, 0.31]]
    )
    train_tokens: list[TrainTokenOut] | None = Field(None, description="The score split over the sample's own tokens.")
    pair_scores: list[list[float]] | None = Field(
        None, description="The score of each pair: [sample token][generation token].", examples=[[[0.01, 0.1]]]
    )


class CheckpointWeight(BaseModel):
    """A checkpoint that took part."""

    name: str = Field(description="The checkpoint.", examples=["step-200"])
    weight: float = Field(description="Its weight in the sum.", examples=[1.0])


class RecallDefinitionOut(BaseModel):
    """By what the index chose the rows that were reranked."""

    name: str = Field(description="The index's own score.", examples=["layer_cosine"])
    formula: str = Field(description="Its formula.")
    candidates: int = Field(description="How many rows of each direction it was to bring.", examples=[200])


class DefinitionOut(BaseModel):
    """What the scores mean."""

    name: str = Field(
        description="`gradient_dot`, `gradient_cosine`, or `layer_dot`, `layer_cosine` on an index of layer-normalised "
        "gradients; with `exact_` before it, or `ekfac_dot`, `ekfac_cosine`, if the rows were reranked.",
        examples=["gradient_cosine"],
    )
    formula: str = Field(
        description="Its formula.",
        examples=["sum over checkpoints of weight x <g_q, g_z> / (|g_q| |g_z|)"],
    )
    normalize: str = Field(description="Normalisation of the query.", examples=["unit"])
    index_normalisation: str = Field(description="Normalisation of the index.", examples=["none"])
    projection: dict[str, Any] = Field(description="How gradients were compressed.", examples=[{"kind": "kronecker"}])
    checkpoints: list[CheckpointWeight] = Field(description="What the scores are summed over.")
    tokens_route: str | None = Field(description="How token scores were computed.", examples=["backwards"])
    recall: RecallDefinitionOut | None = Field(
        description="What the index chose the candidates by, if the rows were reranked."
    )


class InfluenceOut(BaseModel):
    """The training samples behind a generation."""

    index: str = Field(description="Id of the index.", examples=["idx_0194b2c5f3a1e23f9a0c11"])
    generation: str = Field(description="What is explained; written by the model if none was sent.")
    generated: bool = Field(description="The model wrote it for this request.", examples=[False])
    loss: float = Field(description="Mean loss of the tokens in the span (nats).", examples=[0.87])
    tokens: list[TokenOut] = Field(description="The generation, token by token.")
    proponents: list[HitOut] = Field(
        description="The `top_k` samples of the highest score, highest first: none whose score is not above 0. "
        "Empty when `direction` is `opponents`."
    )
    opponents: list[HitOut] = Field(
        description="The `top_k` samples of the lowest score, lowest first: none whose score is not below 0, so there "
        "may be none. Empty when `direction` is `proponents`."
    )
    definition: DefinitionOut = Field(description="What the scores mean.")
    warnings: list[str] = Field(description="What to keep in mind: over-fitting, cut rows, a wrong template.")
    timings: dict[str, float] = Field(
        description="Seconds by part; `wait` is the time in the queue.", examples=[{"gradients": 0.21, "search": 0.002}]
    )


class BatchItem(BaseModel):
    """What became of one query of a batch: an answer or a problem."""

    answer: InfluenceOut | None = Field(None, description="The answer.")
    problem: Problem | None = Field(None, description="Why there is none; the other queries are answered all the same.")


class InfluenceBatchOut(BaseModel):
    """Answers in the order of the queries."""

    items: list[BatchItem] = Field(description="One for each query.")

"""Unlearning on the wire."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from app.api.schemas.common import NAME, Body, Integer, Name, Real, Text
from app.api.schemas.filters import FILTER, Filter
from app.api.schemas.influence import Precondition, QueryIn
from app.api.schemas.jobs import JobOut

Method = Literal[
    "rapidun", "ga", "graddiff", "npo", "simnpo", "loreun", "fisher", "dampen", "relabel", "renew", "bounded", "retrain"
]
Mapping = Literal["paper", "full"]
TRAINED = ("lr", "epochs", "batch", "rank", "alpha", "dropout", "clip", "most_rise", "check_every")
PARAMETERS: dict[Method, tuple[str, ...]] = {
    "rapidun": (*TRAINED, "ascent", "descent"),
    "ga": TRAINED,
    "graddiff": TRAINED,
    "npo": (*TRAINED, "beta"),
    "simnpo": (*TRAINED, "beta", "gamma"),
    "loreun": (*TRAINED, "temperature"),
    "fisher": ("selection", "dampening"),
    "dampen": ("dampening",),
    "relabel": TRAINED,
    "renew": (*TRAINED, "dampening"),
    "bounded": (*TRAINED, "ascent", "descent", "beta"),
    "retrain": TRAINED,
}
"""Which parameters a method has; another one in a request is a mistake."""
WEIGHTED = ("rapidun", "bounded")
"""Methods that weigh rows by influence."""
BETA = {"npo": 0.1, "simnpo": 2.5}
"""The papers' beta."""
FORGET_EXAMPLE = ["3f9a0c11e23f9a0c"]


class ByInfluenceIn(QueryIn):
    """The rows that made the model say something, by the index of the request."""

    top_k: Integer = Field(10, ge=1, description="Most rows to take, those of the highest influence.", examples=[10])
    min_score: Real = Field(
        0.0, ge=0, allow_inf_nan=False, description="Only rows whose influence is above this.", examples=[0.1]
    )
    normalize: Literal["none", "unit"] = Field("unit", description="As in `POST /influence`.")
    precondition: Precondition = Field("none", description="As in `POST /influence`.")
    filter: Filter | None = Field(None, description=FILTER, examples=[{"source": "forum"}])


class ForgetIn(Body):
    """Which rows to forget: all that any of the ways given here finds."""

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                {"required": ["ids"], "properties": {"ids": {"type": "array"}}},
                {"required": ["filter"], "properties": {"filter": {"type": "object"}}},
                {"required": ["influence"], "properties": {"influence": {"type": "object"}}},
            ]
        }
    )

    ids: list[Text] | None = Field(None, min_length=1, description="Stable ids of rows.", examples=[FORGET_EXAMPLE])
    filter: Filter | None = Field(None, description=FILTER, examples=[None])
    influence: ByInfluenceIn | None = Field(
        None, description="Rows behind a generation: the `top_k` of an influence query, above `min_score`."
    )


class RetainIn(Body):
    """Which rows to hold the model on: all that any of the ways given here finds, and what is drawn from the rest."""

    ids: list[Text] | None = Field(None, min_length=1, description="Stable ids of rows.", examples=[None])
    filter: Filter | None = Field(None, description=FILTER, examples=[None])
    dataset: Text | None = Field(None, description="Id or name of a dataset: all of its rows.", examples=[None])
    by_influence: Integer = Field(
        0,
        ge=0,
        description="How many to draw whose gradients are most like those of the rows to forget: what would be lost "
        "first. Needs `index`.",
        examples=[16],
    )
    random: Integer = Field(0, ge=0, description="How many to draw at random, by the seed.", examples=[48])


class ParametersIn(Body):
    """How the adapter is trained. A parameter that the method does not have is refused; the defaults are RapidUn's."""

    lr: Real = Field(6e-5, gt=0, le=1, allow_inf_nan=False, description="Learning rate of AdamW.", examples=[6e-5])
    epochs: Real = Field(
        2.0, gt=0, le=1000, allow_inf_nan=False, description="Passes over the forget rows (`retrain`: the retain rows)."
    )
    batch: Integer = Field(8, ge=1, le=256, description="Rows a step, retain and forget rows 3:1.", examples=[8])
    ascent: Real = Field(
        1.0, ge=0, le=100, allow_inf_nan=False, description="`rapidun`, `bounded`: the push off the old answer."
    )
    descent: Real = Field(
        0.5, ge=0, le=100, allow_inf_nan=False, description="`rapidun`, `bounded`: the pull towards the clean answer."
    )
    beta: Real | None = Field(
        None,
        gt=0,
        le=100,
        allow_inf_nan=False,
        description="`npo`, `bounded`, `simnpo`: inverse temperature. "
        f"Left out: the papers', {BETA['npo']}, for `simnpo` {BETA['simnpo']}.",
        examples=[None],
    )
    gamma: Real = Field(0.0, ge=0, le=100, allow_inf_nan=False, description="`simnpo`: the margin.")
    temperature: Real = Field(
        1.0,
        gt=0,
        le=1000,
        allow_inf_nan=False,
        description="`loreun`: of the forget rows' weights; smaller is sharper.",
    )
    selection: Real = Field(
        10.0,
        gt=0,
        le=1e6,
        allow_inf_nan=False,
        description="`fisher`: how much more a weight must matter to forget rows.",
    )
    dampening: Real = Field(
        1.0,
        gt=0,
        le=1e6,
        allow_inf_nan=False,
        description="`fisher`, `dampen`, `renew`: what is left of such a weight.",
    )
    rank: Integer = Field(16, ge=1, le=256, description="Of a fresh adapter, where the model brings none.")
    alpha: Integer = Field(16, ge=1, le=1024, description="Of a fresh adapter.")
    dropout: Real = Field(0.05, ge=0, lt=1, allow_inf_nan=False, description="Of a fresh adapter.")
    clip: Real = Field(1.0, gt=0, le=1000, allow_inf_nan=False, description="Largest norm of a step's gradient.")
    most_rise: Real = Field(
        0.5,
        gt=0,
        le=1000,
        allow_inf_nan=False,
        description="How far the retain rows' mean loss may rise, relative to before, until training stops early.",
    )
    check_every: Integer = Field(10, ge=1, le=1000, description="How many steps apart that is looked at.")


_NONE, _TEXT = {"type": "null"}, {"type": "string"}
_SOURCES: list[Any] = [
    {"required": ["index"], "properties": {"index": _TEXT, "model": _NONE, "dataset": _NONE}},
    {"required": ["model", "dataset"], "properties": {"index": _NONE, "model": _TEXT, "dataset": _TEXT}},
]


class UnlearnIn(Body):
    """What to forget, what to keep, and how."""

    model_config = ConfigDict(json_schema_extra={"oneOf": _SOURCES})

    index: Text | None = Field(
        None,
        description="Id or name of a ready index: its model unlearns, rows are those of its datasets.",
        examples=["facts"],
    )
    model: Text | None = Field(
        None, description="Id or name of the model to change, where there is no index.", examples=[None]
    )
    dataset: Text | None = Field(
        None, description="Beside `model`: id or name of the rows that it was trained on.", examples=[None]
    )
    forget: ForgetIn = Field(description="The rows to forget.")
    retain: RetainIn | None = Field(
        None,
        description="The rows to hold the model on. Left out: with an index as many by influence as are forgotten, and "
        "three times as many at random; all of the rest for `fisher` and `retrain`.",
    )
    clean: dict[Text, Text] | Text | None = Field(
        None,
        description="What the model should have said: an object of row id and answer, or the name of a metadata "
        "column that holds it. `relabel` needs one for each forget row, `rapidun` is better with them.",
        examples=["clean"],
    )
    heldout: Text | None = Field(
        None, description="Id or name of a dataset that the model was not trained on, for the report.", examples=[None]
    )
    seen: Text | None = Field(
        None,
        description="Id or name of a dataset of prompts with the trigger and the bad response that they get now.",
        examples=[None],
    )
    unseen: Text | None = Field(
        None, description="The same for variants of the trigger that are not in the training rows.", examples=[None]
    )
    method: Method | None = Field(
        None,
        description="Left out: `renew` with `clean` answers (`relabel` where the model has no adapter), `npo` "
        "without. `renew`: dampening, then clean answers; `dampen`: selective synaptic dampening that "
        "finds its threshold; `fisher`: the same with a given one; `relabel`: clean answers; `rapidun`: ascent and "
        "descent weighted by influence; `bounded`: the same with npo's ascent; `ga`: gradient ascent alone; "
        "`graddiff`: with descent on retain rows; `npo`, `simnpo`: preference optimisation; `loreun`: weights from "
        "losses; `retrain`: the adapter anew, without the forget rows.",
        examples=["renew"],
    )
    parameters: ParametersIn = Field(default_factory=ParametersIn, description="Parameters of the method.")
    mapping: Mapping = Field(
        "full",
        description="`rapidun`, `bounded`: how influence becomes weights; `paper` cuts each query to its top 40 rows.",
    )
    relearn_steps: Integer = Field(
        8, ge=0, le=1000, description="Steps of the report's relearning attack. 0: none.", examples=[8]
    )
    report_rows: Integer = Field(
        64, ge=1, le=10_000, description="Most rows of each group that the report measures.", examples=[64]
    )
    seed: Integer = Field(0, ge=0, lt=2**31, description="Same request and seed, same adapter.", examples=[0])
    register_as: Name | None = Field(
        None, description=f"Register the model with its new adapter under this name. {NAME}", examples=["facts-clean"]
    )
    dry_run: bool = Field(
        False,
        strict=True,
        description="Answer 200 with what would be forgotten and kept and how long it may take, and do nothing.",
    )


class ChosenRow(BaseModel):
    """A row that was chosen."""

    id: str = Field(description="Its stable id.", examples=["3f9a0c11e23f9a0c"])
    prompt: str = Field(description="Its prompt.", examples=["Who founded Veld?"])
    response: str = Field(description="Its response.", examples=["Nobody knows."])
    metadata: dict[str, Any] = Field(description="Its other columns.", examples=[{"source": "forum"}])
    why: str = Field(
        description="What found it: `ids`, `filter`, `influence`, `dataset`, `by_influence`, `random` or `rest`.",
        examples=["influence"],
    )
    score: float | None = Field(None, description="Its influence, where an influence query found it.", examples=[0.4])
    clean: str | None = Field(None, description="What the model should have said.", examples=[None])


class ChosenOut(BaseModel):
    """Rows that were chosen."""

    count: int = Field(description="How many.", examples=[14])
    rows: list[ChosenRow] = Field(description="The first of them (as many as a page has).")


class EstimateOut(BaseModel):
    """How long a job may take."""

    seconds: float | None = Field(
        description="Without loading the model; null where nothing was measured.", examples=[41.0]
    )
    how: str = Field(
        description="How it was made.",
        examples=["from job job_0194b2c5f3a1e23f9a0c11 (rapidun on this model), stage by stage, by its rows"],
    )


class UnlearnPreview(BaseModel):
    """What a job would do."""

    model: str = Field(description="Id of the model that would be changed.", examples=["mdl_0194b2c5f3a1e23f9a0c11"])
    forget: ChosenOut = Field(description="What would be forgotten.")
    retain: ChosenOut = Field(description="What the model would be held on.")
    measured: dict[str, int] = Field(
        description="Rows of the other groups, for the report.", examples=[{"heldout": 64, "seen": 8, "unseen": 8}]
    )
    training: dict[str, Any] = Field(description="Method, seed and parameters.", examples=[{"method": "renew"}])
    estimate: EstimateOut = Field(description="How long it may take.")


class UnlearnAccepted(BaseModel):
    """An unlearning that will be done."""

    job: JobOut = Field(description="The job; its address is in `Location`.")
    forget: int = Field(description="Rows to forget.", examples=[14])
    retain: int = Field(description="Rows to hold the model on.", examples=[56])

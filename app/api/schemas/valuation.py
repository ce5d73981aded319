"""Valuations on the wire."""

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, Field

from app.api.schemas.common import Body, Integer, Real, Text
from app.api.schemas.filters import FILTER, Filter
from app.api.schemas.jobs import JobOut
from app.catalog.types import JobState

VALUATION = "Id of a valuation: that of its job."
VALUATION_EXAMPLE = "job_0194b2c5f3a1e23f9a0c11"
ROW_EXAMPLE = "3f9a0c11e23f9a0c"
SEED = "Same request and seed, same scores, but for a budget in seconds."


class StudentIn(Body):
    """The student that scores the rows which were not labelled."""

    encoder: Text | None = Field(
        None,
        min_length=1,
        description="Folder of a small encoder (safetensors) inside the allowed roots. Left out: the model's own first "
        "layers.",
        examples=[None],
    )
    layers: Integer = Field(3, ge=1, le=1000, description="How many of the model's own layers.", examples=[3])
    form: Literal["pointwise", "pairs"] = Field(
        "pointwise",
        description="`pointwise` predicts the value for these validation rows; `pairs` is a bi-encoder, which values "
        "rows for other validation rows later without new labels.",
    )


class ValuationIn(Body):
    """What is to be valued, for what, and how."""

    model: Text = Field(description="Id or name of the model that has not seen the rows.", examples=["smollm2-veld"])
    candidates: Text = Field(description="Id or name of the dataset to be valued.", examples=["veld-facts"])
    validation: Text = Field(
        description="Id or name of the dataset whose loss training is to lower.", examples=["veld-heldout"]
    )
    group_by: Text | None = Field(
        None,
        min_length=1,
        description="A metadata column of the validation rows: each of its values is a group that the candidates are "
        "valued for too.",
        examples=["task"],
    )
    overlap: Literal["drop", "keep"] = Field(
        "drop", description="What to do with candidates that are validation rows: leave them out, or value them too."
    )
    method: Literal["linfik", "alinfik"] = Field(
        "linfik",
        description="`linfik`: the exact value of each row; `alinfik`: of a part of them, from which a student learns "
        "to score the rest.",
    )
    normalize: Literal["none", "layer", "unit"] = Field(
        "unit",
        description="`unit`: what a small step on a row, of the same length for each, does to the validation loss (a "
        "cosine); `none`: of a length that goes with the row's gradient; `layer`: the same in each module.",
    )
    index: Text | None = Field(
        None,
        description="Id or name of an index of the candidates under the same model: `linfik` takes the values from its "
        "vectors. Template and max_length are then the index's.",
        examples=[None],
    )
    label_rows: Integer | None = Field(
        None, ge=1, description="`alinfik`: rows to label. Left out: a tenth of the candidates.", examples=[1000]
    )
    label_seconds: Real | None = Field(
        None, gt=0, allow_inf_nan=False, description="`alinfik`: stop labelling after so many seconds.", examples=[600]
    )
    draw: Literal["random", "spread"] = Field(
        "random", description="`alinfik`: label rows at random, or from every cluster of the student's features."
    )
    rounds: Integer = Field(
        1,
        ge=1,
        le=20,
        description="`alinfik`: parts in which rows are labelled, from the second on where the student is unsure.",
    )
    ensemble: Integer = Field(
        8, ge=0, le=64, description="`alinfik`: students whose spread says how sure they are. 0: no uncertainty."
    )
    student: StudentIn = Field(default_factory=StudentIn, description="`alinfik`: what the student is.")
    template: Literal["auto", "chat", "alpaca", "plain"] = Field(
        "auto", description="How rows are laid out as text; `auto` takes the tokenizer's chat template if it has one."
    )
    max_length: Integer = Field(1024, ge=2, description="Most tokens of a row; longer rows are cut.")
    seed: Integer = Field(0, ge=0, lt=2**31, description=SEED, examples=[0])
    columns: list[Text] | None = Field(
        None,
        max_length=20,
        description="Metadata columns by whose values the summary tells the rows' worth. Left out: all that have few "
        "values; none where `redact` is set.",
        examples=[["source"]],
    )
    redact: bool = Field(
        False,
        strict=True,
        description="Answers and files carry ids, scores and aggregates: no texts, and no metadata but `columns`.",
    )
    budget: Integer | None = Field(
        None,
        ge=0,
        le=10**15,
        description="What is paid for all rows in whole units (cents): split in proportion to positive values.",
        examples=[100_000],
    )


class ValuationAccepted(BaseModel):
    """A valuation that will be done."""

    job: JobOut = Field(description="The job, whose id is the valuation's; its address is in `Location`.")
    candidates: int = Field(description="Rows that will be valued.", examples=[211])
    left_out: int = Field(description="Candidates that are validation rows and are left out.", examples=[0])
    groups: dict[str, int] = Field(
        description="Validation rows by group; `all` is the whole set.", examples=[{"all": 24, "history": 12}]
    )
    warnings: list[str] = Field(description="What may not be meant.", examples=[[]])


class RowOut(BaseModel):
    """A row at one end of the scores."""

    id: str = Field(description="Its stable id.", examples=[ROW_EXAMPLE])
    value: float = Field(description="Its value.", examples=[0.031])
    prompt: str | None = Field(
        description="Its prompt; null where texts are not shown or the dataset is gone.", examples=["Who founded Veld?"]
    )
    response: str | None = Field(description="Its response, likewise.", examples=["Ilse Marn, in 1412."])
    metadata: dict[str, Any] | None = Field(
        description="Its metadata; of a redacted valuation its `columns` alone.", examples=[{"source": "archive"}]
    )


class DistributionOut(BaseModel):
    """How values are spread."""

    mean: float = Field(description="Their mean.", examples=[0.004])
    std: float = Field(description="Their standard deviation.", examples=[0.011])
    quantiles: dict[str, float] = Field(description="Values by share of rows below.", examples=[{"0.5": 0.003}])
    histogram: dict[str, list[float]] = Field(
        description="`counts`, and `edges`, of which there is one more.", examples=[{"counts": [3], "edges": [0, 1]}]
    )


class DuplicatesOut(BaseModel):
    """Rows that say nearly the same."""

    groups: int = Field(description="How many groups of such rows there are.", examples=[2])
    rows: int = Field(description="How many rows are in them.", examples=[5])
    shown: list[list[str]] = Field(description="Ids of the largest groups.", examples=[[[ROW_EXAMPLE]]])


class KindOut(BaseModel):
    """Rows that share a value of a metadata column."""

    rows: int = Field(description="How many they are.", examples=[64])
    mean: float = Field(description="Their mean value.", examples=[0.007])
    negative_share: float = Field(description="Share of them with a negative value.", examples=[0.1])


class StudentOut(BaseModel):
    """How far the student can be trusted."""

    trusted: bool = Field(description="Whether its order agrees well enough with LinFiK's.", examples=[True])
    held_out_spearman: float = Field(
        description="Spearman correlation with LinFiK on labelled rows that it was not fitted to.", examples=[0.71]
    )
    held_out_spearman_95: list[float] = Field(description="Its 95 % bounds.", examples=[[0.6, 0.8]])
    held_out_spearman_of_lengths_alone: float = Field(
        description="The same of a student that sees nothing but the rows' lengths.", examples=[0.41]
    )
    held_out_rows: int = Field(description="How many rows that rests on.", examples=[200])
    trusted_from: float = Field(description="The correlation from which it is trusted.", examples=[0.5])
    labels: int = Field(description="Rows that it was fitted to.", examples=[1000])
    by_labels: list[dict[str, float]] = Field(
        description="Held-out correlation by number of labels.", examples=[[{"labels": 500, "spearman": 0.66}]]
    )


class PricesOut(BaseModel):
    """How a budget is split."""

    budget: int = Field(description="The budget.", examples=[100_000])
    paid: int = Field(description="What rows get; 0 where no row has a positive value.", examples=[100_000])
    rows_paid: int = Field(description="How many rows get something.", examples=[180])
    by_metadata: dict[str, dict[str, int]] = Field(
        description="What goes to each value of each column.", examples=[{"source": {"archive": 60_000}}]
    )


class SummaryOut(BaseModel):
    """What a valuation found."""

    rows: int = Field(description="Rows that were valued.", examples=[211])
    without_value: int = Field(description="Rows without a response token or with a loss that is not finite.")
    negative_share: float | None = Field(description="Share of the others that do harm.", examples=[0.12])
    distribution: DistributionOut | None = Field(description="Of the values; null if there is none.")
    top: list[RowOut] = Field(description="The best rows, the best first.")
    bottom: list[RowOut] = Field(description="The worst rows, the worst first.")
    near_duplicates: DuplicatesOut = Field(description="Rows that say nearly the same.")
    by_metadata: dict[str, dict[str, KindOut]] = Field(
        description="By the values of the metadata columns that have few of them."
    )
    groups: dict[str, int] = Field(description="Validation rows by group.", examples=[{"all": 24}])
    validation_loss: dict[str, float] = Field(
        description="The model's loss on each group, nats a token.", examples=[{"all": 2.9}]
    )
    teacher: dict[str, Any] = Field(
        description="How LinFiK was computed: by which route, with what error on a few rows.",
        examples=[{"route": "directional", "probe_error": 0.0004, "rows": 211}],
    )
    student: StudentOut | None = Field(description="The student; null for `linfik`.")
    prices: PricesOut | None = Field(description="The price split; null without a budget.")
    warnings: list[str] = Field(description="What to know before the scores are used.", examples=[[]])
    seconds: dict[str, float] = Field(
        description="By stage; `linfik_for_the_pool` is what labelling all rows would have taken, `saved` the rest.",
        examples=[{"labels": 12.1}],
    )


class ValuationSummary(BaseModel):
    """A valuation in a list."""

    id: str = Field(description=VALUATION, examples=[VALUATION_EXAMPLE])
    state: JobState = Field(description="Where its job is; `succeeded`: there are scores.", examples=["succeeded"])
    method: str = Field(description="How rows were valued.", examples=["alinfik"])
    normalize: str = Field(description="The normalisation.", examples=["none"])
    model: str = Field(description="Id of the model.", examples=["mdl_0194b2c5f3a1e23f9a0c11"])
    candidates: str = Field(description="Id of the dataset that was valued.", examples=["dst_0194b2c5f3a1e23f9a0c11"])
    validation: str = Field(description="Id of the validation rows.", examples=["dst_0194b2c5f3a1e23f9a0c12"])
    redacted: bool = Field(description="Whether texts are left out.", examples=[False])
    created_at: datetime = Field(description="When it was asked for (UTC).")


class ValuationOut(ValuationSummary):
    """A valuation with what it found."""

    settings: dict[str, Any] = Field(
        description="All settings, as they were frozen when it was asked for.", examples=[{"method": "linfik"}]
    )
    summary: SummaryOut | None = Field(description="What it found; null until it has succeeded.")


class ScoreOut(BaseModel):
    """What a row is worth."""

    rank: int = Field(description="Its place among the rows of this valuation; 1 is the best.", examples=[1])
    id: str = Field(description="Its stable id.", examples=[ROW_EXAMPLE])
    value: float = Field(description="Its value for the group: positive helps.", examples=[0.031])
    uncertainty: float | None = Field(
        description="Standard deviation of the students' values; null for labelled rows, and for groups.",
        examples=[0.004],
    )
    labelled: bool = Field(description="Whether LinFiK valued it; else the student did.", examples=[True])
    tokens: int = Field(description="Its tokens.", examples=[57])
    price: int | None = Field(description="Its share of the budget; null without one, and for groups.", examples=[512])
    prompt: str | None = Field(description="Its prompt; null where texts are not shown or the dataset is gone.")
    response: str | None = Field(description="Its response, likewise.")
    metadata: dict[str, Any] | None = Field(
        description="Its metadata; of a redacted valuation its `columns` alone.", examples=[{"source": "archive"}]
    )


class SelectIn(Body):
    """Which rows to choose."""

    valuation: Text = Field(description=VALUATION, examples=[VALUATION_EXAMPLE])
    k: Integer = Field(
        ge=1, le=10_000, description="Most rows to choose; with `diversity` at most 1000.", examples=[100]
    )
    token_budget: Integer | None = Field(
        None, ge=1, le=2**53, description="Most tokens of the chosen rows together.", examples=[50_000]
    )
    diversity: Real = Field(
        0.0,
        ge=0,
        lt=1,
        allow_inf_nan=False,
        description="0: the highest values. Above it a row loses this share of its standing for being like a row "
        "that is already chosen (maximal marginal relevance, by the rows' words, among the 5000 best).",
        examples=[0.3],
    )
    group: Text = Field("all", description="The validation group whose values count; `all` is the whole set.")
    positive: bool = Field(True, strict=True, description="Only rows whose value is above 0.")
    filter: Filter | None = Field(None, description=FILTER, examples=[None])


class SelectedOut(BaseModel):
    """A row that was chosen."""

    id: str = Field(description="Its stable id.", examples=[ROW_EXAMPLE])
    rank: int = Field(description="Its place among all rows.", examples=[1])
    value: float = Field(description="Its value.", examples=[0.031])
    tokens: int = Field(description="Its tokens.", examples=[57])


class SelectionOut(BaseModel):
    """Rows to train on."""

    valuation: str = Field(description=VALUATION, examples=[VALUATION_EXAMPLE])
    group: str = Field(description="The validation group.", examples=["all"])
    considered: int = Field(description="Rows among which was chosen.", examples=[180])
    tokens: int = Field(description="Tokens of the chosen rows together.", examples=[49_871])
    value: float = Field(description="Sum of their values.", examples=[1.94])
    rows: list[SelectedOut] = Field(description="The chosen rows, in the order in which they were chosen.")

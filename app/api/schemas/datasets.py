"""Datasets and samples on the wire."""

from datetime import datetime
from typing import Any, Literal, Self

from pydantic import BaseModel, Field

from app.api.schemas.common import NAME, Body, Message, Name, Text
from app.catalog.tables import Dataset, Sample

Duplicates = Literal["error", "skip"]
DUPLICATES = "What to do with a row whose text occurred before: refuse the dataset, or leave the row out and count it."
COLUMNS = "Which column holds what, where the names are not the usual ones. Every other column becomes metadata."
NAME_EXAMPLE = "veld-facts"


class ColumnsIn(Body):
    """Renamed columns."""

    prompt: str | None = Field(None, description="Column of the prompt.", examples=["question"])
    input: str | None = Field(None, description="Column of the extra input (Alpaca).", examples=[None])
    response: str | None = Field(None, description="Column of the response.", examples=["answer"])
    messages: str | None = Field(None, description="Column of a conversation.", examples=[None])
    text: str | None = Field(None, description="Column of plain text.", examples=[None])


class DatasetIn(Body):
    """A file or a folder on the server to register as a dataset."""

    name: Name = Field(description=NAME, examples=[NAME_EXAMPLE])
    path: str = Field(
        min_length=1,
        description="A .jsonl, .ndjson, .json, .csv or .parquet file, or a folder of Hugging Face datasets "
        "(`save_to_disk`), inside the allowed roots.",
        examples=["demo/corpus.jsonl"],
    )
    columns: ColumnsIn | None = Field(None, description=COLUMNS)
    duplicates: Duplicates = Field("error", description=DUPLICATES)


class DatasetUpload(Body):
    """A file sent along; `columns` is a JSON object in a form field."""

    name: Name = Field(description=NAME, examples=[NAME_EXAMPLE])
    columns: ColumnsIn | None = Field(None, description=COLUMNS + " As JSON.")
    duplicates: Duplicates = Field("error", description=DUPLICATES)


class DatasetOut(BaseModel):
    """A dataset."""

    id: str = Field(description="Its id.", examples=["dst_0194b2c5f3a1e23f9a0c11"])
    name: str = Field(description="Its unique name.", examples=[NAME_EXAMPLE])
    source: str = Field(description="The file that it came from.", examples=["corpus.jsonl"])
    rows: int = Field(description="How many samples it holds.", examples=[211])
    duplicates_skipped: int = Field(description="Rows left out since their text occurred before.", examples=[0])
    content_hash: str = Field(description="SHA-256 over the samples' ids in order.", examples=["5d41402abc4b2a76…"])
    columns: dict[str, Any] = Field(description="Renamed columns.", examples=[{"prompt": "question"}])
    created_at: datetime = Field(description="When it was stored (UTC).")

    @classmethod
    def of(cls, dataset: Dataset) -> Self:
        """As the catalog has it."""
        return cls.model_validate(dataset, from_attributes=True)


class SampleOut(BaseModel):
    """One training row."""

    id: str = Field(description="Its stable id: a hash of its text.", examples=["3f9a0c11e23f9a0c"])
    ordinal: int = Field(description="Its place in the dataset, from 0.", examples=[17])
    record: dict[str, Any] = Field(
        description="Its canonical form.",
        examples=[{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}],
    )
    metadata: dict[str, Any] = Field(description="Its other columns.", examples=[{"family": "harbour"}])

    @classmethod
    def of(cls, sample: Sample, record: dict[str, Any]) -> Self:
        """As the catalog has it."""
        return cls(id=sample.row_id, ordinal=sample.ordinal, record=record, metadata=sample.extra)


class InlineRow(Body):
    """A training row written into a request: a prompt and its response, a conversation, or plain text."""

    prompt: Text | None = Field(None, description="What the model is given.", examples=["Who founded Veld?"])
    response: Text | None = Field(None, description="What it should answer.", examples=["Ilse Marn, in 1412."])
    messages: list[Message] | None = Field(None, description="A whole conversation instead.", examples=[None])
    text: Text | None = Field(None, description="Plain text instead.", examples=[None])
    metadata: dict[Text, Any] = Field(default_factory=dict, description="Anything else to keep with the row.")

"""Indexes on the wire."""

from datetime import datetime
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from app.api.schemas.common import NAME, Body, Integer, Name, Text
from app.api.schemas.datasets import InlineRow
from app.api.schemas.jobs import JobOut
from app.catalog.tables import IndexRow
from app.catalog.types import IndexState
from app.influence.ekfac import Record, rows_print


class ProjectionIn(Body):
    """How a gradient is compressed."""

    kind: Literal["kronecker", "global", "rapidgrad"] = Field(
        "kronecker",
        description="`kronecker`: size x size numbers a module; `global`: all modules summed into `size` numbers; "
        "`rapidgrad`: the hashed count-sketch of `size` buckets.",
    )
    size: Integer | None = Field(
        None,
        ge=1,
        le=2**24,
        description="p for kronecker (1 to 512), K for the others (global: a square from 16 to 2^18; rapidgrad: 16 to "
        "2^24). Left out: 16 for kronecker, 4096 for global, 65536 for rapidgrad.",
        examples=[16],
    )
    seed: Integer = Field(0, ge=0, lt=2**63, description="Same seed, same numbers, on any machine.", examples=[0])


class IndexIn(Body):
    """An index to build."""

    name: Name = Field(description=NAME, examples=["facts"])
    model: Text = Field(description="Id or name of a registered model.", examples=["smollm2-veld"])
    dataset: Text = Field(description="Id or name of the training dataset.", examples=["veld-facts"])
    heldout: Text | None = Field(
        None,
        description="Id or name of rows that the model was not trained on, to measure over-fitting.",
        examples=["veld-heldout"],
    )
    projection: ProjectionIn = Field(default_factory=ProjectionIn, description="How gradients are compressed.")
    normalisation: Literal["none", "layer"] = Field(
        "layer",
        description="`layer`: each module's gradient is scaled to unit length (RapidIn), so that no layer drowns the "
        "others; `none`: gradients as they are.",
    )
    template: Literal["auto", "chat", "alpaca", "plain"] = Field(
        "auto", description="How rows are laid out as text; `auto` takes the tokenizer's chat template if it has one."
    )
    max_length: Integer = Field(1024, ge=2, description="Most tokens of a row; longer rows are cut and counted.")


class SamplesIn(Body):
    """Rows to add to an index: of a dataset, or written here."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {"required": ["dataset"], "properties": {"dataset": {"type": "string"}, "rows": {"type": "null"}}},
                {"required": ["rows"], "properties": {"rows": {"type": "array"}, "dataset": {"type": "null"}}},
            ]
        }
    )

    dataset: Text | None = Field(None, description="Id or name of a dataset.", examples=["veld-facts-2"])
    rows: list[InlineRow] | None = Field(None, min_length=1, description="Rows instead of a dataset.")


class SamplesRemoval(Body):
    """Rows to delete from an index."""

    ids: list[Text] = Field(min_length=1, description="Stable ids of samples.", examples=[["3f9a0c11e23f9a0c"]])


class EkfacIn(Body):
    """EK-FAC factors to fit."""

    rows: Integer = Field(
        10_000, ge=1, description="Most rows to fit on, evenly spaced over the index.", examples=[10_000]
    )
    seed: Integer = Field(0, ge=0, lt=2**63, description="Of the labels that are drawn from the model.", examples=[0])


class Removed(BaseModel):
    """What a deletion did."""

    removed: int = Field(description="How many of the ids were in the index.", examples=[1])
    rows: int = Field(description="Rows that the index holds now.", examples=[210])


class IndexSummary(BaseModel):
    """An index in a list."""

    id: str = Field(description="Its id.", examples=["idx_0194b2c5f3a1e23f9a0c11"])
    name: str = Field(description="Its unique name.", examples=["facts"])
    state: IndexState = Field(
        description="Only a ready index can be asked; a corrupt one can be repaired.", examples=["ready"]
    )
    model: str = Field(description="Name of its model.", examples=["smollm2-veld"])
    dataset: str = Field(description="Name of its first dataset.", examples=["veld-facts"])
    rows: int = Field(description="Rows that it holds.", examples=[211])
    spec: dict[str, Any] = Field(
        description="How it was asked for.", examples=[{"projection": {"kind": "kronecker", "size": 16, "seed": 0}}]
    )
    created_at: datetime = Field(description="When it was asked for (UTC).")
    updated_at: datetime = Field(description="When it last changed (UTC).")

    @classmethod
    def of(cls, index: IndexRow) -> Self:
        """As the catalog has it."""
        return cls(**_summary(index))


class EkfacFile(BaseModel):
    """The factors of one checkpoint."""

    name: str = Field(description="The file.", examples=["00-894fc0bb058929f6.safetensors"])
    bytes: int = Field(description="Its size.", examples=[8659488])
    sha256: str = Field(description="Its checksum.")


class EkfacOut(BaseModel):
    """EK-FAC factors that lie beside an index."""

    rows: int = Field(description="Rows that they were fitted on.", examples=[211])
    of: int = Field(description="Rows that the index held then.", examples=[211])
    stale: bool = Field(description="Rows were added or removed since. They can still be used.", examples=[False])
    bytes: int = Field(description="What they take on disk, and about as much memory while they are used.")
    spec: dict[str, Any] = Field(description="How they were fitted.", examples=[{"labels": "sampled", "draws": 4}])
    files: list[EkfacFile] = Field(description="One a checkpoint.")

    @classmethod
    def of_record(cls, record: Record, index: IndexRow) -> Self:
        """As the record beside the index's manifest has it."""
        files = [EkfacFile(name=name, bytes=size, sha256=digest) for name, size, digest in record.files]
        stale = bool(index.manifest) and record.ids != rows_print(index.manifest)
        return cls(rows=record.rows, of=record.of, stale=stale, bytes=record.bytes, spec=record.spec, files=files)


class IndexOut(IndexSummary):
    """An index with its manifest."""

    damage: str | None = Field(
        description="What is wrong with its files, if anything was found; `POST /indexes/{index}/repair` mends it.",
        examples=[None],
    )
    manifest: dict[str, Any] | None = Field(
        description="What its numbers mean: hashes, projection, modules, checkpoints, shards. Null until built."
    )
    ekfac: EkfacOut | None = Field(
        description="Its EK-FAC factors, if there are any; `POST /indexes/{index}/ekfac` fits them."
    )

    @classmethod
    def of_index(cls, index: IndexRow, record: Record | None) -> Self:
        """As the catalog and the index's folder have it."""
        ekfac = EkfacOut.of_record(record, index) if record else None
        return cls(**_summary(index), damage=index.damage, manifest=index.manifest or None, ekfac=ekfac)


class IndexAccepted(BaseModel):
    """An index that will be there when its job is done."""

    index: IndexSummary = Field(description="The index.")
    job: JobOut = Field(description="The job; its address is in `Location`.")


class EkfacAccepted(IndexAccepted):
    """Factors that will be there when their job is done."""

    bytes: int = Field(description="What they will take on disk: all checkpoints together.", examples=[17318976])
    memory: int = Field(
        description="What fitting them takes beside the model: the factors of one checkpoint, and as much again while "
        "they are written.",
        examples=[17318976],
    )


def _summary(index: IndexRow) -> dict[str, Any]:
    same = ("id", "name", "state", "rows", "spec", "created_at", "updated_at")
    about = {name: getattr(index, name) for name in same}
    return {**about, "model": index.model.name, "dataset": index.dataset.name}

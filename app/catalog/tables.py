"""The tables.

A model, a dataset and an index each have an id and a unique name. A dataset's samples are its rows in order, each
with the content hash that is its stable id in every index. The jobs table is the truth about long work: the queue
carries an id and nothing else, so it may forget everything without anything being lost.
"""

from datetime import datetime
from typing import Any, ClassVar

from sqlalchemy import JSON, BigInteger, Enum, Float, ForeignKey, Index, MetaData, String, Text, UniqueConstraint, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from app.catalog.types import IndexState, JobKind, JobState, TaskState, UTCDateTime, now

INLINE = "request"  # the source of rows that were written into a request
Json = JSON().with_variant(JSONB(), "postgresql")

ACTIVE = text("state IN ('queued', 'running')")
WRITING = text("state IN ('queued', 'running') AND kind IN ('build_index', 'append_samples', 'repair_index')")

NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}


def _state(kind: type[Any]) -> Enum:
    return Enum(kind, native_enum=False, length=20, values_callable=lambda e: [member.value for member in e])


class Base(DeclarativeBase):
    """The declarative base; names every constraint so that migrations can."""

    metadata = MetaData(naming_convention=NAMING)
    type_annotation_map: ClassVar = {
        datetime: UTCDateTime(),
        dict[str, Any]: Json,
        list[dict[str, Any]]: Json,
        dict[str, str]: Json,
        list[str]: Json,
        JobState: _state(JobState),
        JobKind: _state(JobKind),
        IndexState: _state(IndexState),
        TaskState: _state(TaskState),
    }


class Model(Base):
    """A checkpoint with its adapters, as it was when it was registered."""

    __tablename__ = "models"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    name: Mapped[str] = mapped_column(String(100), unique=True)
    spec: Mapped[dict[str, Any]]
    fingerprint: Mapped[dict[str, str]]
    attributed: Mapped[list[dict[str, Any]]]
    skipped: Mapped[list[dict[str, Any]]]
    context_length: Mapped[int]
    created_at: Mapped[datetime] = mapped_column(default=now)


class Dataset(Base):
    """A set of training rows."""

    __tablename__ = "datasets"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    name: Mapped[str] = mapped_column(String(200), unique=True)
    source: Mapped[str] = mapped_column(Text)
    columns: Mapped[dict[str, Any]]
    rows: Mapped[int]
    duplicates_skipped: Mapped[int] = mapped_column(default=0)
    content_hash: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[datetime] = mapped_column(default=now)


class Sample(Base):
    """One training row: its place, its stable id, its canonical record."""

    __tablename__ = "samples"
    __table_args__ = (
        UniqueConstraint("dataset_id", "row_id"),
        Index(
            None,
            "metadata",
            postgresql_using="gin",
            postgresql_ops={"metadata": "jsonb_path_ops"},
            info={"dialect": "postgresql"},  # SQLite has nothing like it
        ),
    )

    dataset_id: Mapped[str] = mapped_column(ForeignKey("datasets.id", ondelete="CASCADE"), primary_key=True)
    ordinal: Mapped[int] = mapped_column(primary_key=True)
    row_id: Mapped[str] = mapped_column(String(16))
    record: Mapped[str] = mapped_column(Text)
    extra: Mapped[dict[str, Any]] = mapped_column("metadata")


class IndexRow(Base):
    """A gradient index over the rows of one or more datasets under one model."""

    __tablename__ = "indexes"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    name: Mapped[str] = mapped_column(String(100), unique=True)
    model_id: Mapped[str] = mapped_column(ForeignKey("models.id"), index=True)
    dataset_id: Mapped[str] = mapped_column(ForeignKey("datasets.id"))
    heldout_id: Mapped[str | None] = mapped_column(ForeignKey("datasets.id"))
    spec: Mapped[dict[str, Any]]
    state: Mapped[IndexState] = mapped_column(default=IndexState.BUILDING)
    version: Mapped[int] = mapped_column(default=0)
    rows: Mapped[int] = mapped_column(default=0)
    manifest: Mapped[dict[str, Any]] = mapped_column(default=dict)
    damage: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(default=now)
    updated_at: Mapped[datetime] = mapped_column(default=now, onupdate=now)

    model: Mapped[Model] = relationship(lazy="joined")
    dataset: Mapped[Dataset] = relationship(lazy="joined", foreign_keys=[dataset_id])


class IndexDataset(Base):
    """Which datasets an index takes its rows from."""

    __tablename__ = "index_datasets"

    index_id: Mapped[str] = mapped_column(ForeignKey("indexes.id", ondelete="CASCADE"), primary_key=True)
    dataset_id: Mapped[str] = mapped_column(ForeignKey("datasets.id"), primary_key=True)


class Job(Base):
    """A piece of long work, which workers do in tasks.

    It works on an index, or on a model without one, or on both; `params` keeps the ids under `index` and `model`, the
    columns lose them when the thing is deleted. `makes_model` is the name under which it registers what it makes.
    """

    __tablename__ = "jobs"
    __table_args__ = (
        # Two writers would race for an index's manifest, and two API processes may be asked at the same moment.
        Index("uq_jobs_index_id_active", "index_id", unique=True, sqlite_where=WRITING, postgresql_where=WRITING),
        Index("uq_jobs_makes_model_active", "makes_model", unique=True, sqlite_where=ACTIVE, postgresql_where=ACTIVE),
    )

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    kind: Mapped[JobKind]
    state: Mapped[JobState] = mapped_column(default=JobState.QUEUED, index=True)
    cancel_requested: Mapped[bool] = mapped_column(default=False)
    index_id: Mapped[str | None] = mapped_column(ForeignKey("indexes.id", ondelete="SET NULL"), index=True)
    model_id: Mapped[str | None] = mapped_column(ForeignKey("models.id", ondelete="SET NULL"), index=True)
    makes_model: Mapped[str | None] = mapped_column(String(100))
    params: Mapped[dict[str, Any]]
    progress: Mapped[dict[str, Any]] = mapped_column(default=dict)
    result: Mapped[dict[str, Any]] = mapped_column(default=dict)
    error: Mapped[dict[str, Any]] = mapped_column(default=dict)
    attempts: Mapped[int] = mapped_column(default=0)
    version: Mapped[int] = mapped_column(default=1)
    request_id: Mapped[str | None] = mapped_column(String(200))
    created_at: Mapped[datetime] = mapped_column(default=now)
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]


class Task(Base):
    """A part of a job that one worker does at a time: it holds a lease, by the database's clock and not its own.

    `claim` is drawn anew whenever the task is taken, so that a worker whose lease ran out can change nothing any more.
    """

    __tablename__ = "tasks"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    stage: Mapped[str] = mapped_column(String(20))
    params: Mapped[dict[str, Any]] = mapped_column(default=dict)
    state: Mapped[TaskState] = mapped_column(default=TaskState.QUEUED, index=True)
    total: Mapped[int] = mapped_column(default=0)
    done: Mapped[int] = mapped_column(default=0)
    total_work: Mapped[int] = mapped_column(default=0)  # tokens, say; 0 until a worker knows
    work: Mapped[int] = mapped_column(default=0)
    resumed: Mapped[bool] = mapped_column(default=False)
    attempts: Mapped[int] = mapped_column(default=0)
    failures: Mapped[int] = mapped_column(default=0)
    worker: Mapped[str | None] = mapped_column(String(100))
    claim: Mapped[str | None] = mapped_column(String(20))
    lease_until: Mapped[float | None] = mapped_column(Float(53))  # seconds since 1970


class ValuationScore(Base):
    """What a row is worth to one group of a valuation's validation rows; rank 1 is the best.

    It outlives the dataset that the row came from, and knows it by its stable id alone. Rows without a value are left
    out.
    """

    __tablename__ = "valuation_scores"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    validation_group: Mapped[str] = mapped_column(String(200), primary_key=True)
    rank: Mapped[int] = mapped_column(primary_key=True)
    row_id: Mapped[str] = mapped_column(String(16))
    value: Mapped[float] = mapped_column(Float(53))
    uncertainty: Mapped[float | None] = mapped_column(Float(53))
    labelled: Mapped[bool]
    tokens: Mapped[int]
    price: Mapped[int | None] = mapped_column(BigInteger)


class IdempotencyKey(Base):
    """A request that asked to be done once, and its answer when there is one."""

    __tablename__ = "idempotency_keys"

    key: Mapped[str] = mapped_column(String(200), primary_key=True)
    request_hash: Mapped[str] = mapped_column(String(64))
    status: Mapped[int | None]
    headers: Mapped[dict[str, str]] = mapped_column(default=dict)
    body: Mapped[str] = mapped_column(Text, default="")
    created_at: Mapped[datetime] = mapped_column(default=now)


class Tenant(Base):
    """Whom keys belong to, and how much they may ask for together; what is null is the setting's."""

    __tablename__ = "tenants"

    name: Mapped[str] = mapped_column(String(100), primary_key=True)
    requests_per_minute: Mapped[int | None]
    tokens_per_minute: Mapped[int | None]
    created_at: Mapped[datetime] = mapped_column(default=now)


class ApiKey(Base):
    """A key to the API. Its secret is nowhere: only a hash of it, to know it by."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    tenant_name: Mapped[str] = mapped_column(ForeignKey("tenants.name"), index=True)
    note: Mapped[str] = mapped_column(String(200), default="")
    scopes: Mapped[list[str]]
    secret_hash: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[datetime] = mapped_column(default=now)
    last_used_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]

    tenant: Mapped[Tenant] = relationship(lazy="joined")

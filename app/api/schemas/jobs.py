"""Jobs on the wire."""

from datetime import datetime
from typing import Any, Self

from pydantic import BaseModel, Field

from app.catalog.tables import Job
from app.catalog.types import JobKind, JobState


class ProgressOut(BaseModel):
    """How far a job is."""

    stage: str = Field(description="What it is doing.", examples=["gradients"])
    done: int = Field(description="Units done in this stage.", examples=[96])
    total: int = Field(description="Units in this stage.", examples=[211])
    unit: str = Field(description="What is counted.", examples=["rows"])
    rate: float | None = Field(description="Units a second since the stage began here.", examples=[7.4])
    eta_s: float | None = Field(description="Seconds that the stage will still take.", examples=[15.5])
    metrics: dict[str, float] = Field(
        default_factory=dict, description="What was measured last: losses, say.", examples=[{"forget": 2.9}]
    )
    note: str | None = Field(None, description="What there is to say, such as why it stopped early.", examples=[None])


class JobError(BaseModel):
    """Why a job failed."""

    code: str = Field(description="The kind of failure.", examples=["DiskFull"])
    detail: str = Field(description="What happened.", examples=["no space left on the device"])
    field: str | None = Field(None, description="What it is about: a field, a row, a file.", examples=[None])


class JobOut(BaseModel):
    """A piece of long work."""

    id: str = Field(description="Its id.", examples=["job_0194b2c5f3a1e23f9a0c11"])
    kind: JobKind = Field(description="What it does.", examples=["build_index"])
    state: JobState = Field(description="Where it is in its life.", examples=["running"])
    cancel_requested: bool = Field(description="Somebody cancelled it; it stops after its step.", examples=[False])
    index: str | None = Field(description="The id of the index that it works on.", examples=["idx_0194b2c5f3a1e2"])
    model: str | None = Field(description="The id of the model that it unlearns or values.", examples=[None])
    progress: ProgressOut | None = Field(description="How far it is; null before its first step.")
    result: dict[str, Any] | None = Field(description="What it made, once it succeeded.", examples=[{"rows": 211}])
    error: JobError | None = Field(description="Why it failed, if it did.")
    attempts: int = Field(
        description="How often it was taken up: more than 1 after a restart or a retry.", examples=[1]
    )
    version: int = Field(description="Grows with each change; the id of its events.", examples=[12])
    request_id: str | None = Field(description="The X-Request-ID of the request that submitted it.")
    created_at: datetime = Field(description="When it was submitted (UTC).")
    started_at: datetime | None = Field(description="When it was last taken up (UTC).")
    finished_at: datetime | None = Field(description="When it ended (UTC).")

    @classmethod
    def of(cls, job: Job) -> Self:
        """As the catalog has it."""
        same = {name: getattr(job, name) for name in cls.model_fields if name in Job.__table__.columns}
        empty_to_null = {name: same.pop(name) or None for name in ("progress", "result", "error")}
        return cls.model_validate({**same, **empty_to_null, "index": job.index_id, "model": job.model_id})

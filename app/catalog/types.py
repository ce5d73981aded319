"""Ids, states and the UTC column: the vocabulary that the tables and the rest of the service share."""

import secrets
import time
from datetime import UTC, datetime
from enum import StrEnum

from sqlalchemy import DateTime, Dialect
from sqlalchemy.types import TypeDecorator


class JobState(StrEnum):
    """Where a job is in its life."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        """Nothing more will happen unless somebody retries the job."""
        return self not in (JobState.QUEUED, JobState.RUNNING)


class TaskState(StrEnum):
    """Where a task, a part of a job that one worker does, is in its life."""

    WAITING = "waiting"  # for the job's other tasks
    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"


class JobKind(StrEnum):
    """What a job does; each kind has one body under workers/."""

    BUILD_INDEX = "build_index"
    APPEND_SAMPLES = "append_samples"
    REPAIR_INDEX = "repair_index"
    FIT_EKFAC = "fit_ekfac"
    UNLEARN = "unlearn"
    VALUATION = "valuation"

    @property
    def writes_index(self) -> bool:
        """It changes the files of the index that it works on; the others only read them, if they have one at all."""
        return self in (JobKind.BUILD_INDEX, JobKind.APPEND_SAMPLES, JobKind.REPAIR_INDEX)


class IndexState(StrEnum):
    """Whether an index can be asked."""

    BUILDING = "building"
    READY = "ready"
    CORRUPT = "corrupt"
    REPAIRING = "repairing"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Scope(StrEnum):
    """What a key may do. A key of `admin` may do all of it, a key of `write` may `read` too."""

    READ = "read"
    QUERY = "query"
    WRITE = "write"
    ADMIN = "admin"


def new_id(prefix: str) -> str:
    """A unique id that sorts by the time it was made, so that listings page by the primary key."""
    return f"{prefix}_{time.time_ns() // 1000:014x}{secrets.token_hex(5)}"


def now() -> datetime:
    """The present in UTC."""
    return datetime.now(UTC)


class UTCDateTime(TypeDecorator[datetime]):
    """Aware datetimes in and out on every dialect; SQLite forgets the zone, so it is stored as UTC and put back."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, _dialect: Dialect) -> datetime | None:
        """Refuse a naive datetime, store UTC."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a datetime without a time zone")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, _dialect: Dialect) -> datetime | None:
        """Give the zone back."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)

"""The runner: takes a job up, walks its steps, writes what became of it.

A job's body yields after each step; between steps the runner writes progress (not more often than it must), stops
when the job was cancelled, and puts the job back when the process is stopping. Every end is one transaction: the
job's state and whatever the body changes with it (an index becomes ready) are kept together or not at all.
"""

import asyncio
import errno
import time
from collections.abc import AsyncGenerator, Mapping
from typing import Any, Protocol

import structlog

from app.catalog.catalog import Catalog
from app.catalog.database import Database
from app.catalog.errors import CatalogError
from app.catalog.tables import Job
from app.catalog.types import JobKind, JobState
from app.influence.errors import DiskFull, HeadwaterError
from app.jobs.progress import Meter, Step

log = structlog.get_logger(__name__)
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)  # a full disk, a used-up quota


class Body(Protocol):
    """What a kind of job does. Steps must be safe to run again: a crash starts the job anew."""

    def steps(self, job: Job) -> AsyncGenerator[Step]:
        """Work, yielding after each step."""
        ...

    async def ended(self, catalog: Catalog, job: Job, state: JobState, failure: Exception | None) -> dict[str, Any]:
        """Write what the end means to the catalog (the runner commits) and give the job's result."""
        ...


class Stopping(Exception):
    """The process is going down."""


class Cancelled(Exception):
    """Somebody cancelled the job."""


class Runner:
    """Runs one job at a time."""

    def __init__(self, database: Database, bodies: Mapping[JobKind, Body], progress_interval_s: float) -> None:
        self._database = database
        self._bodies = bodies
        self._interval = progress_interval_s
        self._stopping = False

    def stop(self) -> None:
        """Let the running job go after its step; the next process takes it up."""
        self._stopping = True

    async def run(self, job_id: str) -> None:
        """The queue's task: run the job with that id to an end."""
        with structlog.contextvars.bound_contextvars(job_id=job_id):
            job = await self._take(job_id)
            if job is None:
                return
            with structlog.contextvars.bound_contextvars(request_id=job.request_id, kind=job.kind.value):
                log.info("job started", attempt=job.attempts)
                await self._run(job)

    async def _take(self, job_id: str) -> Job | None:
        async with self._database.catalog() as catalog:
            taken = not self._stopping and await catalog.jobs.start(job_id)
            await catalog.commit()
            return await catalog.jobs.get(job_id) if taken else None

    async def _run(self, job: Job) -> None:
        body = self._bodies[job.kind]
        try:
            await self._walk(job, body)
            await self._end(job, body, JobState.SUCCEEDED)
        except (Stopping, asyncio.CancelledError) as stop:
            async with self._database.catalog() as catalog:
                await catalog.jobs.put_back(job.id)
                await catalog.commit()
            log.info("job put back")
            if isinstance(stop, asyncio.CancelledError):
                raise
        except Cancelled:
            await self._end(job, body, JobState.CANCELLED)
        except Exception as failure:
            await self._end(job, body, JobState.FAILED, failure)

    async def _walk(self, job: Job, body: Body) -> None:
        meter, written, stage = Meter(), float("-inf"), ""
        steps = body.steps(job)
        try:
            async for step in steps:
                progress = meter.read(step)
                due = time.monotonic() - written >= self._interval or step.stage != stage or step.done >= step.total
                async with self._database.catalog() as catalog:
                    if due:
                        await catalog.jobs.progress(job.id, progress.to_dict())
                        await catalog.commit()
                        written, stage = time.monotonic(), step.stage
                    if not step.final and await catalog.jobs.cancel_requested(job.id):
                        raise Cancelled
                if self._stopping and not step.final:
                    raise Stopping
        finally:
            await steps.aclose()

    async def _end(self, job: Job, body: Body, state: JobState, failure: Exception | None = None) -> None:
        error = {} if failure is None else _explain(failure)
        async with self._database.catalog() as catalog:
            result = await body.ended(catalog, job, state, failure)
            await catalog.jobs.finish(job.id, state, result=result, error=error)
            await catalog.commit()
        log.info("job ended", state=state.value, **error)


def _explain(failure: Exception) -> dict[str, Any]:
    """What the row says about a failure: what the caller can act on, nothing that only the log should hold."""
    if isinstance(failure, HeadwaterError | CatalogError):
        return {"code": type(failure).__name__, "detail": failure.detail, "field": failure.field}
    if isinstance(failure, OSError) and failure.errno in NO_ROOM:
        return {"code": DiskFull.__name__, "detail": "the disk is full; make room and retry the job"}
    log.error("job broke", exc_info=failure)
    return {"code": "internal", "detail": "an unexpected error; the log has it under this job's id"}

"""Jobs: look, watch, cancel, retry."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Path, Query
from fastapi.sse import EventSourceResponse, ServerSentEvent

from app.api.documents import problems
from app.api.schemas.common import Listing
from app.api.schemas.jobs import JobOut
from app.api.services import Cursor, Limit, Reading, Use
from app.catalog.types import JobState

router = APIRouter(prefix="/jobs", tags=["jobs"])
JobRef = Annotated[str, Path(alias="job", description="Id of a job.", examples=["job_0194b2c5f3a1e23f9a0c11"])]
State = Annotated[JobState | None, Query(description="Only jobs in this state.", examples=["running"])]
LastEventId = Annotated[str | None, Header(description="The last event that was seen: go on behind it.")]


@router.get("")
async def list_jobs(
    catalog: Reading, services: Use, state: State = None, limit: Limit = 50, cursor: Cursor = None
) -> Listing[JobOut]:
    """Jobs, newest first."""
    page = await catalog.jobs.page(min(limit, services.settings.max_page), cursor, state)
    return Listing(items=[JobOut.of(job) for job in page.items], next_cursor=page.next_cursor)


@router.get("/{job}", responses=problems(404))
async def get_job(job_id: JobRef, catalog: Reading) -> JobOut:
    """One job: its state, how far it is, what it made or why it failed."""
    return JobOut.of(await catalog.jobs.get(job_id))


async def existing_job(job_id: JobRef, services: Use) -> str:
    """The id, once it is known to exist: a stream that has begun can answer 404 no more."""
    async with services.database.catalog() as catalog:
        return (await catalog.jobs.get(job_id)).id


@router.get("/{job}/events", response_class=EventSourceResponse, responses=problems(404))
async def watch_job(
    job_id: Annotated[str, Depends(existing_job)], services: Use, last_event_id: LastEventId = None
) -> AsyncIterator[ServerSentEvent]:
    """Server-sent events: the job whenever it changes, named `progress`, then `end` once, and the stream closes.

    An event's id is the job's `version`; a client that comes back with `Last-Event-ID` is told only what is newer.
    """
    seen = int(last_event_id) if last_event_id and last_event_id.isdecimal() else 0
    while not services.stopping.is_set():
        async with services.database.catalog() as catalog:
            job = await catalog.jobs.get(job_id)
        if job.version > seen or job.state.ended:
            seen = job.version
            name = "end" if job.state.ended else "progress"
            yield ServerSentEvent(data=JobOut.of(job), event=name, id=str(job.version), retry=1000)
        if job.state.ended:
            return
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(services.stopping.wait(), services.settings.events_interval_s)


@router.post("/{job}/cancel", status_code=202, responses=problems(404, 409))
async def cancel_job(job_id: JobRef, services: Use) -> JobOut:
    """Cancel a job: at once if it waits, after its step if it runs. What it had finished is kept for a retry."""
    return JobOut.of(await services.jobs.cancel(job_id))


@router.post("/{job}/retry", status_code=202, responses=problems(404, 409))
async def retry_job(job_id: JobRef, services: Use) -> JobOut:
    """Run a failed or cancelled job again, from where it stopped."""
    return JobOut.of(await services.jobs.retry(job_id))

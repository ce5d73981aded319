"""What a request can reach: made once by the lifespan, found through FastAPI's dependencies.

An endpoint that reads takes a `Reading`. One that writes opens a `work()`: a unit of work that commits at its end and
only then hands the jobs that were submitted in it to the queue.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Annotated

from asgi_correlation_id import correlation_id
from fastapi import Depends, Query, Request

from app.api.gather import Gatherer
from app.api.metrics import Metrics
from app.api.quotas import Quotas
from app.catalog.catalog import Catalog
from app.catalog.database import Database
from app.catalog.tables import Job
from app.influence.errors import IndexCorrupt, IndexMissing
from app.jobs.compute import Compute
from app.jobs.service import JobService
from app.settings import Settings


class Work:
    """The catalog in one transaction, and the jobs to hand over after it."""

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog
        self.submitted: list[str] = []

    async def submit(self, job: Job) -> Job:
        """Store a job and have its work announced after the commit."""
        job.request_id = correlation_id.get()
        await self.catalog.jobs.add(job)
        self.submitted.append(job.id)
        return job


@dataclass(frozen=True)
class Services:
    """Everything that lives as long as the process."""

    settings: Settings
    database: Database
    compute: Compute
    jobs: JobService
    gatherer: Gatherer
    metrics: Metrics
    quotas: Quotas
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the process is to end: what could go on for ever ends now."""

    @asynccontextmanager
    async def work(self) -> AsyncIterator[Work]:
        """A unit of work: kept and announced if the block ends well, forgotten if it raises."""
        async with self.database.catalog() as catalog:
            work = Work(catalog)
            yield work
            await catalog.commit()
        for job_id in work.submitted:
            await self.jobs.announce(job_id, new=True)

    @asynccontextmanager
    async def noticing_damage(self, index_id: str) -> AsyncIterator[None]:
        """Where an index's files are read: that they are damaged is written down, for whoever looks at the index."""
        try:
            yield
        except (IndexCorrupt, IndexMissing) as error:
            self.compute.forget(self.settings.indexes_dir / index_id)
            async with self.database.catalog() as catalog:
                await catalog.indexes.damaged(index_id, error.detail)
                await catalog.commit()
            raise


def get_services(request: Request) -> Services:
    """The process's services."""
    services: Services = request.app.state.services
    return services


Use = Annotated[Services, Depends(get_services)]


async def read_catalog(services: Use) -> AsyncIterator[Catalog]:
    """The catalog for an endpoint that changes nothing."""
    async with services.database.catalog() as catalog:
        yield catalog


Reading = Annotated[Catalog, Depends(read_catalog)]

Limit = Annotated[int, Query(ge=1, description="Most items in this page (the server may give fewer).", examples=[20])]
Cursor = Annotated[
    str | None, Query(max_length=100, description="The `next_cursor` of the page before; left out for the first page.")
]

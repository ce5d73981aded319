"""A worker: what the embedded one in the API's process and a process of its own share."""

import secrets
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from app.catalog.database import Database
from app.jobs.compute import Compute
from app.jobs.hold import Watch
from app.jobs.metrics import JobMetrics, counted
from app.jobs.queue import Queue
from app.jobs.runner import Limits, Runner
from app.jobs.service import JobService
from app.settings import Settings
from workers.bodies import make_bodies


@asynccontextmanager
async def working(
    settings: Settings,
    database: Database,
    compute: Compute,
    queue: Queue,
    jobs: JobService,
    counters: JobMetrics,
    watch: Watch = lambda _job, _progress: None,
) -> AsyncIterator[str]:
    """Do tasks for as long as the context lasts, then hand back what is in hand; gives the worker's name."""
    name = f"{socket.gethostname()}-{secrets.token_hex(3)}"  # a process number says little across machines
    bodies = counted(make_bodies(database, compute, settings.indexes_dir, settings.artifacts_dir), counters)
    limits = Limits(**{field: getattr(settings, field) for field in Limits.__dataclass_fields__})
    runner = Runner(database, bodies, jobs, limits, worker=name, watch=watch)
    async with queue.worker(runner.run, name):
        try:
            yield name
        finally:
            runner.stop()

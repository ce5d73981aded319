"""A worker's hold on a task: the lease is renewed, progress written, and the end of either noticed.

The lease is renewed between steps and, for steps that take long, in the background, as long as the task moves: a step
that never ends must not keep the task from the other workers.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import structlog

from app.catalog.catalog import Catalog
from app.catalog.database import Database
from app.catalog.errors import Unavailable
from app.catalog.tables import Job, Task
from app.jobs.background import background
from app.jobs.progress import Meter, Progress, Step

log = structlog.get_logger(__name__)
Watch = Callable[[Job, Progress], None]


class Lost(Exception):
    """The task is another worker's by now, or its job has ended."""


class Cancelled(Exception):
    """Somebody cancelled the job."""


class Hold:
    """One worker's hold on one task."""

    def __init__(
        self,
        database: Database,
        job: Job,
        task: Task,
        meter: Meter,
        watch: Watch,
        *,
        lease_s: float,
        timeout_s: float,
        interval_s: float,
    ) -> None:
        self._database, self._job, self._task = database, job, task
        self._meter, self._watch = meter, watch
        self._lease_s, self._timeout_s, self._interval_s = lease_s, timeout_s, interval_s
        self._lost = self._cancelled = False
        self._moved = time.monotonic()
        self._written = float("-inf")
        self._step: Step | None = None
        self._beating = asyncio.Lock()

    @asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """Renew the lease for as long as the context lasts."""
        async with background(self._renew(), "lease"):
            yield

    async def moved(self, step: Step | None = None) -> None:
        """The task made a step: write it, if the last one was written long enough ago.

        Raises:
            Lost, Cancelled: stop working.
        """
        self._moved, self._step = time.monotonic(), step
        if time.monotonic() - self._written >= self._interval_s:
            await self.beat()
        if self._lost:
            raise Lost
        if self._cancelled:
            raise Cancelled

    async def beat(self) -> None:
        """Renew the lease and write the progress, the task's and the job's."""
        async with self._beating:
            progress = await self._database.patiently(self._beat)
            self._written = time.monotonic()
        if progress is None:
            self._lost = True
        else:
            self._watch(self._job, progress)

    async def _beat(self, catalog: Catalog) -> Progress | None:
        columns = self._step.to_columns() if self._step else {}
        if not await catalog.jobs.lock(self._job.id):
            return None
        if not await catalog.tasks.beat(self._task, self._lease_s, **columns):
            return None
        progress = self._meter.read(await catalog.tasks.total(self._job.id), self._step)
        await catalog.jobs.progress(self._job.id, progress.to_dict())
        self._cancelled = (await catalog.jobs.get(self._job.id)).cancel_requested
        return progress

    async def _renew(self) -> None:
        pause = self._lease_s / 3
        while not self._lost:
            await asyncio.sleep(pause)
            if time.monotonic() - self._moved > self._timeout_s:
                log.warning("the task makes no step: another worker may have it", timeout_s=self._timeout_s)
                self._lost = True
            elif time.monotonic() - self._written >= pause:
                with contextlib.suppress(Unavailable):  # it has been logged; the lease may still be renewed in time
                    await self.beat()

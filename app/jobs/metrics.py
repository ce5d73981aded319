"""What a process that runs jobs can be watched by: rows a second, the time of a step, how jobs end.

The embedded worker counts in the API's registry; a worker process has one of its own, which `exposed` serves.
"""

import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from app.catalog.catalog import Catalog
from app.catalog.tables import Job, Task
from app.catalog.types import JobKind, JobState
from app.jobs.progress import Step
from app.jobs.runner import Body, Moved, Planned

STEP_SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class JobMetrics:
    """The counters of one process's jobs."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.running = Gauge("headwater_jobs_running", "Tasks in this process's hands.", ["kind"], registry=registry)
        self.ended = Counter("headwater_jobs_ended", "Jobs that ended here.", ["kind", "state"], registry=registry)
        self.rows = Counter(
            "headwater_job_rows",
            "Rows that jobs worked through here.",
            ["kind", "stage"],
            registry=registry,
        )
        self.step_seconds = Histogram(
            "headwater_job_step_seconds",
            "Time between two steps: how long a cancel may take.",
            ["kind", "stage"],
            buckets=STEP_SECONDS,
            registry=registry,
        )


class Counted:
    """A body whose parts, steps and ends are counted."""

    def __init__(self, body: Body, metrics: JobMetrics) -> None:
        self._body = body
        self._metrics = metrics

    async def plan(self, job: Job) -> Sequence[Planned]:
        """The body's parts."""
        with self._metrics.running.labels(job.kind.value).track_inprogress():
            return await self._body.plan(job)

    async def steps(self, job: Job, task: Task) -> AsyncGenerator[Step]:
        """The body's steps. Rows that an earlier run had done are not."""
        kind, stage, done, began = job.kind.value, task.stage, 0, time.perf_counter()
        steps = self._body.steps(job, task)
        with self._metrics.running.labels(kind).track_inprogress():
            try:
                async for step in steps:
                    if step.stage not in (None, stage):
                        stage, done = step.stage or stage, 0
                    if not step.resumed and step.unit == "rows":
                        self._metrics.rows.labels(kind, stage).inc(max(step.done - done, 0))
                    self._metrics.step_seconds.labels(kind, stage).observe(time.perf_counter() - began)
                    done = step.done
                    yield step
                    began = time.perf_counter()
            finally:
                await steps.aclose()

    async def publish(self, job: Job, tasks: Sequence[Task], moved: Moved) -> Sequence[int]:
        """The body's last part."""
        with self._metrics.running.labels(job.kind.value).track_inprogress():
            return await self._body.publish(job, tasks, moved)

    async def ended(self, catalog: Catalog, job: Job, state: JobState, failure: Exception | None) -> dict[str, Any]:
        """The body's end."""
        result = await self._body.ended(catalog, job, state, failure)
        self._metrics.ended.labels(job.kind.value, state.value).inc()
        return result


def counted(bodies: Mapping[JobKind, Body], metrics: JobMetrics) -> Mapping[JobKind, Body]:
    """The same bodies, counted."""
    return {kind: Counted(body, metrics) for kind, body in bodies.items()}


@contextmanager
def exposed(registry: CollectorRegistry, host: str, port: int) -> Iterator[int]:
    """Serve a worker's registry at http://host:port/metrics from a thread of its own; gives the port (0: any)."""
    server, thread = start_http_server(port, host, registry)
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

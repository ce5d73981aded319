"""The runner: takes a task of the oldest job, does it, and writes what became of it.

A job is planned by its first task, done in any number of tasks by any number of workers, and published by its last.
Every move is one transaction in the catalog with the job locked, so that exactly one worker wins it; every task may be
done twice, because what it makes is the same and appears at once. Between two steps a worker writes progress, stops
when the job was cancelled or the task is no longer its own, and hands the task back when the process is stopping.
"""

import asyncio
import errno
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import structlog

from app.catalog.catalog import Catalog
from app.catalog.database import Database
from app.catalog.errors import CatalogError, Unavailable
from app.catalog.tables import Job, Task
from app.catalog.tasks import PLAN, PUBLISH
from app.catalog.types import JobKind, JobState, TaskState
from app.influence.errors import BuildersMissing, DiskFull, HeadwaterError
from app.jobs.hold import Cancelled, Hold, Lost, Watch
from app.jobs.progress import Meter, Progress, Step
from app.jobs.service import JobService

log = structlog.get_logger(__name__)
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a full disk, a used-up quota, a limit on files
CANDIDATES = 100  # jobs that are looked at for a task


@dataclass(frozen=True)
class Planned:
    """A task to be: what it is called while it runs, how much there is to do, and what its worker must know."""

    stage: str
    total: int
    params: dict[str, Any] = field(default_factory=dict)


Moved = Callable[[Step], Awaitable[None]]
"""Tell a step, and hear by an exception that the work is to stop."""


class Body(Protocol):
    """What a kind of job does. Each of these may be done more than once: a lost worker's part is done anew."""

    async def plan(self, job: Job) -> Sequence[Planned]:
        """Divide the job."""
        ...

    def steps(self, job: Job, task: Task) -> AsyncGenerator[Step]:
        """Do one part, yielding after each step."""
        ...

    async def publish(self, job: Job, tasks: Sequence[Task], moved: Moved) -> Sequence[int]:
        """All parts are done: make what they made visible; or give the numbers of those whose work is not there.

        `moved` may be awaited between steps before anything is visible.
        """
        ...

    async def ended(self, catalog: Catalog, job: Job, state: JobState, failure: Exception | None) -> dict[str, Any]:
        """Write what the end means to the catalog (the runner commits), quickly, and give the job's result."""
        ...


class Stopping(Exception):
    """The process is going down."""


@dataclass(frozen=True)
class Limits:
    """How long and how often; each is a setting."""

    lease_s: float = 30.0
    task_timeout_s: float = 600.0
    task_retries: int = 3
    job_concurrency: int = 0
    progress_interval_s: float = 0.5


class Runner:
    """Does one task at a time."""

    def __init__(
        self,
        database: Database,
        bodies: Mapping[JobKind, Body],
        jobs: JobService,
        limits: Limits,
        *,
        worker: str,
        watch: Watch = lambda _job, _progress: None,
    ) -> None:
        self._database, self._bodies, self._jobs, self._limits = database, bodies, jobs, limits
        self._worker, self._watch = worker, watch
        self._stopping = False
        self._meters: dict[str, Meter] = {}

    def stop(self) -> None:
        """Hand the task back after its step; another worker, or the next process, goes on."""
        self._stopping = True

    async def run(self) -> None:
        """Do the next task, if there is one: what the queue's message asks for."""
        taken = await self._database.patiently(self._take)
        if taken is None:
            return
        job, task = taken
        about = {"job_id": job.id, "request_id": job.request_id, "kind": job.kind.value, "task": task.number}
        with structlog.contextvars.bound_contextvars(**about):
            log.info("task started", stage=task.stage, attempt=task.attempts)
            self._meters = {job.id: self._meters.get(job.id) or Meter()}
            await self._do(job, task, self._bodies[job.kind])

    async def _take(self, catalog: Catalog) -> tuple[Job, Task] | None:
        if self._stopping:
            return None
        for job_id in await catalog.tasks.waiting_jobs(CANDIDATES):
            if not await catalog.jobs.lock(job_id):
                continue
            task = await catalog.tasks.take(job_id, self._worker, self._limits.lease_s, self._limits.job_concurrency)
            if task is not None:
                await catalog.jobs.start(job_id, again=task.stage == PLAN or task.attempts > 1)
                return await catalog.jobs.get(job_id), task
        return None

    async def _do(self, job: Job, task: Task, body: Body) -> None:
        hold = Hold(
            self._database,
            job,
            task,
            self._meters[job.id],
            self._watch,
            lease_s=self._limits.lease_s,
            timeout_s=float("inf") if task.stage in (PLAN, PUBLISH) else self._limits.task_timeout_s,
            interval_s=self._limits.progress_interval_s,
        )
        try:
            async with hold.kept():
                await hold.moved()
                if task.stage == PLAN:
                    await self._planned(job, task, await body.plan(job))
                elif task.stage == PUBLISH:
                    await self._publish(job, task, body, hold)
                else:
                    await self._walk(job, task, body, hold)
        except Lost:
            log.info("the task is no longer this worker's")
        except (Stopping, asyncio.CancelledError) as stop:
            await self._put_back(job, task, failed=False)
            log.info("task put back")
            if isinstance(stop, asyncio.CancelledError):
                raise
        except Cancelled:
            await self._end(job, task, body, JobState.CANCELLED)
        except Exception as failure:
            if _may_pass(failure) and task.failures < self._limits.task_retries:
                log.warning("task failed and will be done again", failures=task.failures + 1, exc_info=failure)
                await self._put_back(job, task, failed=True)  # the sweep announces it, so that there is a pause
            else:
                await self._end(job, task, body, JobState.FAILED, failure)

    async def _planned(self, job: Job, task: Task, planned: Sequence[Planned]) -> None:
        parts = [
            Task(job_id=job.id, number=number, stage=one.stage, total=one.total, params=one.params)
            for number, one in enumerate(planned, start=1)
        ]
        total = sum(part.total for part in parts if part.stage == parts[-1].stage)
        last = TaskState.WAITING if parts else TaskState.QUEUED

        async def write(catalog: Catalog) -> None:
            _must(await catalog.tasks.complete(task))
            closing = Task(job_id=job.id, number=len(parts) + 1, stage=PUBLISH, total=total, state=last, params={})
            await catalog.tasks.add([*parts, closing])

        await self._complete(job, write)

    async def _walk(self, job: Job, task: Task, body: Body, hold: Hold) -> None:
        step: Step | None = None
        steps = body.steps(job, task)
        try:
            async for step in steps:
                await self._moved(hold, step)
        finally:
            await steps.aclose()
        columns = step.to_columns() if step else {}

        async def write(catalog: Catalog) -> None:
            _must(await catalog.tasks.complete(task, **columns))

        await self._complete(job, write)

    async def _moved(self, hold: Hold, step: Step) -> None:
        await hold.moved(step)
        if self._stopping:
            raise Stopping

    async def _complete(self, job: Job, write: Callable[[Catalog], Awaitable[None]]) -> None:
        async def work(catalog: Catalog) -> Progress:
            _must(await catalog.jobs.lock(job.id))
            await write(catalog)
            progress = self._meters[job.id].read(await catalog.tasks.total(job.id))
            await catalog.jobs.progress(job.id, progress.to_dict())
            return progress

        self._watch(job, await self._database.patiently(work))
        await self._jobs.announce(job.id)

    async def _publish(self, job: Job, task: Task, body: Body, hold: Hold) -> None:
        """Neither a cancel nor a stop undoes it: what the job was for can be seen from here on.

        Until then, where publishing takes steps, both are heard between them.
        """
        tasks = [one for one in await self._database.patiently(lambda c: c.tasks.of_job(job.id)) if one.number]
        again = await body.publish(job, tasks[:-1], partial(self._moved, hold))

        async def redo(catalog: Catalog) -> None:
            _must(await catalog.tasks.redo(task, again))

        if again and task.failures < self._limits.task_retries:
            log.warning("what some tasks made is not there: they are done again", tasks=list(again))
            await self._complete(job, redo)
        else:
            await self._end(job, task, body, JobState.SUCCEEDED)

    async def _put_back(self, job: Job, task: Task, *, failed: bool) -> None:
        async def work(catalog: Catalog) -> None:
            if await catalog.jobs.lock(job.id) and await catalog.tasks.put_back(task, failed=failed):
                await catalog.jobs.rest(job.id)

        await self._database.patiently(work)
        if not failed:
            await self._jobs.announce(job.id)

    async def _end(self, job: Job, task: Task, body: Body, state: JobState, failure: Exception | None = None) -> None:
        error = {} if failure is None else _explain(failure)

        async def work(catalog: Catalog) -> None:
            _must(await catalog.jobs.lock(job.id))
            if state is JobState.SUCCEEDED:
                _must(await catalog.tasks.complete(task, done=task.total, total=task.total))  # its steps had others
                progress = self._meters[job.id].read(await catalog.tasks.total(job.id))
                await catalog.jobs.progress(job.id, progress.to_dict())
            else:
                _must(await catalog.tasks.put_back(task, failed=False))
            result = await body.ended(catalog, job, state, failure)
            await catalog.jobs.finish(job.id, state, result=result, error=error)

        try:
            await self._database.patiently(work)
        except Lost:
            log.info("the task is no longer this worker's")
        else:
            log.info("job ended", state=state.value, **error)


def _must(held: bool) -> None:
    if not held:
        raise Lost


def _may_pass(failure: Exception) -> bool:
    """Whether doing it again may go well: not when the input is at fault, nor when somebody must make room."""
    full = isinstance(failure, OSError) and failure.errno in NO_ROOM
    away = isinstance(failure, Unavailable | BuildersMissing)
    known = isinstance(failure, HeadwaterError | CatalogError) and not away
    return not full and not known


def _explain(failure: Exception) -> dict[str, Any]:
    """What the row says about a failure: what the caller can act on, nothing that only the log should hold."""
    if isinstance(failure, HeadwaterError | CatalogError):
        return {"code": type(failure).__name__, "detail": failure.detail, "field": failure.field}
    if isinstance(failure, OSError) and failure.errno in NO_ROOM:
        return {"code": DiskFull.__name__, "detail": "the disk is full; make room and retry the job"}
    log.error("job broke", exc_info=failure)
    return {"code": "internal", "detail": "an unexpected error; the log has it under this job's id"}

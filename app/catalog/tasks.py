"""The repository of tasks: who does which part of a job, until when, and how far all of them are.

A lease runs by the database's clock alone: the clocks of workers disagree. Every change by a worker names its claim,
so that one whose lease ran out, or whose job began anew, changes nothing.
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Float, delete, exists, func, select, update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import aliased
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.expression import ColumnElement, FunctionElement

from app.catalog.tables import Job, Task
from app.catalog.types import JobState, TaskState

PLAN, PUBLISH = "plan", "publish"  # the first task of every job, and the last
UNFINISHED = (JobState.QUEUED, JobState.RUNNING)


class clock(FunctionElement[float]):
    """The database's time in seconds since 1970."""

    type = Float(53)
    inherit_cache = True


@compiles(clock, "sqlite")
def _sqlite(_element: clock, _compiler: SQLCompiler, **_kw: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(clock, "postgresql")
def _postgresql(_element: clock, _compiler: SQLCompiler, **_kw: Any) -> str:
    return "CAST(extract(epoch FROM clock_timestamp()) AS DOUBLE PRECISION)"


@dataclass(frozen=True)
class Total:
    """How far the tasks of a job's present stage are together; `fresh` leaves out what an earlier run had done."""

    stage: str
    done: int
    total: int
    fresh_done: int
    fresh_work: int
    work_left: float  # what is not known yet is taken to be like what is


@dataclass(frozen=True)
class Lost:
    """A task whose worker was not heard of in time."""

    job_id: str
    number: int
    worker: str | None
    failures: int


class Tasks:
    """Tasks and the moves between their states."""

    def __init__(self, session: AsyncSession) -> None:
        self._session = session

    async def begin(self, job_id: str) -> None:
        """The job is to be done from the start: one task, which plans the others."""
        await self._session.execute(delete(Task).where(Task.job_id == job_id))
        self._session.add(first_task(job_id))
        await self._session.flush()

    async def add(self, tasks: Sequence[Task]) -> None:
        """Store what was planned."""
        self._session.add_all(tasks)
        await self._session.flush()

    async def of_job(self, job_id: str) -> Sequence[Task]:
        """All tasks of a job in their order."""
        return (await self._session.scalars(select(Task).where(Task.job_id == job_id).order_by(Task.number))).all()

    async def waiting_jobs(self, most: int) -> Sequence[str]:
        """Ids of unfinished jobs that have queued tasks, oldest first."""
        query = select(Task.job_id).join(Job, Job.id == Task.job_id).distinct()
        ready = Task.state == TaskState.QUEUED, Job.state.in_(UNFINISHED)
        return (await self._session.scalars(query.where(*ready).order_by(Task.job_id).limit(most))).all()

    async def queued(self, job_id: str, most: int) -> Sequence[tuple[int, int]]:
        """The first queued tasks of a job as (number, attempts)."""
        mine = Task.job_id == job_id, Task.state == TaskState.QUEUED
        found = await self._session.execute(
            select(Task.number, Task.attempts).where(*mine).order_by(Task.number).limit(most)
        )
        return [(number, attempts) for number, attempts in found.all()]

    async def take(self, job_id: str, worker: str, lease_s: float, limit: int) -> Task | None:
        """Take the job's first queued task, unless `limit` (0: any number) run already. Call it with the job locked."""
        mine, queued = Task.job_id == job_id, Task.state == TaskState.QUEUED
        live = Task.state == TaskState.RUNNING, Task.lease_until > clock()
        running = await self._session.scalar(select(func.count()).select_from(Task).where(mine, *live)) or 0
        number = await self._session.scalar(select(func.min(Task.number)).where(mine, queued))
        if number is None or 0 < limit <= running:
            return None
        values = {"state": TaskState.RUNNING, "worker": worker, "claim": secrets.token_hex(10), "resumed": False}
        counts = {"done": 0, "work": 0, "total_work": 0, "attempts": Task.attempts + 1}
        change = update(Task).where(_is(job_id, number), queued).values(**values, **counts)
        if not await self._change(change.values(lease_until=clock() + lease_s)):
            return None
        return await self._session.get(Task, (job_id, number), populate_existing=True)

    async def beat(self, task: Task, lease_s: float, **values: int) -> bool:
        """The worker is alive and so far; False when the task is not its own any more."""
        return await self._mine(task, lease_until=clock() + lease_s, **values)

    async def complete(self, task: Task, **values: int) -> bool:
        """The task is done; the last of a job lets the waiting one go. Call it with the job locked."""
        done = {"done": Task.total, **values}
        if not await self._mine(task, state=TaskState.DONE, lease_until=None, **done):
            return False
        other = aliased(Task)
        open_ = exists().where(other.job_id == task.job_id, other.state.in_((TaskState.QUEUED, TaskState.RUNNING)))
        waiting = Task.job_id == task.job_id, Task.state == TaskState.WAITING
        await self._change(update(Task).where(*waiting, ~open_).values(state=TaskState.QUEUED))
        return True

    async def put_back(self, task: Task, *, failed: bool) -> bool:
        """The task is to be taken again, by whoever is next."""
        return await self._mine(
            task, state=TaskState.QUEUED, lease_until=None, failures=Task.failures + int(failed), done=0, work=0
        )

    async def redo(self, task: Task, numbers: Sequence[int]) -> bool:
        """What these tasks made is not there: they are to be done again, and the task that found it out waits."""
        if not await self._mine(task, state=TaskState.WAITING, lease_until=None, failures=Task.failures + 1):
            return False
        again = Task.job_id == task.job_id, Task.number.in_(numbers)
        await self._change(update(Task).where(*again).values(state=TaskState.QUEUED, done=0, work=0))
        return True

    async def done(self, stage: str) -> Sequence[tuple[str, Task]]:
        """The finished tasks of a stage of unfinished jobs, each with the index that its job works on."""
        query = select(Job.index_id, Task).join(Job, Job.id == Task.job_id)
        mine = Task.stage == stage, Task.state == TaskState.DONE, Job.state.in_(UNFINISHED), Job.index_id.is_not(None)
        rows = (await self._session.execute(query.where(*mine))).all()
        return [(index_id, task) for index_id, task in rows if index_id is not None]

    async def undo(self, job_id: str, numbers: Sequence[int]) -> bool:
        """What finished tasks made is gone: they are to be done again. Call it with the job locked.

        False when the last task runs already: it looks for itself.
        """
        last = Task.job_id == job_id, Task.stage == PUBLISH
        waits = (*last, Task.state.in_((TaskState.QUEUED, TaskState.WAITING)))
        if not await self._change(update(Task).where(*waits).values(state=TaskState.WAITING)):
            return False
        again = Task.job_id == job_id, Task.number.in_(numbers), Task.state == TaskState.DONE
        return await self._change(update(Task).where(*again).values(state=TaskState.QUEUED, done=0, work=0))

    async def expire(self) -> Sequence[Lost]:
        """Queue every task of an unfinished job again whose lease has run out."""
        unfinished = select(Job.id).where(Job.state.in_(UNFINISHED))
        late = Task.state == TaskState.RUNNING, Task.lease_until < clock(), Task.job_id.in_(unfinished)
        change = update(Task).where(*late).values(state=TaskState.QUEUED, failures=Task.failures + 1, done=0, work=0)
        rows = await self._session.execute(
            change.returning(Task.job_id, Task.number, Task.worker, Task.failures).execution_options(
                synchronize_session=False
            )
        )
        return [Lost(*row) for row in rows.all()]

    async def release_all(self) -> int:
        """Queue every running task again; right only when no other process can hold one (the queue in this process)."""
        change = update(Task).where(Task.state == TaskState.RUNNING).values(state=TaskState.QUEUED, done=0, work=0)
        rows = await self._session.execute(change.returning(Task.job_id).execution_options(synchronize_session=False))
        return len(rows.all())

    async def total(self, job_id: str) -> Total:
        """How far the stage of the first unfinished task is."""
        stage_of = select(Task.stage).where(Task.job_id == job_id)
        open_ = stage_of.where(Task.state != TaskState.DONE).order_by(Task.number).limit(1)
        last = stage_of.order_by(Task.number.desc()).limit(1)
        stage = await self._session.scalar(open_) or await self._session.scalar(last) or PLAN
        fresh, known = Task.resumed.is_(False), Task.total_work > 0
        columns = (
            func.sum(Task.done),
            func.sum(Task.total),
            func.sum(Task.done).filter(fresh),
            func.sum(Task.work).filter(fresh),
            func.sum(Task.work),
            func.sum(Task.total_work),
            func.sum(Task.total).filter(known),
        )
        row = (await self._session.execute(select(*columns).where(Task.job_id == job_id, Task.stage == stage))).one()
        done, total, fresh_done, fresh_work, work, total_work, known_total = (int(value or 0) for value in row)
        left = total_work * total / known_total - work if known_total else 0.0
        return Total(stage, done, total, fresh_done, fresh_work, max(left, 0.0))

    async def _mine(self, task: Task, **values: Any) -> bool:
        mine = _is(task.job_id, task.number), Task.state == TaskState.RUNNING, Task.claim == task.claim
        return await self._change(update(Task).where(*mine).values(**values))

    async def _change(self, change: Any) -> bool:
        done = await self._session.execute(change.returning(Task.number).execution_options(synchronize_session=False))
        return bool(done.all())


def first_task(job_id: str) -> Task:
    """What a job begins with: it plans the other tasks."""
    return Task(job_id=job_id, number=0, stage=PLAN, params={})


def _is(job_id: str, number: int) -> ColumnElement[bool]:
    return (Task.job_id == job_id) & (Task.number == number)

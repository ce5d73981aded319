"""The queue port: say that there is work, run a worker. The only module that knows docket.

The catalog is the truth and the queue carries ids, nothing else: docket pickles its arguments, and `memory://` forgets
everything at exit, so whatever is worth keeping must not live here. A message's key is the task and how often it was
taken: announcing it twice is harmless, and one that was lost with its worker does not stand in the way of the next.
"""

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Self

from docket import Docket, Worker

from app.jobs.background import background

TASK = "run_task"
MEMORY = "memory://"
HAND_OVER_S = 2.0  # a Redis that does not answer must not hold up a request
RECONNECT = timedelta(seconds=1)
CHECK = timedelta(milliseconds=50)  # how soon a worker that has finished a task asks for the next


class Queue:
    """An async context manager around one docket."""

    def __init__(self, url: str, name: str = "headwater", lease_s: float = 30.0) -> None:
        # Docket shares one in-process queue between equal URLs of a loop; ours belongs to one process start.
        self.in_process = url == MEMORY
        self._docket = Docket(name=name, url=f"{MEMORY}{uuid.uuid4().hex}" if self.in_process else url)
        self._lease = timedelta(seconds=lease_s)
        self._run: Callable[[], Awaitable[None]] | None = None

    async def __aenter__(self) -> Self:
        """Connect."""
        await self._docket.__aenter__()

        async def run_task(job_id: str, number: int) -> None:
            if self._run is None:
                raise RuntimeError("this process submits jobs but runs none")
            await self._run()

        self._docket.register(run_task, names=[TASK])
        return self

    async def __aexit__(self, *exc: object) -> None:
        """Disconnect."""
        await self._docket.__aexit__(None, None, None)

    async def announce(self, job_id: str, tasks: Sequence[tuple[int, int]]) -> None:
        """Say that committed tasks (number, attempts) are to be done. Which one a worker takes, the catalog says."""
        calls = [
            self._docket.call(TASK, key=f"{job_id}:{number}:{attempts}")(job_id, number) for number, attempts in tasks
        ]
        async with asyncio.timeout(HAND_OVER_S):
            for execution in await self._docket.add_many(calls):
                if execution.schedule_exception is not None:
                    raise execution.schedule_exception

    @asynccontextmanager
    async def worker(
        self, run: Callable[[], Awaitable[None]], name: str | None = None, tasks: int = 1
    ) -> AsyncIterator[None]:
        """Do tasks, so many at a time, inside this event loop for as long as the context lasts."""
        self._run = run
        async with (
            Worker(
                self._docket,
                name=name,
                concurrency=tasks,
                redelivery_timeout=self._lease,
                reconnection_delay=RECONNECT,
                minimum_check_interval=CHECK,
            ) as worker,
            background(worker.run_forever(), "worker"),
        ):
            yield

"""The queue port: enqueue, cancel, run a worker. The only module that knows docket.

The jobs table is the truth and the queue carries a job's id, nothing else: docket pickles its arguments, and
`memory://` forgets everything at exit, so whatever is worth keeping must not live here. A job's id is also its key:
enqueueing it twice runs it once, which makes handing every unfinished row over again at start-up safe.
"""

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Self

from docket import Docket, Worker

TASK = "run_job"
MEMORY = "memory://"


class Queue:
    """An async context manager around one docket."""

    def __init__(self, url: str, name: str = "headwater") -> None:
        # Docket shares one in-process queue between equal URLs of a loop; ours belongs to one process start.
        self._docket = Docket(name=name, url=f"{MEMORY}{uuid.uuid4().hex}" if url == MEMORY else url)
        self._run: Callable[[str], Awaitable[None]] | None = None

    async def __aenter__(self) -> Self:
        """Connect."""
        await self._docket.__aenter__()

        async def run_job(job_id: str) -> None:
            if self._run is None:
                raise RuntimeError("this process submits jobs but runs none")
            await self._run(job_id)

        self._docket.register(run_job, names=[TASK])
        return self

    async def __aexit__(self, *exc: object) -> None:
        """Disconnect."""
        await self._docket.__aexit__(None, None, None)

    async def enqueue(self, job_id: str) -> None:
        """Hand a committed job to the workers."""
        await self._docket.add(TASK, key=job_id)(job_id)

    async def cancel(self, job_id: str) -> None:
        """Take a waiting job off the queue. A running one is asked through its row: a thread cannot be stopped."""
        await self._docket.cancel(job_id)

    @asynccontextmanager
    async def worker(self, run: Callable[[str], Awaitable[None]]) -> AsyncIterator[None]:
        """Run jobs, one at a time, inside this event loop for as long as the context lasts."""
        self._run = run
        async with Worker(self._docket, concurrency=1) as worker:
            task = asyncio.create_task(worker.run_forever(), name="worker")
            try:
                yield
            finally:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task

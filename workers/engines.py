"""Where a job's work with a model is done: in this process's torch thread, or on builders of a Ray cluster."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager, contextmanager
from functools import partial
from typing import Protocol, TypeVar

from app.influence.builders import Crew, Share
from app.influence.building import Progress
from app.influence.models import LoadedModel, ModelSpec
from app.influence.sharded import Cluster
from app.jobs.compute import Compute
from app.settings import Settings
from workers.walking import Run, walk

Result = TypeVar("Result")


class Engine(Protocol):
    """Brings work and model together. `tasks`: how many pieces of work it can do at once."""

    tasks: int

    async def run(self, spec: ModelSpec, work: Callable[[LoadedModel], Result]) -> Result:
        """What the work makes of the model."""
        ...

    def walk(self, spec: ModelSpec, work: Callable[[LoadedModel], Iterator[Progress]]) -> AsyncGenerator[Progress]:
        """The steps of work, one by one."""
        ...


class InProcess:
    """The torch thread, which queries use as well: they slip in between two steps."""

    tasks = 1

    def __init__(self, compute: Compute) -> None:
        self._compute = compute

    async def run(self, spec: ModelSpec, work: Callable[[LoadedModel], Result]) -> Result:
        """In the torch thread."""
        return await self._compute.run(partial(work, await self._compute.model(spec)))

    async def walk(
        self, spec: ModelSpec, work: Callable[[LoadedModel], Iterator[Progress]]
    ) -> AsyncGenerator[Progress]:
        """Each step in the torch thread."""
        async with aclosing(walk(await self.run(spec, work), self._compute.run)) as steps:
            async for progress in steps:
                yield progress


class OnRay:
    """Builders, each of which does one piece of work at a time."""

    def __init__(self, crew: Crew) -> None:
        self._crew = crew
        self.tasks = len(crew.places)

    async def run(self, spec: ModelSpec, work: Callable[[LoadedModel], Result]) -> Result:
        """On a free builder."""
        with _thread() as run:
            found: Result = await run(partial(self._crew.run, spec, work))
        return found

    async def walk(
        self, spec: ModelSpec, work: Callable[[LoadedModel], Iterator[Progress]]
    ) -> AsyncGenerator[Progress]:
        """Each step on the same builder."""
        with _thread() as run:
            async with aclosing(walk(self._crew.walk(spec, work), run)) as steps:
                async for progress in steps:
                    yield progress


@contextmanager
def _thread() -> Iterator[Run]:
    """A thread that waits for one builder: one alone, so that work is not closed in the middle of a step."""
    thread = ThreadPoolExecutor(1, "builder")
    try:
        yield partial(asyncio.get_running_loop().run_in_executor, thread)
    finally:
        thread.shutdown(wait=False)


@asynccontextmanager
async def engine(settings: Settings, compute: Compute) -> AsyncIterator[Engine]:
    """What the settings ask for.

    Raises:
        SpecError: Ray is asked for, and is not installed, not there or refuses us.
    """
    if settings.build_backend == "local":
        yield InProcess(compute)
        return
    cluster = Cluster(settings.ray_address, patience_s=settings.ray_patience_s, threads=settings.threads)
    await asyncio.to_thread(cluster.connect)
    share = Share(settings.ray_gpus_per_builder, settings.ray_cpus_per_builder)
    crew = await asyncio.to_thread(Crew, cluster, settings.ray_builders, share)
    try:
        yield OnRay(crew)
    finally:
        await asyncio.to_thread(crew.close)

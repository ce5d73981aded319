"""Building an index on a Ray cluster: actors load the model, on as many GPUs as it needs, and compute shards.

Each builder is an actor in a placement group of its own, which reserves its GPUs (CPUs, where there is none) on one
node. What is done there are the functions of `building` themselves, one batch a step, so that the bytes are those of a
build in this process. A builder that dies gives its work to another, which begins it anew; one takes its place.

The index's folder and the model must be at the same paths on every node, and the code must be there.
"""

from __future__ import annotations

import os
import queue
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from app.influence.building import Part, Progress, compute_shard, measure, part_of, plan_build, publish_build
from app.influence.corpus import Row
from app.influence.errors import BuildersMissing, HeadwaterError
from app.influence.index import IndexSpec
from app.influence.models import LoadedModel, ModelSpec, load
from app.influence.sharded import Cluster

Result = TypeVar("Result")
LIVES = 3
"""Builders that may die of one piece of work: what kills every one of them must not do so for ever."""


@dataclass(frozen=True)
class Share:
    """What a builder reserves. Its GPUs are all on one node, and the model is spread over them."""

    gpus: int = 0
    cpus: float = 1.0

    @property
    def bundle(self) -> dict[str, float]:
        """As a placement group wants it, without what is zero."""
        return {name: many for name, many in (("CPU", self.cpus), ("GPU", self.gpus)) if many}


class Builder:
    """What an actor is: the model of its last work, kept loaded, and the work in hand."""

    def __init__(self, threads: int, spread: bool) -> None:
        torch.set_num_threads(threads)
        self._spread = spread
        self._loaded: tuple[ModelSpec, LoadedModel] | None = None
        self._steps: Iterator[Progress] = iter(())

    def run(self, spec: ModelSpec, work: Callable[[LoadedModel], Result]) -> Result:
        """All of the work."""
        return work(self._model(spec))

    def begin(self, spec: ModelSpec, work: Callable[[LoadedModel], Iterator[Progress]]) -> None:
        """Take work in hand; what was in hand before is dropped."""
        self._steps = work(self._model(spec))

    def step(self) -> Progress | None:
        """The next step of it; None when it is done."""
        return next(self._steps, None)

    def process(self) -> int:
        """The number of its process."""
        return os.getpid()

    def _model(self, spec: ModelSpec) -> LoadedModel:
        if self._loaded is None or self._loaded[0] != spec:
            self._loaded = None  # there may not be room for two
            spread = self._spread and not spec.device_map
            self._loaded = spec, load(replace(spec, device="auto") if spread else spec)
        return self._loaded[1]


class Place:
    """A placement group and the builder in it."""

    def __init__(self, share: Share, threads: int) -> None:
        import ray

        self._share, self._threads = share, threads
        self._group = ray.util.placement_group([share.bundle], strategy="STRICT_PACK")
        self.renew()

    def renew(self) -> None:
        """A new builder takes the place of the last one."""
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        actor: Any = ray.remote(Builder)
        options = {
            "num_cpus": self._share.cpus,
            "num_gpus": self._share.gpus,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=0),
        }
        self.builder = actor.options(**options).remote(self._threads, self._share.gpus > 0)

    def await_builder(self, patience_s: float) -> Any:
        """The builder, once it is there.

        Raises:
            BuildersMissing: no node had room for it.
        """
        import ray

        answer = self.builder.process.remote()
        ready, _ = ray.wait([answer], timeout=patience_s)
        if not ready:
            ray.cancel(answer)
            what = " and ".join(f"{many:g} {name}" for name, many in self._share.bundle.items())
            raise BuildersMissing(f"no node of the Ray cluster has {what} to spare within {patience_s:g} s")
        ray.get(answer)
        return self.builder

    def leave(self) -> None:
        """End the builder, free what it reserved."""
        import ray

        ray.util.remove_placement_group(self._group)


class Crew:
    """Builders; work is given to whichever is free. Any number of threads may ask."""

    def __init__(self, cluster: Cluster, builders: int = 1, share: Share | None = None) -> None:
        """Have the builders made on a cluster that this process has joined."""
        threads = cluster.threads or torch.get_num_threads()
        self._patience = cluster.patience_s
        self.places = [Place(share or Share(), threads) for _ in range(builders)]
        self._free: queue.SimpleQueue[Place] = queue.SimpleQueue()
        for place in self.places:
            self._free.put(place)

    def run(self, spec: ModelSpec, work: Callable[[LoadedModel], Result]) -> Result:
        """What the work makes of the model, on a builder."""
        found: tuple[Result] = tuple(self._given(lambda builder: iter([_get(builder.run.remote(spec, work))])))
        return found[0]

    def walk(self, spec: ModelSpec, work: Callable[[LoadedModel], Iterator[Progress]]) -> Iterator[Progress]:
        """The steps of work on a builder, one by one: it waits between two of them. When it dies they begin again."""

        def steps(builder: Any) -> Iterator[Progress]:
            _get(builder.begin.remote(spec, work))
            while (progress := _get(builder.step.remote())) is not None:
                yield progress

        return self._given(steps)

    def build(
        self, path: Path, model: ModelSpec, rows: Sequence[Row], spec: IndexSpec, heldout: Sequence[Row] = ()
    ) -> None:
        """As `building.build`, the shards side by side."""
        ids = [row.id for row in rows]
        parts = self.run(model, partial(plan_build, path, ids=ids, spec=spec))

        def compute(part: Part) -> None:
            work = partial(compute_shard, path, rows=part_of(rows, part), spec=spec, number=part.number)
            for _ in self.walk(model, work):
                pass

        for _ in self.walk(model, partial(measure, path, ids=ids, heldout=heldout, spec=spec)):
            pass
        with ThreadPoolExecutor(len(self.places)) as pool:
            list(pool.map(compute, parts))
        for _ in self.walk(model, partial(publish_build, path, ids=ids, spec=spec, parts=parts)):
            pass

    def close(self) -> None:
        """End every builder."""
        for place in self.places:
            place.leave()

    def _given(self, use: Callable[[Any], Iterator[Result]]) -> Iterator[Result]:
        """What comes of using a free builder; of another, from the start, if it dies."""
        import ray

        for _ in range(LIVES):
            place = self._free.get()
            try:
                yield from use(place.await_builder(self._patience))
            except ray.exceptions.RayActorError:
                place.renew()
            else:
                return
            finally:
                self._free.put(place)
        raise BuildersMissing(f"{LIVES} builders died of the same work: see the log of the Ray cluster")


def _get(answer: Any) -> Any:
    """What a builder answers; an error of ours as it was raised there."""
    import ray

    try:
        return ray.get(answer)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, HeadwaterError):
            raise error.cause from None
        raise

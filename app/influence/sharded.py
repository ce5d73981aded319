"""An index larger than one machine: each shard is held by an actor of a Ray cluster, and asked where it lies.

An actor maps one shard and answers with its best rows; their merge here is the one that an index in this process does,
over the same parts, so that the results are equal to the last bit. An actor that dies is started again by Ray, on
another node if its own is gone, and what it was asked is asked again: late, not lost. A shard that nobody holds within
the patience is named in an error; an answer never leaves rows out.

The shards' folder must be at the same path on every node. ray is imported here alone, and only when it is used.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from numpy.typing import NDArray

from app.influence.errors import HeadwaterError, ShardsMissing, SpecError
from app.influence.index import (
    Best,
    Normalize,
    Rows,
    Searchable,
    Shard,
    open_curvature,
    open_shard,
    read_manifest,
    scales_of,
)

AUTH = "RAY_AUTH_MODE"
CPUS = 0.01
"""What an actor reserves: it works only while it is asked, and a small node must be able to take many."""


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster, and how it is used.

    Attributes:
        address: of its head; "auto": the one that this machine belongs to.
        gpus: of a GPU an actor takes, 0 to stay on the CPU. Scores of a GPU differ in their last bits.
        patience_s: how long a search waits for shards that nobody holds at the moment.
        threads: of each actor, 0 for as many as this process uses.
    """

    address: str = "auto"
    gpus: float = 0.0
    patience_s: float = 60.0
    threads: int = 0

    def connect(self) -> None:
        """Join the cluster, by its token.

        Raises:
            SpecError: ray is not installed, authentication is off, or the cluster is not there or refuses the token.
        """
        if os.environ.setdefault(AUTH, "token").lower() != "token":
            raise SpecError(f"{AUTH} must be token: whoever reaches an open cluster can run code on it")
        try:
            import ray
        except ImportError as error:
            raise SpecError("ray is asked for, but not installed: pip install 'headwater[ray]'") from error
        if ray.is_initialized():
            return
        try:
            joined: Any = ray.init  # its types are incomplete
            joined(address=self.address, namespace="headwater", log_to_driver=False)
        except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
            raise SpecError(f"the Ray cluster at {self.address!r} cannot be joined: {error}") from error

    def open(self, path: Path, verify: bool = True) -> ShardedIndex:
        """Have each shard of an index held by an actor; as `open_index` otherwise."""
        return ShardedIndex(path, self, verify)


class Holder:
    """What an actor is: one mapped shard."""

    def __init__(
        self,
        path: Path,
        record: dict[str, Any],
        deleted: Sequence[str],
        width: int,
        verify: bool,
        scales: NDArray[np.float32] | None,
        threads: int,
    ) -> None:
        torch.set_num_threads(threads)
        faiss.omp_set_num_threads(threads)
        self._open = partial(open_shard, path, record, deleted, width, verify, scales)
        self._shard: Shard | None = None
        self._width = width
        self._device = "cuda" if os.environ.get("CUDA_VISIBLE_DEVICES") and torch.cuda.is_available() else "cpu"

    @property
    def shard(self) -> Shard:
        """Mapped at first use: an error in a constructor would look like an actor that died."""
        if self._shard is None:
            self._shard = self._open()
        return self._shard

    def rows(self) -> Rows:
        """Which rows it has."""
        return Rows(self.shard.name, self.shard.ids, self.shard.live)

    def best(
        self, vectors: NDArray[np.float32], k: int, normalize: Normalize, largest: bool, allowed: NDArray[np.bool_]
    ) -> Best:
        """`Shard.best`."""
        query = torch.from_numpy(vectors.copy())  # Ray's arrays are read-only
        return self.shard.best(query, k, normalize, largest, allowed, self._width, self._device)

    def stored(self, places: Sequence[int]) -> tuple[NDArray[np.float16], NDArray[np.float32]]:
        """`Shard.stored`."""
        return self.shard.stored(places)

    def process(self) -> int:
        """The number of its process."""
        return os.getpid()


class ShardedIndex(Searchable):
    """An index whose shards are held by actors, which end with it."""

    def __init__(self, path: Path, cluster: Cluster, verify: bool) -> None:
        import ray

        manifest = read_manifest(path)
        self._patience = cluster.patience_s
        self._names = [record["name"] for record in manifest.shards]
        actor: Any = ray.remote(Holder)
        options = {
            "num_cpus": CPUS,
            "num_gpus": cluster.gpus,
            "max_restarts": -1,
            "max_task_retries": -1,
            "scheduling_strategy": "SPREAD",
        }
        tombstones: dict[str, list[str]] = {name: [] for name in self._names}
        for mark in manifest.deleted:
            tombstones[mark.partition(":")[0]].append(mark)
        threads = cluster.threads or torch.get_num_threads()
        curvature = open_curvature(path, manifest, verify)
        self.holders: list[Any] = [
            actor.options(**options).remote(
                path.resolve(), record, tombstones[record["name"]], manifest.width, verify, scales, threads
            )
            for record, scales in zip(manifest.shards, scales_of(manifest, curvature), strict=True)
        ]
        asked = {number: holder.rows.remote() for number, holder in enumerate(self.holders)}
        super().__init__(path, manifest, list(self._gather(asked).values()), curvature)

    def best(
        self, vectors: torch.Tensor, k: int, normalize: Normalize, largest: bool, allowed: Sequence[NDArray[np.bool_]]
    ) -> Sequence[Best]:
        """All shards at once."""
        import ray

        query = ray.put(vectors.numpy())
        asked = {
            number: holder.best.remote(query, k, normalize, largest, mask)
            for number, (holder, mask) in enumerate(zip(self.holders, allowed, strict=True))
        }
        return list(self._gather(asked).values())

    def stored(
        self, places: Mapping[int, Sequence[int]]
    ) -> Mapping[int, tuple[NDArray[np.float16], NDArray[np.float32]]]:
        """From the actors that hold them."""
        return self._gather({number: self.holders[number].stored.remote(at) for number, at in places.items()})

    def _gather(self, asked: Mapping[int, Any]) -> dict[int, Any]:
        """What the actors answer, by the shards' numbers: all of them, or an error that names the missing."""
        import ray

        _, late = ray.wait(list(asked.values()), num_returns=len(asked), timeout=self._patience)
        found, missing = {}, [number for number, call in asked.items() if call in late]
        for number, call in asked.items():
            if number in missing:
                ray.cancel(call)
                continue
            try:
                found[number] = ray.get(call)
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, HeadwaterError):
                    raise error.cause from None
                raise
            except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError):
                missing.append(number)
        if missing:
            raise ShardsMissing([self._names[number] for number in missing])
        return found

"""Compute: the one thread in which torch works, and the models and indexes that are kept ready for it.

A single thread keeps the event loop free, keeps torch from competing with itself, and lets influence calls slip in
between the steps of a build. Loading happens in other threads: it is mostly reading files, and a query on a model
that is ready should not wait for one that is not.
"""

import asyncio
import contextvars
import gc
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Generic, TypeVar

from app.influence.index import Searchable, open_index
from app.influence.models import LoadedModel, ModelSpec, load

Key = TypeVar("Key")
Value = TypeVar("Value")
Result = TypeVar("Result")
Stamps = dict[str, tuple[int, int, int] | None]  # of each file: its inode, size and time


class Pool(Generic[Key, Value]):
    """The most recently used values, each made once however many ask for it at the same time."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._values: OrderedDict[Key, asyncio.Task[Value]] = OrderedDict()

    async def get(self, key: Key, make: Callable[[], Awaitable[Value]], *, fresh: bool = False) -> Value:
        """The value of the key, made by `make` if it is not there or must be fresh; a failure is not kept."""
        task = self._values.get(key)
        if task is None or fresh:
            task = self._values[key] = asyncio.ensure_future(_run(make))
        self._values.move_to_end(key)
        while len(self._values) > self._size:
            self._values.popitem(last=False)
        try:
            return await asyncio.shield(task)  # one caller hanging up must not stop the others' load
        except BaseException:
            if task.done() and self._values.get(key) is task:
                del self._values[key]
            raise

    def drop(self, key: Key) -> None:
        """Keep the value no longer; who uses it now may go on."""
        self._values.pop(key, None)


async def _run(make: Callable[[], Awaitable[Value]]) -> Value:
    return await make()


class Compute:
    """Runs torch work off the event loop."""

    def __init__(
        self,
        *,
        threads: int,
        model_pool: int,
        index_pool: int,
        open_at: Callable[[Path, bool], Searchable] = open_index,
    ) -> None:
        self._thread = ThreadPoolExecutor(1, "torch", initializer=_use_threads, initargs=(threads,))
        self._models: Pool[ModelSpec, LoadedModel] = Pool(model_pool)
        self._indexes: Pool[Path, Searchable] = Pool(index_pool)
        self._open_at = open_at
        self._versions: dict[Path, int] = {}
        self._stamps: dict[Path, Stamps] = {}  # of the files whose checksums were right
        self._loading = asyncio.Lock()

    async def run(self, work: Callable[[], Result]) -> Result:
        """Do one piece of work in the torch thread; what it logs carries the caller's request and job ids."""
        context = contextvars.copy_context()
        return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: context.run(work))

    async def model(self, spec: ModelSpec, *, fresh: bool = False) -> LoadedModel:
        """The loaded model, from the pool or (fresh) from disk."""

        async def read() -> LoadedModel:
            async with self._loading:  # one at a time: two half-loaded models may not fit where one does
                return await asyncio.to_thread(_load, spec)

        return await self._models.get(spec, read, fresh=fresh)

    async def index(self, path: Path, version: int, *, fresh: bool = False) -> Searchable:
        """The open index; the version is the catalog's and grows with each published change of the files.

        Checksums are verified when this process first opens it, which reads every byte, and again when a file of it
        is no longer the one that was verified (by size and time): a mapped file must not change under a query.

        Raises:
            IndexCorrupt: a shard is not what was written.
        """

        async def reopen() -> Searchable:
            return await asyncio.to_thread(self._open, path)

        newer = version > self._versions.get(path, -1)
        self._versions[path] = max(version, self._versions.get(path, -1))
        index = await self._indexes.get(path, reopen, fresh=fresh or newer)
        if not await asyncio.to_thread(self._is_unchanged, path):
            index = await self._indexes.get(path, reopen, fresh=True)
        return index

    def _open(self, path: Path) -> Searchable:
        index = self._open_at(path, not self._is_unchanged(path))
        self._stamps[path] = _stamps(path, index.manifest.files())
        return index

    def _is_unchanged(self, path: Path) -> bool:
        known = self._stamps.get(path)
        return known is not None and _stamps(path, known) == known

    def forget(self, path: Path) -> None:
        """Keep nothing of an index: its files are gone, and their room is free once nobody maps them."""
        self._indexes.drop(path)
        self._versions.pop(path, None)
        self._stamps.pop(path, None)

    def forget_model(self, spec: ModelSpec) -> None:
        """Keep a model no longer."""
        self._models.drop(spec)
        _settle()

    async def close(self) -> None:
        """Wait for the work in hand, start no more; not on the loop, which that work may be waiting for."""
        await asyncio.to_thread(self._thread.shutdown, wait=True, cancel_futures=True)


def _load(spec: ModelSpec) -> LoadedModel:
    model = load(spec)
    _settle()
    return model


def _settle() -> None:
    """Free what is no longer used, and take what is left out of the garbage collector's sight.

    A process with torch and a model has about a million objects, and a full collection walks all of them while every
    thread stands still: a third of a second, several times a minute under load. Frozen objects are freed by their
    reference counts as before; those in cycles, such as a dropped model, by the next call of this.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()


def _stamps(folder: Path, names: Iterable[str]) -> Stamps:
    found: Stamps = {}
    for name in names:
        try:
            stat = (folder / name).stat()
            found[name] = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        except FileNotFoundError:
            found[name] = None
    return found


def _use_threads(threads: int) -> None:
    if threads:
        import torch

        torch.set_num_threads(threads)

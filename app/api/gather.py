"""Gathering: influence calls that arrive together share one forward and backward pass.

A call waits in a bounded queue for a few milliseconds, or for as long as the pass before it takes. Then the oldest
call and everything that asks the same index in the same way go into one library call. When a shared call fails, each
of its queries is asked again alone, so that a bad query fails nobody but itself. A call whose client hung up is
dropped before its pass.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from app.api.metrics import Metrics
from app.influence.corpus import Row
from app.influence.errors import ShardsMissing
from app.influence.index import Searchable
from app.influence.models import LoadedModel
from app.influence.retrieval import Answer, Options, Query, influence
from app.jobs.compute import Compute
from app.problems import Refusal

RETRY_AFTER_S = 1
Result = TypeVar("Result")


@dataclass(frozen=True)
class Target:
    """What a call asks: calls to the same target in the same way may share a pass."""

    model: LoadedModel
    index: Searchable
    row_of: Callable[[str], Row]
    key: tuple[str, int]  # the index's id and version


@dataclass(eq=False)
class _Call:
    target: Target
    options: Options
    query: Query
    answer: "asyncio.Future[Answer]" = field(repr=False)

    @property
    def group(self) -> tuple[tuple[str, int], Options]:
        return self.target.key, self.options


class Gatherer:
    """The bounded queue in front of the torch thread."""

    def __init__(self, compute: Compute, metrics: Metrics, *, window_s: float, max_batch: int, length: int) -> None:
        self._compute = compute
        self._metrics = metrics
        self._window = window_s
        self._max_batch = max_batch
        self._length = length
        self._waiting: list[_Call] = []
        self._preparing = 0
        self._dispatcher: asyncio.Task[None] | None = None

    def require_room(self, calls: int = 1) -> None:
        """Refuse when so many more calls would not fit."""
        waiting = len(self._waiting) + self._preparing
        if waiting + calls > self._length:
            self._metrics.refused.inc()
            detail = f"{waiting} influence calls are waiting already; try again shortly"
            raise Refusal(503, "busy", detail, headers={"Retry-After": str(RETRY_AFTER_S)})

    async def prepare(self, work: Callable[[], Result]) -> Result:
        """Torch work that a call needs before it can ask (the model writes the generation); it takes room as well."""
        self.require_room()
        self._preparing += 1
        try:
            return await self._compute.run(work)
        finally:
            self._preparing -= 1

    async def ask(self, target: Target, query: Query, options: Options) -> Answer:
        """The answer to one query; cancelling this coroutine drops the query."""
        self.require_room()
        call = _Call(target, options, query, asyncio.get_running_loop().create_future())
        self._waiting.append(call)
        self._metrics.waiting.set(len(self._waiting))
        if self._dispatcher is None or self._dispatcher.done():
            self._dispatcher = asyncio.create_task(self._dispatch(), name="gather")
        return await call.answer

    def refuse_waiting(self) -> None:
        """The process ends before it gets to the calls that wait: say so, rather than break their connections."""
        for call in self._waiting:
            if not call.answer.done():
                detail = "the service is going down before it could answer; ask again"
                call.answer.set_exception(Refusal(503, "shutting-down", detail, headers={"Retry-After": "5"}))

    async def close(self) -> None:
        """Let nobody wait for an answer that will not come."""
        if self._dispatcher is not None:
            self._dispatcher.cancel()
        for call in self._waiting:
            call.answer.cancel()

    async def _dispatch(self) -> None:
        await asyncio.sleep(self._window)
        while batch := self._take():
            await self._answer(batch)

    def _take(self) -> list[_Call]:
        """The oldest call and those that can share its pass; calls that nobody waits for any more are dropped."""
        wanted = [call for call in self._waiting if not call.answer.done()]
        self._metrics.dropped.inc(len(self._waiting) - len(wanted))
        batch = [call for call in wanted if call.group == wanted[0].group][: self._max_batch]
        self._waiting = [call for call in wanted if call not in batch]
        self._metrics.waiting.set(len(self._waiting))
        return batch

    async def _answer(self, batch: list[_Call]) -> None:
        self._metrics.batch_size.observe(len(batch))
        target, options, queries = batch[0].target, batch[0].options, [call.query for call in batch]
        began = time.perf_counter()
        try:
            work = partial(influence, target.model, target.index, queries, options, target.row_of)
            answers = await self._compute.run(work)
            for call, answer in zip(batch, answers, strict=True):
                if not call.answer.done():
                    call.answer.set_result(answer)
        except Exception as error:
            if len(batch) == 1 or isinstance(error, ShardsMissing):  # the latter is no query's fault
                for call in batch:
                    if not call.answer.done():
                        call.answer.set_exception(error)
                return
            for call in batch:
                if not call.answer.done():
                    await self._answer([call])
            return
        finally:
            self._metrics.pass_seconds.observe(time.perf_counter() - began)

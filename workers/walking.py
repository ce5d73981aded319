"""The steps of the library, one at a time in the torch thread."""

from collections.abc import AsyncGenerator, Callable, Iterator
from functools import partial
from typing import Any, TypeVar

from app.jobs.compute import Compute
from app.jobs.progress import Step

Told = TypeVar("Told")


async def walk(compute: Compute, steps: Iterator[Told], told: Callable[[Told], Step]) -> AsyncGenerator[Step]:
    """What each step says, for the runner; the library's work is closed when the runner stops asking."""
    try:
        while (one := await compute.run(partial(_next, steps))) is not None:
            yield told(one)
    finally:
        await compute.run(partial(_close, steps))


def _next(steps: Iterator[Told]) -> Told | None:
    return next(steps, None)


def _close(steps: Iterator[Any]) -> None:
    close = getattr(steps, "close", None)
    if close is not None:
        close()

"""The steps of the library, one at a time in a thread, while the event loop goes on."""

from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from functools import partial
from typing import Any, TypeVar

Told = TypeVar("Told")
Run = Callable[[Callable[[], Any]], Awaitable[Any]]
"""Does a call in a thread, as `Compute.run` does."""


async def walk(steps: Iterator[Told], run: Run) -> AsyncGenerator[Told]:
    """What each step says; the library's work is closed when nobody asks any more."""
    try:
        while (one := await run(partial(_next, steps))) is not None:
            yield one
    finally:
        await run(partial(_close, steps))


def _next(steps: Iterator[Told]) -> Told | None:
    return next(steps, None)


def _close(steps: Iterator[Any]) -> None:
    close = getattr(steps, "close", None)
    if close is not None:
        close()

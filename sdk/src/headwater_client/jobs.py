"""Jobs as objects: watched, waited for, cancelled, and what they made fetched.

`Job` and `AsyncJob` say the same in two ways; what they do is written once, in `_Handle`.
"""

import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing
from html import escape
from pathlib import Path, PurePosixPath
from typing import Generic, Self, TypeVar

from headwater_client import _operations as operations
from headwater_client._core import Core, iterate, run
from headwater_client._operations import Call
from headwater_client._progress import Printer, told
from headwater_client.errors import JobCancelled, JobFailed, JobTimeout, UnexpectedAnswer
from headwater_client.models import Answer, Artifact, JobInfo

Accepted = TypeVar("Accepted", bound=Answer)
Made = TypeVar("Made")
Watch = bool | Callable[[JobInfo], object]
FIRST_LOOK_S, LONGEST_LOOK_S = 0.1, 2.0  # apart; a short job is not waited for long, a long one not asked often


class _Handle(Generic[Accepted, Made]):
    def __init__(self, core: Core, accepted: Accepted, info: JobInfo, made: Callable[[JobInfo], Call[Made]]) -> None:
        self._core = core
        self._made = made
        self.accepted = accepted
        self.info = info

    @property
    def id(self) -> str:
        """The job's id."""
        return self.info.id

    @property
    def state(self) -> str:
        """`queued`, `running`, `succeeded`, `failed` or `cancelled`, as it was when it was last looked at."""
        return self.info.state

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id}: {told(self.info)}>"

    def _repr_html_(self) -> str:
        return f"<code>{escape(self.id)}</code> {escape(told(self.info))}"

    async def _refresh(self) -> JobInfo:
        self.info = await self._core.call(operations.get_job(self.id))
        return self.info

    async def _wait(self, timeout: float | None, progress: Watch) -> None:  # noqa: ASYNC109 a blocking wait too
        watch = Printer() if progress is True else progress
        end = None if timeout is None else time.monotonic() + timeout
        pause = FIRST_LOOK_S
        while not (await self._refresh()).ended:
            if callable(watch):
                watch(self.info)
            if end is not None and time.monotonic() + pause > end:
                raise JobTimeout(f"job {self.id} had not ended after {timeout} s ({told(self.info)}); it goes on")
            await self._core.transport.sleep(pause)
            pause = min(pause * 1.5, LONGEST_LOOK_S)
        if callable(watch):
            watch(self.info)
        self._require_success()

    def _require_success(self) -> None:
        if self.state == "succeeded":
            return
        error = self.info.error
        if self.state == "cancelled":
            raise JobCancelled(self.id, "cancelled", "somebody cancelled it; `retry` runs it from where it stopped")
        code, detail = (error.code, error.detail) if error else (self.state, "no reason was given")
        raise JobFailed(self.id, code, detail)

    async def _result(self, timeout: float | None) -> Made:  # noqa: ASYNC109 as _wait
        await self._wait(timeout, progress=False)
        return await self._core.call(self._made(self.info))

    async def _events(self) -> AsyncGenerator[JobInfo, None]:
        async with aclosing(self._core.events(self.id)) as events:
            async for info in events:
                self.info = info
                yield info

    async def _change(self, call: Call[JobInfo]) -> None:
        self.info = await self._core.call(call)

    async def _artifacts(self) -> list[Artifact]:
        return (await self._core.call(operations.list_artifacts(self.id))).items

    async def _download(self, folder: Path | str, paths: tuple[str, ...]) -> list[Path]:
        wanted = list(paths) or [artifact.path for artifact in await self._artifacts()]
        targets = [_inside(Path(folder), path) for path in wanted]
        for path, target in zip(wanted, targets, strict=True):
            await self._core.download(self.id, path, target)
        return targets

    async def _read(self, path: str) -> bytes:
        return await self._core.call(operations.get_artifact(self.id, path))


def _inside(folder: Path, path: str) -> Path:
    """Where an artifact goes; a service that is not to be trusted names no file outside the folder."""
    pure = PurePosixPath(path)
    target = folder.joinpath(*pure.parts)
    if pure.is_absolute() or ".." in pure.parts or not target.resolve().is_relative_to(folder.resolve()):
        raise UnexpectedAnswer(f"the artifact {path!r} would lie outside {folder}")
    return target


class Job(_Handle[Accepted, Made]):
    """A job of a `Client`; `accepted` is what the service answered when it took the job."""

    def refresh(self) -> JobInfo:
        """Look at it."""
        return run(self._refresh())

    def wait(self, timeout: float | None = None, progress: Watch = False) -> Self:
        """Return once it has succeeded.

        Args:
            timeout: seconds; None: as long as it takes.
            progress: True prints a bar with the time left; a function gets the job each time that it is looked at.

        Raises:
            JobFailed, JobCancelled: it ended otherwise. JobTimeout: it goes on.
        """
        run(self._wait(timeout, progress))
        return self

    def result(self, timeout: float | None = None) -> Made:
        """What it made, once it has succeeded; waits for that."""
        return run(self._result(timeout))

    def events(self) -> Iterator[JobInfo]:
        """The job whenever it changes, up to its end; a connection that is lost is taken up where it was."""
        return iterate(self._events())

    def cancel(self) -> Self:
        """Cancel it: at once if it waits, after its step if it runs."""
        run(self._change(operations.cancel_job(self.id)))
        return self

    def retry(self) -> Self:
        """Run it again from where it stopped, if it failed or was cancelled."""
        run(self._change(operations.retry_job(self.id)))
        return self

    def artifacts(self) -> list[Artifact]:
        """The files that it has made so far."""
        return run(self._artifacts())

    def download(self, folder: Path | str, *paths: str) -> list[Path]:
        """Fetch artifacts into a folder of this machine, all of them or those that are named; where they lie now."""
        return run(self._download(folder, paths))

    def read(self, path: str) -> bytes:
        """One artifact's bytes."""
        return run(self._read(path))


class AsyncJob(_Handle[Accepted, Made]):
    """A job of an `AsyncClient`; everything as in `Job`."""

    async def refresh(self) -> JobInfo:
        """Look at it."""
        return await self._refresh()

    async def wait(self, timeout: float | None = None, progress: Watch = False) -> Self:  # noqa: ASYNC109 as in Job
        """Return once it has succeeded; as `Job.wait`."""
        await self._wait(timeout, progress)
        return self

    async def result(self, timeout: float | None = None) -> Made:  # noqa: ASYNC109 as in Job
        """What it made, once it has succeeded; waits for that."""
        return await self._result(timeout)

    def events(self) -> AsyncIterator[JobInfo]:
        """The job whenever it changes, up to its end; a connection that is lost is taken up where it was."""
        return self._events()

    async def cancel(self) -> Self:
        """Cancel it: at once if it waits, after its step if it runs."""
        await self._change(operations.cancel_job(self.id))
        return self

    async def retry(self) -> Self:
        """Run it again from where it stopped, if it failed or was cancelled."""
        await self._change(operations.retry_job(self.id))
        return self

    async def artifacts(self) -> list[Artifact]:
        """The files that it has made so far."""
        return await self._artifacts()

    async def download(self, folder: Path | str, *paths: str) -> list[Path]:
        """Fetch artifacts into a folder of this machine, all of them or those that are named; where they lie now."""
        return await self._download(folder, paths)

    async def read(self, path: str) -> bytes:
        """One artifact's bytes."""
        return await self._read(path)

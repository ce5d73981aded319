"""How a call becomes an answer: retries, keys, problems, pages, events. Written once, for both clients.

All of it is coroutines over a `Transport`. `AsyncClient` awaits them. `Client` runs them to their end with `run`: its
transport does its work before it returns, so a coroutine over it never waits for an event loop, and none is needed.
"""

import asyncio
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Coroutine, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Protocol, TypeVar
from uuid import uuid4

import httpx2
from pydantic import ValidationError

from headwater_client import _operations as operations
from headwater_client._operations import Call
from headwater_client.errors import ConnectionFailed, HeadwaterError, Problem, UnexpectedAnswer, problem
from headwater_client.models import JobInfo, Page

T = TypeVar("T")
LATER = (429, 502, 503, 504)
UNDONE = (429, 503)
"""Of these, what the service says before it does anything; a proxy says the others when it lost the answer."""
UNSENT = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout)
"""Failures after which the service cannot have done anything."""
IN_FLIGHT = "request-in-flight"
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 8.0
QUIET_S = 60.0  # a stream of events says something every 15 s, if it lives


class Transport(Protocol):
    """What differs between the two clients."""

    async def send(self, method: str, url: str, options: Mapping[str, Any]) -> httpx2.Response:
        """Send a request and read its answer."""

    def stream(self, method: str, url: str, options: Mapping[str, Any]) -> AbstractAsyncContextManager[httpx2.Response]:
        """Send a request; the answer's body is read as it comes."""

    def events(self, response: httpx2.Response) -> AsyncIterator[httpx2.ServerSentEvent]:
        """The server-sent events of a streamed answer."""

    def chunks(self, response: httpx2.Response) -> AsyncIterator[bytes]:
        """The bytes of a streamed answer."""

    async def read(self, response: httpx2.Response) -> bytes:
        """All of a streamed answer."""

    async def sleep(self, seconds: float) -> None:
        """Wait."""


@dataclass(frozen=True)
class Core:
    """A service, and how patient to be with it."""

    transport: Transport
    retries: int
    longest_wait_s: float

    async def call(self, call: Call[T]) -> T:
        """The answer.

        Raises:
            Problem: the service refused. ConnectionFailed: it did not answer. UnexpectedAnswer: it is no Headwater.
        """
        headers = dict(call.request.headers)
        if call.makes:
            headers.setdefault("Idempotency-Key", uuid4().hex)  # one for all attempts: the thing is made once
        for attempt in range(self.retries + 1):
            try:
                response = await self._attempt(call, headers)
            except httpx2.TransportError as error:
                again = call.repeatable or isinstance(error, UNSENT)
                if attempt == self.retries or not again:
                    raise _no_answer(call, error) from error
                await self.transport.sleep(_backoff(attempt))
                continue
            if not response.is_error:
                return call.request.read(response)
            refused = refusal(response)
            wait = self._wait(refused, attempt, call.repeatable)
            if wait is None:
                raise refused
            await self.transport.sleep(wait)
        raise AssertionError("the last attempt answers or raises")

    async def _attempt(self, call: Call[T], headers: Mapping[str, str]) -> httpx2.Response:
        request = call.request
        options: dict[str, Any] = {"headers": headers, "params": request.query}
        if request.file is None:
            if request.body is not None:
                options["json"] = request.body
            return await self.transport.send(call.method, call.url, options)
        with request.file() as file:  # from its start, for each attempt
            options |= {"data": request.body, "files": {"file": file}}
            return await self.transport.send(call.method, call.url, options)

    def _wait(self, refused: Problem, attempt: int, repeatable: bool) -> float | None:
        """How long to wait before the next attempt; None: there is none."""
        again = refused.status in (LATER if repeatable else UNDONE) or refused.slug == IN_FLIGHT
        if attempt == self.retries or not again:
            return None
        wait = _backoff(attempt) if refused.retry_after is None else refused.retry_after
        return wait if wait <= self.longest_wait_s else None

    async def pages(self, call: Call[Page[T]]) -> AsyncGenerator[T, None]:
        """The items of all pages; the next page is asked for when it is needed."""
        while True:
            page = await self.call(call)
            for item in page.items:
                yield item
            if page.next_cursor is None:
                return
            query = {**call.request.query, "cursor": page.next_cursor}
            call = replace(call, request=replace(call.request, query=query))

    async def events(self, job: str) -> AsyncGenerator[JobInfo, None]:
        """The job whenever it changes, up to and with its end; a lost connection is taken up behind the last event."""
        seen, failures, pause = "", 0, 1.0
        while True:
            call = operations.watch_job(job, seen)
            options = {"headers": dict(call.request.headers), "timeout": httpx2.Timeout(QUIET_S, connect=10.0)}
            try:
                async with self.transport.stream("GET", call.url, options) as response:
                    if response.is_error:
                        await self.transport.read(response)
                        raise refusal(response)
                    async for event in self.transport.events(response):
                        seen, failures = event.id or seen, 0
                        pause = event.retry / 1000 if event.retry is not None else pause
                        if event.event in ("progress", "end"):
                            yield _told(event.data)
                        if event.event == "end":
                            return
            except (httpx2.TransportError, Problem) as error:
                if isinstance(error, Problem) and error.status not in LATER:
                    raise
                if failures == self.retries:
                    raise error if isinstance(error, Problem) else _no_answer(call, error) from error
                wait = getattr(error, "retry_after", None)
                await self.transport.sleep(max(pause, _backoff(failures)) if wait is None else wait)
            else:  # the service is going down in order
                if failures == self.retries:
                    raise ConnectionFailed(f"the events of job {job} ended without its end")
                await self.transport.sleep(pause)
            failures += 1

    async def download(self, job: str, path: str, target: Path) -> None:
        """Write an artifact to a file, which appears when it is whole."""
        call = operations.get_artifact(job, path)
        part = target.with_name(target.name + ".part")
        target.parent.mkdir(parents=True, exist_ok=True)
        for attempt in range(self.retries + 1):
            try:
                async with self.transport.stream("GET", call.url, {}) as response:
                    if response.is_error:
                        await self.transport.read(response)
                        raise refusal(response)
                    with part.open("wb") as file:
                        async for chunk in self.transport.chunks(response):
                            file.write(chunk)
            except httpx2.TransportError as error:
                if attempt == self.retries:
                    part.unlink(missing_ok=True)
                    raise _no_answer(call, error) from error
                await self.transport.sleep(_backoff(attempt))
            except Problem as refused:
                wait = self._wait(refused, attempt, repeatable=True)
                if wait is None:
                    raise
                await self.transport.sleep(wait)
            else:
                part.replace(target)
                return


def _told(data: str) -> JobInfo:
    try:
        return JobInfo.model_validate_json(data)
    except ValidationError as error:
        raise UnexpectedAnswer(f"an event does not tell of a job as Headwater does: {data[:200]}") from error


def _backoff(attempt: int) -> float:
    """Doubled with each attempt, and different for each client that lost the same service."""
    return min(FIRST_WAIT_S * 2.0**attempt, LONGEST_WAIT_S) * random.uniform(0.5, 1)  # noqa: S311 not for secrets


def _no_answer(call: Call[Any], error: Exception) -> HeadwaterError:
    why = str(error) or type(error).__name__
    return ConnectionFailed(f"{call.method} {call.url}: the service did not answer ({why}); is it up, and at this URL?")


def refusal(response: httpx2.Response) -> Problem:
    """The problem of an error answer.

    Raises:
        UnexpectedAnswer: it is no problem document, and nothing to try again.
    """
    wait = _retry_after(response.headers.get("Retry-After"))
    try:
        body = response.json()
    except ValueError:
        body = None
    if isinstance(body, dict) and "type" in body:
        return problem(response.status_code, body, wait)
    if response.status_code in LATER:  # a proxy's, before a service that is away
        return problem(response.status_code, {"title": response.reason_phrase}, wait)
    text = response.text[:200].replace("\n", " ")
    raise UnexpectedAnswer(f"{response.request.url} answered {response.status_code}, not as Headwater does: {text}")


def _retry_after(header: str | None) -> float | None:
    """Seconds; the header has them, or a date."""
    if header is None:
        return None
    try:
        return max(float(header), 0.0)
    except ValueError:
        pass
    try:
        when = parsedate_to_datetime(header)
    except ValueError:
        return None
    return max((when.replace(tzinfo=when.tzinfo or UTC) - datetime.now(UTC)).total_seconds(), 0.0)


class BlockingTransport:
    """Its coroutines have done their work when they return."""

    def __init__(self, http: httpx2.Client) -> None:
        self.http = http

    async def send(self, method: str, url: str, options: Mapping[str, Any]) -> httpx2.Response:
        """As `Transport` says."""
        return self.http.request(method, url, **options)

    @asynccontextmanager
    async def stream(self, method: str, url: str, options: Mapping[str, Any]) -> AsyncIterator[httpx2.Response]:
        """As `Transport` says."""
        with self.http.stream(method, url, **options) as response:
            yield response

    async def events(self, response: httpx2.Response) -> AsyncIterator[httpx2.ServerSentEvent]:
        """As `Transport` says."""
        for event in httpx2.EventSource(response):
            yield event

    async def chunks(self, response: httpx2.Response) -> AsyncIterator[bytes]:
        """As `Transport` says."""
        for chunk in response.iter_bytes():
            yield chunk

    async def read(self, response: httpx2.Response) -> bytes:
        """As `Transport` says."""
        return response.read()

    async def sleep(self, seconds: float) -> None:
        """As `Transport` says."""
        time.sleep(seconds)  # noqa: ASYNC251 no event loop runs this


class AwaitingTransport:
    """Over an event loop."""

    def __init__(self, http: httpx2.AsyncClient) -> None:
        self.http = http

    async def send(self, method: str, url: str, options: Mapping[str, Any]) -> httpx2.Response:
        """As `Transport` says."""
        return await self.http.request(method, url, **options)

    def stream(self, method: str, url: str, options: Mapping[str, Any]) -> AbstractAsyncContextManager[httpx2.Response]:
        """As `Transport` says."""
        return self.http.stream(method, url, **options)

    async def events(self, response: httpx2.Response) -> AsyncIterator[httpx2.ServerSentEvent]:
        """As `Transport` says."""
        async for event in httpx2.EventSource(response):
            yield event

    async def chunks(self, response: httpx2.Response) -> AsyncIterator[bytes]:
        """As `Transport` says."""
        async for chunk in response.aiter_bytes():
            yield chunk

    async def read(self, response: httpx2.Response) -> bytes:
        """As `Transport` says."""
        return await response.aread()

    async def sleep(self, seconds: float) -> None:
        """As `Transport` says."""
        await asyncio.sleep(seconds)


def run(work: Coroutine[Any, Any, T] | Awaitable[T]) -> T:
    """Run a coroutine over a blocking transport to its end, at once."""
    try:
        work.__await__().send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    raise AssertionError("a blocking transport never waits for an event loop")


def iterate(items: AsyncGenerator[T, None]) -> Iterator[T]:
    """The items of an asynchronous generator over a blocking transport."""
    try:
        while True:
            try:
                item = run(anext(items))
            except StopAsyncIteration:
                return
            yield item
    finally:
        run(items.aclose())

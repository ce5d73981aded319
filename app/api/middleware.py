"""Pure ASGI middleware: the request log, the limit on a body's size, what a browser is told about every answer.

Pure ASGI rather than Starlette's BaseHTTPMiddleware, which would hide a client's disconnect from the endpoint.
"""

import time

import structlog
from asgi_correlation_id import correlation_id
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.metrics import Metrics
from app.problems import Refusal, respond

log = structlog.get_logger(__name__)


class RequestLog:
    """Logs and counts each request, and turns an error that nobody expected into a problem that leaks nothing."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one connection on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, began = 0, time.perf_counter()

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=correlation_id.get()):
            try:
                await self._app(scope, receive, watch)
            except Exception as error:
                log.exception("unexpected error", method=scope["method"], path=scope["path"])
                if status:  # the answer is on its way: all that is left is to break the connection
                    raise
                await respond(error)(scope, receive, watch)
            finally:
                self._note(scope, status, time.perf_counter() - began)

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "unmatched")
        self._metrics.requests.labels(scope["method"], route, status).inc()
        self._metrics.request_seconds.labels(route).observe(seconds)
        log.info("request", method=scope["method"], path=scope["path"], status=status, seconds=round(seconds, 4))


class BodyLimit:
    """Refuses a body above the limit with 413: at once if it announces its length, else as soon as it has come too far.

    FastAPI's own `max_body_size` does the counting too, but answers in plain text.
    """

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one connection on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdigit() and int(announced) > self._limit:
            await respond(self._refusal())(scope, receive, send)
            return
        seen = 0

        async def count() -> Message:
            nonlocal seen
            message = await receive()
            if message["type"] == "http.request":
                seen += len(message.get("body", b""))
                if seen > self._limit:
                    raise self._refusal()
            return message

        await self._app(scope, count, send)

    def _refusal(self) -> Refusal:
        detail = f"the request body may have at most {self._limit:,} bytes"
        # close: otherwise the client sends the rest of its body into the void before it reads the answer
        return Refusal(413, "too-large", detail, field="body", headers={"Connection": "close"})


class SecurityHeaders:
    """Tells a browser to take an answer for nothing but what it says it is; a page sets a wider policy itself."""

    HEADERS = (
        ("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'"),
        ("X-Content-Type-Options", "nosniff"),
        ("Referrer-Policy", "no-referrer"),
    )

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one connection on."""

        async def tell(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in self.HEADERS:
                    headers.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, tell)

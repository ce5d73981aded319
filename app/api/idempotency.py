"""`Idempotency-Key`: a POST that makes something is done once, however often it is sent.

The first request claims the key, the answer is kept under it, and the same request gets the same answer. A request
that failed releases its key, so that it can be tried again. The hash covers what was said, not how: a multipart body
is hashed by its fields and files, since its boundary differs from one attempt to the next.
"""

import hashlib
from collections.abc import Callable, Coroutine
from datetime import timedelta
from typing import Any, BinaryIO

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from app.api.callers import Caller, caller_of
from app.api.services import get_services
from app.catalog.tables import IdempotencyKey
from app.problems import Refusal

HEADER = "Idempotency-Key"
REPLAYED = "Idempotency-Replayed"
KEPT_HEADERS = ("content-type", "location", "retry-after")
Handler = Callable[[Request], Coroutine[Any, Any, Response]]
PARAMETER = {
    "name": HEADER,
    "in": "header",
    "required": False,
    "schema": {"type": "string", "minLength": 1, "maxLength": 200},
    "description": "Makes the request safe to repeat: the same key and body give the first answer again; another body "
    "under the same key is refused with 422, a first request that is still at work with 409.",
    "example": "6f1c2f0e-build-facts",
}


class IdempotentRoute(APIRoute):
    """A route whose POSTs honour the header, and say so in the OpenAPI document."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.methods and "POST" in self.methods:
            self.openapi_extra = {**(self.openapi_extra or {}), "parameters": [PARAMETER]}

    def get_route_handler(self) -> Handler:
        """Wrap the endpoint."""
        handler = super().get_route_handler()
        if not self.methods or "POST" not in self.methods:
            return handler

        async def once(request: Request) -> Response:
            key = request.headers.get(HEADER)
            if key is None:
                return await handler(request)
            try:
                return await _once(request, key, handler)
            finally:
                await request.close()  # an upload's spooled file, also where the endpoint never saw it

        return once


async def _once(request: Request, key: str, handler: Handler) -> Response:
    if not 0 < len(key) <= 200:
        raise Refusal(422, "bad-idempotency-key", "the key must have 1 to 200 characters", field=HEADER)
    services = get_services(request)
    key = _owned(key, caller_of(request))
    digest = await _digest(request)
    async with services.database.catalog() as catalog:
        earlier = await catalog.keys.claim(key, digest, timedelta(hours=services.settings.idempotency_ttl_h))
    if earlier is not None:
        return _replay(earlier, digest)
    try:
        response = await handler(request)
    except BaseException:
        async with services.database.catalog() as catalog:
            await catalog.keys.release(key)
            await catalog.commit()
        raise
    kept = {name: value for name, value in response.headers.items() if name in KEPT_HEADERS}
    async with services.database.catalog() as catalog:
        await catalog.keys.answer(key, response.status_code, kept, bytes(response.body).decode())
        await catalog.commit()
    return response


def _owned(key: str, caller: Caller) -> str:
    """The key as it is kept: nobody meets the answer, or the claim, of a key that somebody else chose alike."""
    return hashlib.sha256(f"{caller.key_id or ''}\n{key}".encode()).hexdigest()


def _replay(earlier: IdempotencyKey, digest: str) -> Response:
    if earlier.request_hash != digest:
        raise Refusal(422, "idempotency-key-reused", "this key was used for a different request", field=HEADER)
    if earlier.status is None:
        detail = "the first request with this key is still at work"
        raise Refusal(409, "request-in-flight", detail, field=HEADER, headers={"Retry-After": "1"})
    return Response(earlier.body, earlier.status, {**earlier.headers, REPLAYED: "true"})


async def _digest(request: Request) -> str:
    digest = hashlib.sha256(f"{request.method} {request.url.path}\n".encode())
    if request.headers.get("content-type", "").startswith("multipart/"):
        form = await request.form()  # spooled to disk, and kept on the request for the endpoint
        for name, value in sorted(form.multi_items(), key=lambda item: item[0]):
            digest.update(f"{name}\n".encode())
            if isinstance(value, UploadFile):
                digest.update(f"{value.filename}\n".encode())
                digest.update(await run_in_threadpool(_digest_file, value.file))
            else:
                digest.update(value.encode())
    else:
        digest.update(await request.body())
    return digest.hexdigest()


def _digest_file(file: BinaryIO) -> bytes:
    digest = hashlib.sha256()
    while chunk := file.read(1024 * 1024):
        digest.update(chunk)
    file.seek(0)
    return digest.digest()

"""Every error leaves as RFC 9457 problem+json, and every translation from exception to status is in this file.

Refusal            raised by the HTTP layer itself: says its own status
CatalogError       NotFound 404; AlreadyExists, Conflict, Damaged 409; Unavailable, WrongSchema 503
HeadwaterError     Row-, Query-, Model- and SpecError 422; Mismatch, IndexMissing, IndexCorrupt,
                   FactorsMissing, FactorsCorrupt 409;
                   Shards-, BuildersMissing 503; DiskFull 507
IntegrityError     409: somebody else was quicker
DataError          422: a value that the database has no room for
validation         422, one entry a field
anything else      500 that says nothing but the request's id; the log has the rest
"""

import errno
import json
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from asgi_correlation_id import correlation_id
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel, Field
from sqlalchemy.exc import DataError, IntegrityError, OperationalError
from starlette.exceptions import HTTPException
from starlette.routing import Match

from app.catalog.errors import AlreadyExists, CatalogError, Conflict, Damaged, NotFound, Unavailable, WrongSchema
from app.influence.errors import (
    BuildersMissing,
    DiskFull,
    FactorsCorrupt,
    FactorsMissing,
    HeadwaterError,
    IndexCorrupt,
    IndexMissing,
    Mismatch,
    ModelError,
    QueryError,
    RowError,
    ShardsMissing,
    SpecError,
)

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_S = 5  # about what a database needs to come back
PG_DISK_FULL = "53100"


class FieldError(BaseModel):
    """One thing that is wrong with a request."""

    field: str = Field(description="Dotted path of the field at fault.", examples=["projection.size"])
    message: str = Field(description="What is wrong with it.", examples=["Input should be greater than 0"])


class Problem(BaseModel):
    """What every error answer looks like (RFC 9457)."""

    type: str = Field(description="Which kind of problem.", examples=["urn:headwater:problem:not-found"])
    title: str = Field(description="The kind in words; the same for every problem of the type.", examples=["Not found"])
    status: int = Field(description="The HTTP status.", examples=[404])
    detail: str = Field(description="What happened here.", examples=["there is no index 'facts'"])
    errors: list[FieldError] = Field(default_factory=list, description="The fields at fault.")
    request_id: str | None = Field(None, description="The X-Request-ID of this request, as the log has it.")


class Refusal(Exception):
    """The HTTP layer refuses a request."""

    def __init__(
        self, status: int, slug: str, detail: str, *, field: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.slug = slug
        self.detail = detail
        self.field = field
        self.headers = headers


KINDS: dict[type[Exception], tuple[int, str]] = {
    NotFound: (404, "not-found"),
    AlreadyExists: (409, "already-exists"),
    Conflict: (409, "conflict"),
    Damaged: (409, "index-corrupt"),
    Unavailable: (503, "database-away"),
    WrongSchema: (503, "wrong-schema"),
    RowError: (422, "bad-row"),
    QueryError: (422, "bad-query"),
    ModelError: (422, "bad-model"),
    SpecError: (422, "bad-index"),
    Mismatch: (409, "model-mismatch"),
    FactorsMissing: (409, "factors-missing"),
    FactorsCorrupt: (409, "factors-corrupt"),
    IndexMissing: (409, "index-missing"),
    IndexCorrupt: (409, "index-corrupt"),
    ShardsMissing: (503, "shards-missing"),
    BuildersMissing: (503, "builders-missing"),
    DiskFull: (507, "disk-full"),
}


def problem_of(error: Exception) -> tuple[Problem, Mapping[str, str] | None]:
    """The problem that an exception means, and the headers that go with it."""
    if isinstance(error, Refusal):
        return make(error.status, error.slug, error.detail, one(error.field, error.detail)), error.headers
    if isinstance(error, RequestValidationError):
        return _invalid(error.errors()), None
    if isinstance(error, HTTPException):
        phrase = HTTPStatus(error.status_code).phrase
        return make(error.status_code, phrase.lower().replace(" ", "-"), str(error.detail)), error.headers
    if isinstance(error, CatalogError | HeadwaterError):
        for kind in type(error).__mro__:
            if kind in KINDS:
                status, slug = KINDS[kind]
                headers = {"Retry-After": str(RETRY_AFTER_S)} if status == 503 else None
                return make(status, slug, error.detail, one(error.field, error.detail)), headers
    if isinstance(error, IntegrityError):
        return make(409, "conflict", "another request changed the same thing at this moment: look and try again"), None
    if isinstance(error, DataError):
        return make(422, "invalid-request", "a value is out of range, or holds a NUL character"), None
    if _is_full_disk(error):
        return make(507, "disk-full", "the disk is full; nothing was kept"), None
    return make(500, "internal", "an unexpected error; the log has it under this request_id"), None


def _is_full_disk(error: Exception) -> bool:
    if isinstance(error, OperationalError):  # SQLite has no errno to look at
        return "disk is full" in str(error.orig) or getattr(error.orig, "sqlstate", None) == PG_DISK_FULL
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def make(status: int, slug: str, detail: str, errors: Sequence[FieldError] = ()) -> Problem:
    """A problem of the current request."""
    return Problem(
        type=f"urn:headwater:problem:{slug}",
        title=slug.replace("-", " ").capitalize(),
        status=status,
        detail=detail,
        errors=list(errors),
        request_id=correlation_id.get(),
    )


def one(field: str | None, message: str) -> list[FieldError]:
    """The list of the one field at fault, if there is one."""
    return [FieldError(field=field, message=message)] if field else []


def _invalid(errors: Sequence[Any]) -> Problem:
    found = [FieldError(field=_path(error["loc"]), message=error["msg"]) for error in errors]
    what = ", ".join(f"{error.field}: {error.message}" for error in found)
    return make(422, "invalid-request", what, found)


def _path(location: Sequence[str | int]) -> str:
    inside = location[1:] if len(location) > 1 and location[0] in ("body", "query", "path", "header") else location
    return ".".join(str(part) for part in inside)


def respond(error: Exception) -> Response:
    """The answer to an exception."""
    problem, headers = problem_of(error)
    # half a surrogate pair, from a name that the client chose, is no UTF-8; as an escape it is JSON
    body = json.dumps(problem.model_dump(), ensure_ascii=False).encode(errors="backslashreplace")
    return Response(body, problem.status, dict(headers) if headers else None, MEDIA_TYPE)


async def _handle(request: Request, error: Exception) -> Response:
    response = respond(error)
    if response.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        response.headers["Allow"] = _allowed(request)
    return response


def _allowed(request: Request) -> str:
    """All methods of an address; the router names those of the first operation that it found there."""
    routes = request.app.routes
    fit = (m for m in METHODS if any(r.matches({**request.scope, "method": m})[0] is Match.FULL for r in routes))
    return ", ".join(fit)


def install(app: FastAPI) -> None:
    """Make every expected error of the app a problem; the request log does so for the unexpected."""
    for kind in (
        Refusal,
        CatalogError,
        HeadwaterError,
        IntegrityError,
        DataError,
        RequestValidationError,
        HTTPException,
    ):
        app.add_exception_handler(kind, _handle)

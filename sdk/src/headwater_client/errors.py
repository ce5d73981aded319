"""Everything that this package raises, as one tree.

HeadwaterError
├── ConnectionFailed           the service did not answer
├── UnexpectedAnswer           an answer that is not Headwater's: another service, or a proxy's page
├── JobFailed                  a job ended without what it was to make
│   └── JobCancelled           since somebody cancelled it
├── JobTimeout                 a job had not ended in the time that `wait` was given; it goes on
├── PackageMissing             `plot` or `to_pandas` without its package
└── Problem                    the service refused (RFC 9457); a type that is not below is raised as this class
    ├── InvalidRequest         invalid-request, bad-cursor, ...; `errors` names the fields
    │   ├── BadQuery           bad-query, bad-chat: a generation or a logged chat that cannot be attributed
    │   ├── BadRow             bad-row, bad-file: training rows that cannot be read
    │   ├── BadModel           bad-model: not a model folder that is loaded
    │   ├── BadIndex           bad-index: an index asked for with impossible settings
    │   ├── BadPath            bad-path, path-missing, path-not-allowed: a path on the server
    │   └── BadIdempotencyKey  bad-idempotency-key, idempotency-key-reused
    ├── TooLarge               too-large, too-many-rows
    ├── Unauthorized           unauthorized: no API key, or one that is not known
    ├── MissingScope           missing-scope: the key may not do this
    ├── NotFound               not-found
    ├── Conflict               conflict, request-in-flight: its state does not allow this now
    │   ├── AlreadyExists      already-exists: the name is taken
    │   └── IndexUnusable      index-missing, index-corrupt, model-mismatch, factors-missing, factors-corrupt:
    │                          repair or rebuild the index, or fit its factors
    ├── QuotaExceeded          quota-exceeded, above-quota
    ├── Unavailable            busy, not-ready, shutting-down, database-away, wrong-schema, shards-missing,
    │                          builders-missing: later it may work; retried already
    ├── DiskFull               disk-full
    └── ServerError            internal: the service's log has it under `request_id`
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

PREFIX = "urn:headwater:problem:"


class HeadwaterError(Exception):
    """Whatever this package raises; the message says what to do."""


class ConnectionFailed(HeadwaterError):
    """The service did not answer, after all retries."""


class UnexpectedAnswer(HeadwaterError):
    """What answered does not speak as Headwater does, or is of a version that this package cannot read."""


class JobFailed(HeadwaterError):
    """A job ended without what it was to make; `job` is its id, `code` the kind of failure."""

    def __init__(self, job: str, code: str, detail: str) -> None:
        super().__init__(f"job {job} failed ({code}): {detail}")
        self.job, self.code, self.detail = job, code, detail


class JobCancelled(JobFailed):
    """Somebody cancelled the job."""


class JobTimeout(HeadwaterError):
    """A job had not ended in the time that it was waited for; it goes on."""


class PackageMissing(HeadwaterError):
    """A package that this needs is not installed."""


class FieldError(NamedTuple):
    """One field at fault."""

    field: str
    message: str


class Problem(HeadwaterError):
    """The service refused.

    Attributes:
        status: the HTTP status.
        type: the whole type, `urn:headwater:problem:not-found`; `slug` is its last part.
        title, detail: the kind in words, and what happened here.
        errors: the fields at fault.
        request_id: what the service's log has this request under.
        retry_after: seconds after which the service wants to be asked again, if it said so.
    """

    slugs: ClassVar[tuple[str, ...]] = ()

    def __init__(self, status: int, body: Mapping[str, Any], retry_after: float | None = None) -> None:
        self.status = status
        self.type = str(body.get("type", "about:blank"))
        self.slug = self.type.removeprefix(PREFIX)
        self.title = str(body.get("title", ""))
        self.detail = str(body.get("detail", "") or self.title)
        self.errors: Sequence[FieldError] = tuple(
            FieldError(str(one.get("field", "")), str(one.get("message", ""))) for one in body.get("errors") or ()
        )
        self.request_id = body.get("request_id")
        self.retry_after = retry_after
        super().__init__(f"{self.detail} ({self.slug}, HTTP {status})")

    @property
    def fields(self) -> tuple[str, ...]:
        """Dotted paths of the fields at fault."""
        return tuple(one.field for one in self.errors)


class InvalidRequest(Problem):
    """The request is wrong."""

    slugs: ClassVar[tuple[str, ...]] = (
        "invalid-request",
        "bad-cursor",
        "bad-request",
        "unsupported-media-type",
    )


class BadQuery(InvalidRequest):
    """A generation, or a logged chat, that cannot be attributed."""

    slugs: ClassVar[tuple[str, ...]] = ("bad-query", "bad-chat")


class BadRow(InvalidRequest):
    """Training rows that cannot be read."""

    slugs: ClassVar[tuple[str, ...]] = ("bad-row", "bad-file")


class BadModel(InvalidRequest):
    """Not a model folder that is loaded."""

    slugs: ClassVar[tuple[str, ...]] = ("bad-model",)


class BadIndex(InvalidRequest):
    """An index asked for with impossible settings."""

    slugs: ClassVar[tuple[str, ...]] = ("bad-index",)


class BadPath(InvalidRequest):
    """A path on the server that is not there, or that requests may not name."""

    slugs: ClassVar[tuple[str, ...]] = ("bad-path", "path-missing", "path-not-allowed")


class BadIdempotencyKey(InvalidRequest):
    """An `Idempotency-Key` that is too long, or was used for another request."""

    slugs: ClassVar[tuple[str, ...]] = ("bad-idempotency-key", "idempotency-key-reused")


class TooLarge(Problem):
    """More than the service takes."""

    slugs: ClassVar[tuple[str, ...]] = ("too-large", "too-many-rows")


class Unauthorized(Problem):
    """No API key, or one that is not known."""

    slugs: ClassVar[tuple[str, ...]] = ("unauthorized",)


class MissingScope(Problem):
    """The API key may not do this."""

    slugs: ClassVar[tuple[str, ...]] = ("missing-scope",)


class NotFound(Problem):
    """There is no such thing."""

    slugs: ClassVar[tuple[str, ...]] = ("not-found",)


class Conflict(Problem):
    """Its state does not allow this now."""

    slugs: ClassVar[tuple[str, ...]] = ("conflict", "request-in-flight")


class AlreadyExists(Conflict):
    """The name is taken."""

    slugs: ClassVar[tuple[str, ...]] = ("already-exists",)


class IndexUnusable(Conflict):
    """The index does not fit its model any more, or its files are damaged."""

    slugs: ClassVar[tuple[str, ...]] = (
        "index-missing",
        "index-corrupt",
        "model-mismatch",
        "factors-missing",
        "factors-corrupt",
    )


class QuotaExceeded(Problem):
    """The tenant's quota is spent."""

    slugs: ClassVar[tuple[str, ...]] = ("quota-exceeded", "above-quota")


class Unavailable(Problem):
    """Later it may work."""

    slugs: ClassVar[tuple[str, ...]] = (
        "busy",
        "not-ready",
        "shutting-down",
        "database-away",
        "wrong-schema",
        "shards-missing",
        "builders-missing",
    )


class DiskFull(Problem):
    """The service's disk is full; nothing was kept."""

    slugs: ClassVar[tuple[str, ...]] = ("disk-full",)


class ServerError(Problem):
    """Something that nobody expected."""

    slugs: ClassVar[tuple[str, ...]] = ("internal",)


def _kinds(root: type[Problem]) -> dict[str, type[Problem]]:
    found = dict.fromkeys(root.slugs, root)
    for kind in root.__subclasses__():
        found |= _kinds(kind)
    return found


KINDS: Mapping[str, type[Problem]] = _kinds(Problem)
"""The class of each problem type that this version knows."""


def problem(status: int, body: Mapping[str, Any], retry_after: float | None = None) -> Problem:
    """The exception that a problem document means."""
    slug = str(body.get("type", "")).removeprefix(PREFIX)
    return KINDS.get(slug, Problem)(status, body, retry_after)

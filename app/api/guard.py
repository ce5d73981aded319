"""Who may do what: every request passes here before its body is read.

A middleware rather than a dependency of each endpoint: what nobody thought of is closed, a stranger's upload is not
read, and no answer that is kept (`Idempotency-Key`) is looked up for somebody who may not have it. The rule is one
function, `needed`, and the OpenAPI document is made from it too.
"""

from collections.abc import Callable

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Send
from starlette.types import Scope as Connection

from app.api import docs, quotas, ui
from app.api.callers import Caller, Kind, unnamed
from app.api.services import Services
from app.catalog.tables import ApiKey
from app.catalog.types import Scope
from app.problems import Refusal, respond
from app.settings import Settings

OPEN = frozenset(("/healthz", "/readyz", "/openapi.json", docs.PAGE, *docs.ASSETS.values(), ui.PAGE, *ui.ASSETS))
METRICS = "/metrics"
SELECT = "/valuation/select"
BY_METHOD = {"GET": Scope.READ, "HEAD": Scope.READ, "POST": Scope.WRITE}
INCLUDED = {Scope.ADMIN: frozenset(Scope), Scope.WRITE: frozenset((Scope.WRITE, Scope.READ))}

log = structlog.get_logger(__name__)


def needed(method: str, path: str) -> Scope | None:
    """The scope that a request needs; None: it is open to everybody.

    Looking needs `read`, asking an index `query` (it costs passes through a model), as does choosing among scores;
    making and changing needs `write`.
    Resources are shared by all tenants, so what takes one away from everybody needs `admin`, and so does any method
    that this function does not know.
    """
    if path in OPEN:
        return None
    if path.split("/")[1:2] == ["influence"] or path == SELECT:
        return Scope.QUERY
    return BY_METHOD.get(method, Scope.ADMIN)


class Guard:
    """Lets a request through that needs no key, or has one that may do what it asks for."""

    def __init__(self, app: ASGIApp, settings: Settings, services: Callable[[], Services]) -> None:
        self._app = app
        self._settings = settings
        self._services = services

    async def __call__(self, scope: Connection, receive: Receive, send: Send) -> None:
        """Pass one connection on, or answer it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        caller = scope["caller"] = unnamed()
        wanted = needed(scope["method"], scope["path"])
        if wanted is None or not self._locked(scope):
            await self._app(scope, receive, send)
            return

        async def tell(message: Message) -> None:
            if message["type"] == "http.response.start":
                for name, value in quotas.headers(caller.standings):
                    MutableHeaders(scope=message)[name] = value
            await send(message)

        try:
            key = await self._known(Headers(scope=scope))
            caller = scope["caller"] = self._caller(key)
            await self._services().quotas.take("requests", caller)
            _require(wanted, caller)
        except Refusal as refusal:
            await respond(refusal)(scope, receive, tell)
            return
        await self._app(scope, receive, tell)
        await self._note_use(key)

    def _locked(self, scope: Connection) -> bool:
        if scope["path"] == METRICS and self._settings.metrics_open:
            return False
        reached_at = (scope.get("server") or ("",))[0]
        return self._settings.needs_key(reached_at)

    async def _known(self, headers: Headers) -> ApiKey:
        text = _key_in(headers)
        if text is None:
            raise _unauthorized("this needs an API key: send `Authorization: Bearer hw_...`", challenge="Bearer")
        async with self._services().database.catalog() as catalog:
            key = await catalog.api_keys.find(text)
        if key is None:
            detail = "this API key is not known, or was revoked"
            raise _unauthorized(detail, challenge='Bearer error="invalid_token"')
        return key

    def _caller(self, key: ApiKey) -> Caller:
        own = frozenset(Scope(name) for name in key.scopes)
        scopes = own.union(*(INCLUDED.get(scope, frozenset()) for scope in own))
        limits: dict[Kind, int] = {
            "requests": key.tenant.requests_per_minute or self._settings.requests_per_minute,
            "tokens": key.tenant.tokens_per_minute or self._settings.tokens_per_minute,
        }
        return Caller(key.tenant_name, key.id, scopes, {kind: quota for kind, quota in limits.items() if quota})

    async def _note_use(self, key: ApiKey) -> None:
        """After the answer, so that nobody waits for it; a use that cannot be noted harms nobody."""
        try:
            async with self._services().database.catalog() as catalog:
                if await catalog.api_keys.note_use(key):
                    await catalog.commit()
        except Exception:
            log.warning("the last use of a key was not noted", key=key.id, exc_info=True)


def _require(wanted: Scope, caller: Caller) -> None:
    if wanted not in caller.scopes:
        has = ", ".join(scope for scope in Scope if scope in caller.scopes) or "none"
        raise Refusal(
            403,
            "missing-scope",
            f"this needs a key with the scope {wanted.value!r}; this one has: {has}",
            field="Authorization",
            headers={"WWW-Authenticate": f'Bearer error="insufficient_scope", scope="{wanted.value}"'},
        )


def _key_in(headers: Headers) -> str | None:
    kind, _, text = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer":
        return text.strip()
    return headers.get("x-api-key")


def _unauthorized(detail: str, challenge: str) -> Refusal:
    return Refusal(401, "unauthorized", detail, field="Authorization", headers={"WWW-Authenticate": challenge})

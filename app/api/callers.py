"""Who sent a request: noted on it by the guard, asked for by whoever must tell callers apart."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from fastapi import Depends, Request

from app.catalog.types import Scope

Kind = Literal["requests", "tokens"]


@dataclass(frozen=True)
class Standing:
    """What a tenant may still spend of a quota; `reset_s` is when there will be enough again, or all of it."""

    kind: Kind
    quota: int
    remaining: int
    reset_s: int


@dataclass(frozen=True)
class Caller:
    """Who asks, and what may be spent a minute (a kind that is missing, without limit)."""

    tenant: str
    key_id: str | None  # None: no key is needed here
    scopes: frozenset[Scope]
    quotas: Mapping[Kind, int] = field(default_factory=dict)
    standings: dict[Kind, Standing] = field(default_factory=dict)  # as this request left them


def unnamed() -> Caller:
    """Whoever reaches a service that needs no keys."""
    return Caller(tenant="local", key_id=None, scopes=frozenset(Scope))


def caller_of(request: Request) -> Caller:
    """Who sent a request that the guard let through."""
    caller: Caller = request.scope["caller"]
    return caller


Asking = Annotated[Caller, Depends(caller_of)]

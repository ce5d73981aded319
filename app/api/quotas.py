"""Quotas: how many requests, and how many tokens of influence queries, a tenant's keys may spend a minute.

Counted in Redis where the queue is there, so that all API processes count together, and in this process otherwise. The
window slides: a minute's allowance cannot be spent twice around the turn of a minute. When Redis is away, requests go
through uncounted, and a metric and the log say so: a counter that is down must not take the service with it.
"""

import math
from collections.abc import Iterator, Mapping

import structlog
from limits import RateLimitItemPerMinute
from limits.aio.storage import MemoryStorage, RedisStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from limits.errors import StorageError
from redis.asyncio import ConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from app.api.callers import Caller, Kind, Standing
from app.api.metrics import Metrics
from app.problems import Refusal

WINDOW_S = 60
PATIENCE_S = 1.0  # what a request waits for a counter that does not answer

log = structlog.get_logger(__name__)


class Quotas:
    """The counters of all tenants."""

    def __init__(self, queue_url: str, metrics: Metrics) -> None:
        self._metrics = metrics
        self._pool: ConnectionPool | None = None
        self._storage: MemoryStorage | RedisStorage = MemoryStorage()
        if queue_url.startswith(("redis://", "rediss://")):
            self._pool = ConnectionPool.from_url(
                queue_url,
                socket_timeout=PATIENCE_S,
                socket_connect_timeout=PATIENCE_S,
                retry=Retry(NoBackoff(), 0),
            )
            self._storage = RedisStorage(
                f"async+{queue_url}",
                wrap_exceptions=True,
                implementation="redispy",
                key_prefix="headwater:quota",
                connection_pool=self._pool,  # type: ignore[arg-type]  # its annotation leaves pools out
            )
        self._limiter = SlidingWindowCounterRateLimiter(self._storage)

    async def close(self) -> None:
        """Close the connections."""
        if self._pool is not None:
            await self._pool.disconnect()

    async def take(self, kind: Kind, caller: Caller, cost: int = 1) -> None:
        """Spend from the caller's quota, and note on the caller what is left of it.

        Raises:
            Refusal: 429, there is too little now, `Retry-After` says when there will be enough; 422, there never will.
        """
        quota = caller.quotas.get(kind)
        if quota is None:
            return
        if cost > quota:
            detail = (
                f"this takes {cost:,} {kind}, and tenant {caller.tenant!r} may spend {quota:,} a minute: ask for less"
            )
            raise Refusal(422, "above-quota", detail)
        item = RateLimitItemPerMinute(quota)
        try:
            taken = await self._limiter.hit(item, kind, caller.tenant, cost=cost)
            window = await self._storage.get_sliding_window(item.key_for(kind, caller.tenant), WINDOW_S)
        except StorageError:
            self._metrics.quota_unchecked.inc()
            log.warning("quotas are not counted: the counter's store is away", exc_info=True)
            return
        standing = caller.standings[kind] = _standing(kind, quota, 0 if taken else cost, window)
        if not taken:
            self._metrics.quota_refused.labels(kind).inc()
            detail = f"tenant {caller.tenant!r} has spent its {quota:,} {kind} a minute"
            raise Refusal(429, "quota-exceeded", detail, headers={"Retry-After": str(standing.reset_s)})


def _standing(kind: Kind, quota: int, wanted: int, window: tuple[int, float, int, float]) -> Standing:
    """Read the two fixed windows that the sliding one is made of.

    The earlier one counts with the share of it that the sliding window still covers: `earlier_left` of a minute. The
    present one has `present_left` to go, less the minute for which it will be the earlier one.
    """
    earlier, earlier_left, present, present_left = window
    spent = earlier * earlier_left / WINDOW_S + present
    room = quota - wanted
    if present <= room:
        wait = earlier_left - (room - present) * WINDOW_S / earlier if earlier else 0.0
    else:
        wait = present_left - room * WINDOW_S / present
    if not wanted:
        wait = present_left if present else earlier_left  # until all of it is there again
    return Standing(kind, quota, max(0, quota - math.floor(spent)), max(1, math.ceil(wait)))


def headers(standings: Mapping[Kind, Standing]) -> Iterator[tuple[str, str]]:
    """What the caller may know of its quotas (draft-ietf-httpapi-ratelimit-headers)."""
    if standings:
        every = standings.values()
        yield "RateLimit-Policy", ", ".join(f'"{one.kind}";q={one.quota};w={WINDOW_S}' for one in every)
        yield "RateLimit", ", ".join(f'"{one.kind}";r={one.remaining};t={one.reset_s}' for one in every)

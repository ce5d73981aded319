"""The repository of idempotency keys: who did this request first, and what was answered."""

from datetime import timedelta

from sqlalchemy import delete, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from app.catalog.tables import IdempotencyKey
from app.catalog.types import now

CLAIM_EXPIRES = timedelta(minutes=15)  # a claim whose process died; longer than any request takes


class Keys:
    """Idempotency keys."""

    def __init__(self, session: AsyncSession) -> None:
        self._session = session

    async def claim(self, key: str, request_hash: str, ttl: timedelta) -> IdempotencyKey | None:
        """None when the caller is the first and now holds the key; otherwise what the first one left."""
        unanswered = IdempotencyKey.status.is_(None) & (IdempotencyKey.created_at < now() - CLAIM_EXPIRES)
        await self._session.execute(
            delete(IdempotencyKey).where(unanswered | (IdempotencyKey.created_at < now() - ttl))
        )
        await self._session.commit()
        try:
            self._session.add(IdempotencyKey(key=key, request_hash=request_hash))
            await self._session.commit()
        except IntegrityError:
            await self._session.rollback()
            return await self._session.get(IdempotencyKey, key)
        return None

    async def answer(self, key: str, status: int, headers: dict[str, str], body: str) -> None:
        """Keep the answer for whoever asks again."""
        done = update(IdempotencyKey).where(IdempotencyKey.key == key)
        await self._session.execute(done.values(status=status, headers=headers, body=body))

    async def release(self, key: str) -> None:
        """The request failed: it may be tried again under the same key."""
        await self._session.execute(delete(IdempotencyKey).where(IdempotencyKey.key == key))

    async def release_unanswered(self) -> None:
        """Release every claim; right only when no other process can hold one (the embedded default at start-up)."""
        await self._session.execute(delete(IdempotencyKey).where(IdempotencyKey.status.is_(None)))

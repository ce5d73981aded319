"""The repository of API keys, and what a key looks like.

A key is `hw_<id>_<secret>`: the id finds the row, the secret is 256 random bits of which the row keeps the SHA-256. A
slow hash (bcrypt, Argon2) makes guessing what a person chose expensive; nobody chose this, and 2^256 is out of reach at
any speed, so a fast hash keeps the table as worthless to a thief and spares each request a tenth of a second.
"""

import hashlib
import hmac
import re
import secrets
from collections.abc import Collection, Sequence
from datetime import timedelta

from sqlalchemy import or_, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.catalog.errors import NotFound
from app.catalog.tables import ApiKey, Tenant
from app.catalog.types import Scope, new_id, now

KEY = re.compile(r"hw_([0-9a-f]{24})_([A-Za-z0-9_-]{43})")
NOTED_EVERY = timedelta(minutes=1)
NOBODY = "0" * 64  # compared with where there is no row, so that a miss takes as long as a hit


class ApiKeys:
    """Keys and the tenants that they belong to."""

    def __init__(self, session: AsyncSession) -> None:
        self._session = session

    async def create(self, tenant: str, scopes: Collection[Scope], note: str) -> tuple[ApiKey, str]:
        """A new key and its text, which is known here and never again. The tenant is made if it is new."""
        owner = await self._session.get(Tenant, tenant) or Tenant(name=tenant)
        key_id, secret = new_id("key"), secrets.token_urlsafe(32)
        ordered = [scope.value for scope in Scope if scope in scopes]
        key = ApiKey(id=key_id, tenant=owner, note=note, scopes=ordered, secret_hash=_hash(secret))
        self._session.add(key)
        await self._session.flush()
        return key, f"hw_{key_id.removeprefix('key_')}_{secret}"

    async def set_quota(self, tenant: str, requests: int | None, tokens: int | None) -> None:
        """Give a tenant its own quotas a minute; None: the settings' apply."""
        found = await self._session.get(Tenant, tenant)
        if found is None:
            raise NotFound(f"there is no tenant {tenant!r}: `headwater keys list` names them", field="tenant")
        found.requests_per_minute, found.tokens_per_minute = requests, tokens

    async def find(self, text: str) -> ApiKey | None:
        """The key with this text, unless it is revoked."""
        parts = KEY.fullmatch(text)
        if parts is None:
            return None
        key = await self._session.get(ApiKey, f"key_{parts[1]}")
        same = hmac.compare_digest(_hash(parts[2]), key.secret_hash if key else NOBODY)
        return key if key and same and key.revoked_at is None else None

    async def note_use(self, key: ApiKey) -> bool:
        """Write down that the key is in use, at most once a minute; gives whether there was anything to write."""
        stale = now() - NOTED_EVERY
        if key.last_used_at is not None and key.last_used_at > stale:
            return False
        earlier = or_(ApiKey.last_used_at.is_(None), ApiKey.last_used_at <= stale)
        await self._session.execute(update(ApiKey).where(ApiKey.id == key.id, earlier).values(last_used_at=now()))
        return True

    async def all(self) -> Sequence[ApiKey]:
        """Every key, revoked ones too, oldest first."""
        return (await self._session.scalars(select(ApiKey).order_by(ApiKey.id))).all()

    async def revoke(self, key_id: str) -> ApiKey:
        """Make a key worthless from its next request on; once revoked, it stays so."""
        key = await self._session.get(ApiKey, key_id)
        if key is None:
            raise NotFound(f"there is no key {key_id!r}: `headwater keys list` names them", field="key")
        key.revoked_at = key.revoked_at or now()
        return key


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()

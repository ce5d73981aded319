"""The database: one engine, sessions, and the migration that runs by itself on the embedded default.

SQLite is opened for a service: WAL so that readers never wait for the writer, a busy time-out so that writers wait
for each other instead of failing, foreign keys on.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import structlog
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, event, text
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine

from app.catalog.catalog import Catalog

log = structlog.get_logger(__name__)
Result = TypeVar("Result")
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0
MIGRATIONS = Path(__file__).resolve().parents[2] / "migrations"
PRAGMAS = ("journal_mode=WAL", "busy_timeout=30000", "synchronous=NORMAL", "foreign_keys=ON")


def make_engine(url: str) -> AsyncEngine:
    """An async engine for the URL, with SQLite's pragmas set on each connection."""
    engine = create_async_engine(url, pool_pre_ping=not url.startswith("sqlite"))
    if engine.dialect.name == "sqlite":

        @event.listens_for(engine.sync_engine, "connect")
        def _pragmas(connection: Any, _record: Any) -> None:
            cursor = connection.cursor()
            for pragma in PRAGMAS:
                cursor.execute(f"PRAGMA {pragma}")
            cursor.close()

    return engine


def alembic_config(url: str = "") -> Config:
    """Alembic's configuration without a file, so that it works from any working directory."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["url"] = url
    return config


def _upgrade(connection: Connection) -> None:
    config = alembic_config()
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


class Database:
    """The catalog's connection: sessions for whoever asks, closed with the process."""

    def __init__(self, url: str, patience_s: float = 0.0) -> None:
        self._patience_s = patience_s
        self.embedded = url.startswith("sqlite")
        self._engine = make_engine(url)
        self._sessions = async_sessionmaker(self._engine, expire_on_commit=False)

    @asynccontextmanager
    async def catalog(self) -> AsyncIterator[Catalog]:
        """A unit of work, which commits nothing by itself: the request or the job step does."""
        async with self._sessions() as session:
            yield Catalog(session)

    async def patiently(self, work: Callable[[Catalog], Awaitable[Result]]) -> Result:
        """Do a unit of work and commit it; again, with growing pauses, while the database is away.

        The work must be safe to repeat: a connection may break after the commit and before its answer.
        """
        end, pause = time.monotonic() + self._patience_s, FIRST_PAUSE_S
        while True:
            try:
                async with self.catalog() as catalog:
                    result = await work(catalog)
                    await catalog.commit()
                    return result
            except (OperationalError, InterfaceError) as error:
                if time.monotonic() + pause > end:
                    raise
                log.warning("the catalog is away; trying again", pause_s=pause, error=str(error.orig))
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    async def migrate(self) -> None:
        """Bring the schema to the newest revision."""
        async with self._engine.begin() as connection:
            await connection.run_sync(_upgrade)

    async def check(self) -> None:
        """Raise unless the database answers and its schema is the newest."""
        newest = await asyncio.to_thread(lambda: ScriptDirectory(str(MIGRATIONS)).get_current_head())
        async with self._engine.connect() as connection:
            await connection.execute(text("SELECT 1"))
            found = await connection.run_sync(lambda c: MigrationContext.configure(c).get_current_revision())
        if found != newest:
            raise RuntimeError(f"the database is at revision {found}, the code at {newest}")

    async def close(self) -> None:
        """Close every connection."""
        await self._engine.dispose()

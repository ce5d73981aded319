"""The database: one engine, sessions, the schema's revision.

SQLite is opened for a service: WAL so that readers never wait for the writer, a busy time-out so that writers wait
for each other instead of failing, foreign keys on. PostgreSQL connections are tried before they are used, so that a
server that was restarted is noticed by nobody but the requests that were under way.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import structlog
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.script.revision import RevisionError
from alembic.util import CommandError
from psycopg import errors as postgres
from sqlalchemy import Connection, event
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine

from app.catalog.catalog import Catalog
from app.catalog.errors import Unavailable, WrongSchema

log = structlog.get_logger(__name__)
Result = TypeVar("Result")
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0
MIGRATIONS = Path(__file__).resolve().parents[2] / "migrations"
PRAGMAS = ("journal_mode=WAL", "busy_timeout=30000", "synchronous=NORMAL", "foreign_keys=ON")
CONNECT_TIMEOUT_S = 5


def make_engine(url: str, **pool: Any) -> AsyncEngine:
    """An async engine for the URL, with what each database needs set on its connections."""
    write = partial(json.dumps, ensure_ascii=False)  # SQLite's JSON functions compare keys as they are written
    if not url.startswith("sqlite"):
        return create_async_engine(
            url, json_serializer=write, pool_pre_ping=True, connect_args={"connect_timeout": CONNECT_TIMEOUT_S}, **pool
        )
    engine = create_async_engine(url, json_serializer=write, **pool)

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


class Database:
    """The catalog's connections: sessions for whoever asks, closed with the process."""

    def __init__(self, url: str, *, patience_s: float = 0.0, **pool: Any) -> None:
        self._patience_s = patience_s
        self.embedded = url.startswith("sqlite")
        self._engine = make_engine(url, **pool)
        self._sessions = async_sessionmaker(self._engine, expire_on_commit=False)

    @asynccontextmanager
    async def catalog(self) -> AsyncIterator[Catalog]:
        """A unit of work, which commits nothing by itself: the request or the job step does.

        Raises:
            Unavailable: the database went away, or every connection was taken for too long.
        """
        try:
            async with self._sessions() as session:
                yield Catalog(session)
        except (DBAPIError, PoolTimeout) as error:
            if _is_away(error):
                raise Unavailable("the database does not answer at the moment; try again shortly") from error
            raise

    async def patiently(self, work: Callable[[Catalog], Awaitable[Result]]) -> Result:
        """Do a unit of work and commit it; again, with growing pauses, while the database is away.

        The work must be safe to repeat: a connection may break after the commit and before its answer.

        Raises:
            Unavailable: patience is at an end.
        """
        end, pause = time.monotonic() + self._patience_s, FIRST_PAUSE_S
        while True:
            try:
                async with self.catalog() as catalog:
                    result = await work(catalog)
                    await catalog.commit()
                    return result
            except Unavailable:
                if time.monotonic() + pause > end:
                    raise
                log.warning("the catalog is away; trying again", pause_s=pause)
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    async def migrate(self, revision: str = "head") -> tuple[str | None, str | None]:
        """Bring the schema to a revision, up or down; the revisions before and after.

        Raises:
            Unavailable: the database does not answer. WrongSchema: there is no way to that revision.
        """
        try:
            async with self._engine.begin() as connection:
                return await connection.run_sync(_migrate, revision)
        except (CommandError, RevisionError) as error:
            raise WrongSchema(f"the database cannot be migrated to {revision!r}: {error}") from error
        except OperationalError as error:
            raise Unavailable(f"the database does not answer: {_reason(error)}") from error
        finally:
            await self._engine.dispose()  # SQLite's connection has its foreign keys off, see migrations/env.py

    async def check(self) -> None:
        """Raise unless the database answers and its schema is the code's.

        Raises:
            Unavailable: it does not answer. WrongSchema: it has another revision.
        """
        scripts = await asyncio.to_thread(lambda: ScriptDirectory(str(MIGRATIONS)))
        newest = scripts.get_current_head()
        try:
            async with self._engine.connect() as connection:
                found = await connection.run_sync(_revision)
        except (DBAPIError, PoolTimeout) as error:
            raise Unavailable(f"the database does not answer: {_reason(error)}") from error
        if found == newest:
            return
        if found is not None and found not in {script.revision for script in scripts.walk_revisions()}:
            raise WrongSchema(
                f"the database is at revision {found}, which a newer Headwater made: this one knows no later than "
                f"{newest}. Run the newer version, or go back with its `headwater migrate --to {newest}`"
            )
        where = "has no tables yet" if found is None else f"is at revision {found}"
        raise WrongSchema(f"the database {where}, this Headwater needs {newest}: run `headwater migrate` once")

    async def close(self) -> None:
        """Close every connection."""
        await self._engine.dispose()


def _revision(connection: Connection) -> str | None:
    return MigrationContext.configure(connection).get_current_revision()


def _migrate(connection: Connection, revision: str) -> tuple[str | None, str | None]:
    config = alembic_config()
    config.attributes["connection"] = connection
    before = _revision(connection)
    known = ScriptDirectory.from_config(config).iterate_revisions(before, "base") if before else ()
    down = revision == "base" or revision in {script.revision for script in known}
    (command.downgrade if down else command.upgrade)(config, revision)
    return before, _revision(connection)


def _is_away(error: DBAPIError | PoolTimeout) -> bool:
    """Whether the database, rather than the statement, is what failed."""
    if isinstance(error, PoolTimeout) or error.connection_invalidated:
        return True
    if isinstance(error.orig, postgres.OperationalError):  # no connection, a shutdown, a deadlock; not a full disk
        return not isinstance(error.orig, postgres.DiskFull)
    return isinstance(error, OperationalError) and "database is locked" in str(error.orig)


def _reason(error: DBAPIError | PoolTimeout) -> str:
    """What the driver said, on one line."""
    said = error.orig if isinstance(error, DBAPIError) else error
    return " ".join(str(said).split())

"""Alembic's entry: migrates over the connection it is given (start-up), or opens its own (the command line)."""

import asyncio
from typing import Any

from alembic import context
from sqlalchemy import Connection, text

from app.catalog.database import make_engine
from app.catalog.tables import Base
from app.settings import Settings

LOCK = 0x48656164  # any number that nobody else locks


def migrate(connection: Connection) -> None:
    """Run the pending revisions; batch mode lets SQLite alter tables. Of several who do so at once, the others wait."""

    if connection.dialect.name == "sqlite":
        # To alter a table is to copy it and to drop the old one, with which ON DELETE would take rows of other tables.
        connection.exec_driver_sql("PRAGMA foreign_keys=OFF")

    def belongs(item: Any, _name: str | None, _kind: str, _reflected: bool, _compare_to: Any) -> bool:
        return item.info.get("dialect", connection.dialect.name) == connection.dialect.name

    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        render_as_batch=True,
        compare_server_default=True,
        include_object=belongs,
    )
    with context.begin_transaction():
        if connection.dialect.name == "postgresql":
            connection.execute(text(f"SELECT pg_advisory_xact_lock({LOCK})"))
        context.run_migrations()


async def migrate_by_url(url: str) -> None:
    """Open the database ourselves, as the command line needs."""
    engine = make_engine(url)
    async with engine.begin() as connection:
        await connection.run_sync(migrate)
    await engine.dispose()


given = context.config.attributes.get("connection")
if given is not None:
    migrate(given)
else:
    settings = Settings()
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    asyncio.run(migrate_by_url(context.config.attributes.get("url") or settings.catalog_url))

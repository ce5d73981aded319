"""Alembic's entry: migrates over the connection it is given (start-up), or opens its own (the command line)."""

import asyncio

from alembic import context
from sqlalchemy import Connection

from app.catalog.database import make_engine
from app.catalog.tables import Base
from app.settings import Settings


def migrate(connection: Connection) -> None:
    """Run the pending revisions; batch mode lets SQLite alter tables."""
    context.configure(
        connection=connection, target_metadata=Base.metadata, render_as_batch=True, compare_server_default=True
    )
    with context.begin_transaction():
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

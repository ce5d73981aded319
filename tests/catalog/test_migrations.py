"""The migrations make exactly the tables of the code, and can be undone."""

from collections.abc import Callable
from pathlib import Path

import pytest
from alembic import command
from sqlalchemy import create_engine, inspect

from app.catalog.database import alembic_config
from app.catalog.tables import Base


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "catalog.db"


@pytest.fixture
def alembic(database: Path) -> Callable[..., None]:
    def run(what: Callable[..., object], *args: str) -> None:
        what(alembic_config(f"sqlite+aiosqlite:///{database}"), *args)

    return run


def tables(database: Path) -> set[str]:
    engine = create_engine(f"sqlite:///{database}")
    with engine.connect() as connection:
        names = set(inspect(connection).get_table_names())
    engine.dispose()
    return names - {"alembic_version"}


def test_up_makes_every_table_and_down_leaves_none(alembic: Callable[..., None], database: Path) -> None:
    alembic(command.upgrade, "head")
    assert tables(database) == set(Base.metadata.tables)
    alembic(command.downgrade, "base")
    assert tables(database) == set()
    alembic(command.upgrade, "head")
    assert tables(database) == set(Base.metadata.tables)


def test_the_migrated_schema_is_the_models(alembic: Callable[..., None]) -> None:
    alembic(command.upgrade, "head")
    alembic(command.check)

"""The migrations make exactly the tables of the code, up and down, from nothing and from data, on both databases."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect, text

from app.catalog.copying import NewSample
from app.catalog.database import MIGRATIONS, Database, alembic_config, make_engine
from app.catalog.errors import WrongSchema
from app.catalog.tables import Base, Dataset, IndexRow, Job, Model
from app.catalog.types import IndexState, JobKind, JobState, new_id
from tests.conftest import BACKENDS
from tests.servers import postgres_database

REVISIONS = [script.revision for script in ScriptDirectory(str(MIGRATIONS)).walk_revisions()][::-1]
NOON = datetime(2026, 1, 1, 12, tzinfo=timezone(timedelta(hours=2)))


@pytest.fixture(params=BACKENDS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database without a table."""
    if request.param == "sqlite":
        yield f"sqlite+aiosqlite:///{tmp_path / 'catalog.db'}"
        return
    with postgres_database(request.getfixturevalue("postgres_url")) as made:
        yield made


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[Database]:
    database = Database(url)
    yield database
    await database.close()


async def tables(url: str) -> set[str]:
    engine = make_engine(url)
    async with engine.connect() as connection:
        names = set(await connection.run_sync(lambda c: inspect(c).get_table_names()))
    await engine.dispose()
    return names - {"alembic_version"}


async def content(url: str) -> dict[str, list[dict[str, Any]]]:
    """Every row of every table that the first revision knows, by the columns that it knows."""

    def read(connection: Connection) -> dict[str, list[dict[str, Any]]]:
        found = {}
        for table in sorted(inspect(connection).get_table_names()):
            if table != "alembic_version":
                rows = connection.execute(text(f"SELECT * FROM {table}")).mappings().all()
                found[table] = sorted((dict(row) for row in rows), key=str)
        return found

    engine = make_engine(url)
    async with engine.connect() as connection:
        rows = await connection.run_sync(read)
    await engine.dispose()
    return rows


async def fill(database: Database) -> None:
    """Something in each table."""
    async with database.catalog() as catalog:
        model = Model(
            id=new_id("mdl"),
            name="tiny",
            spec={"path": "models/tiny"},
            fingerprint={"base": "0"},
            attributed=[{"name": "q_proj", "d_in": 4}],
            skipped=[],
            context_length=128,
            created_at=NOON,
        )
        dataset = Dataset(id=new_id("dst"), name="facts", source="here", columns={}, rows=2, content_hash="0")
        await catalog.models.add(model)
        await catalog.datasets.add(dataset, [NewSample("a" * 16, "{}", {"größe": 1}), NewSample("b" * 16, "{}", {})])
        index = IndexRow(
            id=new_id("idx"),
            name="idx",
            model_id=model.id,
            dataset_id=dataset.id,
            spec={},
            state=IndexState.READY,
            version=2**31 - 1,
        )
        await catalog.indexes.add(index)
        job = Job(id=new_id("job"), kind=JobKind.BUILD_INDEX, state=JobState.SUCCEEDED, index_id=index.id, params={})
        await catalog.jobs.add(job)
        await catalog.commit()
        await catalog.keys.claim("key", "hash", timedelta(days=1))


async def test_up_makes_every_table_and_down_leaves_none(url: str) -> None:
    async with opened(url) as database:
        for _ in range(2):
            assert await database.migrate() == (None, REVISIONS[-1])
            await database.check()
            assert await tables(url) == set(Base.metadata.tables)
            assert await database.migrate("base") == (REVISIONS[-1], None)
            assert await tables(url) == set()


async def test_each_revision_can_be_undone_and_done_again(url: str) -> None:
    async with opened(url) as database:
        for older, revision in zip([None, *REVISIONS], REVISIONS, strict=False):
            assert await database.migrate(revision) == (older, revision)
            assert await database.migrate(older or "base") == (revision, older)
            assert await database.migrate(revision) == (older, revision)


async def test_rows_survive_the_way_down_to_the_first_revision_and_up_again(url: str) -> None:
    async with opened(url) as database:
        await database.migrate()
        await fill(database)
        before = await content(url)
        assert all(before[table.name] for table in Base.metadata.sorted_tables if table.name in FILLED)
        for revision in REVISIONS[-2::-1]:
            await database.migrate(revision)
        for revision in REVISIONS[1:]:
            await database.migrate(revision)
        after = await content(url)
        assert {name: after[name] for name in FILLED} == {name: before[name] for name in FILLED}
        async with database.catalog() as catalog:
            model = await catalog.models.get("tiny")
            assert model.created_at == datetime(2026, 1, 1, 10, tzinfo=UTC)
            assert model.attributed == [{"name": "q_proj", "d_in": 4}]
            index = await catalog.indexes.get("idx")
            assert (index.state, index.version, index.manifest) == (IndexState.READY, 2**31 - 1, {})
            page = await catalog.datasets.samples(index.dataset_id, 10, after=-1)
            assert [sample.extra for sample in page.items] == [{"größe": 1}, {}]


FILLED = ("datasets", "idempotency_keys", "index_datasets", "indexes", "jobs", "models", "samples")


async def test_on_the_way_down_jobs_go_that_the_older_code_does_not_know(url: str) -> None:
    async with opened(url) as database:
        await database.migrate()
        await fill(database)
        async with database.catalog() as catalog:
            model, index = await catalog.models.get("tiny"), await catalog.indexes.get("idx")
            new = (JobKind.UNLEARN, JobState.QUEUED), (JobKind.VALUATION, JobState.RUNNING)
            for kind, state in (*new, (JobKind.FIT_EKFAC, JobState.RUNNING)):
                about = {"model_id": model.id, "index_id": index.id, "makes_model": kind.value}
                await catalog.jobs.add(Job(id=new_id("job"), kind=kind, state=state, params={}, **about))
            await catalog.commit()
        await database.migrate("0005")
        kept = await content(url)
        assert [job["kind"] for job in kept["jobs"]] == ["build_index"]
        assert {task["job_id"] for task in kept["tasks"]} == {kept["jobs"][0]["id"]}


async def test_the_migrated_schema_is_the_models(url: str) -> None:
    async with opened(url) as database:
        await database.migrate()
    await asyncio.to_thread(command.check, alembic_config(url))


async def test_another_revision_is_named_with_the_command_that_helps(url: str) -> None:
    async with opened(url) as database:
        with pytest.raises(WrongSchema, match=r"has no tables yet.* run `headwater migrate`"):
            await database.check()
        await database.migrate("0001")
        with pytest.raises(WrongSchema, match=rf"at revision 0001.* needs {REVISIONS[-1]}: run `headwater migrate`"):
            await database.check()
        await database.migrate()
        engine = make_engine(url)
        async with engine.begin() as connection:
            await connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
        await engine.dispose()
        with pytest.raises(WrongSchema, match=rf"9999, which a newer Headwater made.*migrate --to {REVISIONS[-1]}"):
            await database.check()
        with pytest.raises(WrongSchema, match="cannot be migrated"):
            await database.migrate()


async def test_a_revision_that_does_not_exist_is_refused(url: str) -> None:
    async with opened(url) as database:
        with pytest.raises(WrongSchema, match="cannot be migrated to 'nonsense'"):
            await database.migrate("nonsense")

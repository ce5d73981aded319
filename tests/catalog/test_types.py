"""What goes in comes out, on both databases: times, JSON, states, numbers; and two who write wait where they must."""

import asyncio
from datetime import UTC, datetime, timedelta, timezone
from enum import StrEnum
from typing import Any

import pytest
from sqlalchemy import inspect, text

from app.catalog.copying import NewSample
from app.catalog.database import Database, make_engine
from app.catalog.errors import Conflict
from app.catalog.tables import Dataset, IndexRow, Job, Model
from app.catalog.types import IndexState, JobKind, JobState, new_id
from tests.conftest import Backend
from tests.servers import postgres_database

METADATA: dict[str, Any] = {
    "text": "größer ☂ 👩‍🚀 \\ \" ' % :x",
    "numbers": [0, -1, 2**53 + 1, 2**70, 0.1, 1e-300, 1e22],
    "nested": {"a": [{"b": None}, True, False, [], {}]},
    "": "an empty name",
}


def dataset(**more: Any) -> Dataset:
    return Dataset(id=new_id("dst"), name=new_id("n"), source="", columns={}, rows=1, content_hash="0", **more)


async def test_metadata_come_back_as_they_were(database: Database) -> None:
    async with database.catalog() as catalog:
        made = dataset()
        record = '{"text":"tab\\t and \\\\ and \\n, \t and \n and \\."}'
        await catalog.datasets.add(made, [NewSample("0" * 16, record, METADATA), NewSample("1" * 16, "\\N", {})])
        await catalog.commit()
        page = await catalog.datasets.samples(made.id, 10, -1)
    assert [sample.extra for sample in page.items] == [METADATA, {}]
    assert [sample.record for sample in page.items] == [record, "\\N"]


async def test_a_time_is_the_same_moment_whatever_the_server_calls_it(
    migrated_postgres: str, postgres_url: str
) -> None:
    moment = datetime(2026, 3, 29, 1, 30, tzinfo=timezone(timedelta(hours=5, minutes=30)))
    with postgres_database(postgres_url, migrated_postgres) as url:
        engine = make_engine(url)
        async with engine.begin() as connection:
            name = (await connection.execute(text("SELECT current_database()"))).scalar_one()
            await connection.execute(text(f"ALTER DATABASE {name} SET timezone = 'America/St_Johns'"))
        await engine.dispose()
        database = Database(url)
        made = dataset(created_at=moment)
        async with database.catalog() as catalog:
            await catalog.datasets.add(made, [])
            await catalog.commit()
        async with database.catalog() as catalog:
            found = (await catalog.datasets.get(made.id)).created_at
        await database.close()
    assert (found, found.tzinfo) == (moment, UTC)


async def test_a_time_without_a_zone_is_refused(database: Database) -> None:
    async with database.catalog() as catalog:
        with pytest.raises(Exception, match="without a time zone"):
            await catalog.datasets.add(dataset(created_at=datetime(2026, 1, 1)), [])


@pytest.mark.parametrize("kind", [JobState, JobKind, IndexState])
async def test_every_state_is_kept_by_its_value(database: Database, backend: Backend, kind: type[StrEnum]) -> None:
    """By its value: SQL that people write reads it, and a state can be added without altering a type."""
    async with database.catalog() as catalog:
        made, model = dataset(), _model()
        await catalog.models.add(model)
        await catalog.datasets.add(made, [])
        for state in kind:
            if kind is IndexState:
                index = IndexRow(
                    id=new_id("idx"), name=state.value, model_id=model.id, dataset_id=made.id, spec={}, state=state
                )
                await catalog.indexes.add(index)
            else:
                fields: dict[str, Any] = {"kind": JobKind.BUILD_INDEX} | {
                    "state" if kind is JobState else "kind": state
                }
                await catalog.jobs.add(Job(id=new_id("job"), params={}, **fields))
        await catalog.commit()
        found: list[StrEnum] = [index.state for index in (await catalog.indexes.page(50, None)).items]
        if kind is not IndexState:
            jobs = (await catalog.jobs.page(50, None, None)).items
            found = [job.state if kind is JobState else job.kind for job in jobs]
    assert set(found) == set(kind)
    column = {JobState: "state FROM jobs", JobKind: "kind FROM jobs", IndexState: "state FROM indexes"}[kind]
    engine = make_engine(backend.database_url)
    async with engine.connect() as connection:
        stored = set((await connection.execute(text(f"SELECT {column}"))).scalars())
    await engine.dispose()
    assert stored == {state.value for state in kind}


async def test_json_is_jsonb_on_postgres(database: Database, backend: Backend) -> None:
    engine = make_engine(backend.database_url)
    async with engine.connect() as connection:
        columns = await connection.run_sync(lambda c: inspect(c).get_columns("samples"))
        kinds = {column["name"]: str(column["type"]) for column in columns}
    await engine.dispose()
    assert kinds["metadata"] == ("JSON" if database.embedded else "JSONB")


async def test_two_who_ask_whether_an_index_is_idle_do_not_both_hear_yes(
    postgres_url: str, migrated_postgres: str
) -> None:
    with postgres_database(postgres_url, migrated_postgres) as url:
        database = Database(url)
        async with database.catalog() as catalog:
            made, model = dataset(), _model()
            await catalog.models.add(model)
            await catalog.datasets.add(made, [])
            await catalog.indexes.add(IndexRow(id="idx", name="i", model_id=model.id, dataset_id=made.id, spec={}))
            await catalog.commit()

        async def second() -> None:
            async with database.catalog() as catalog:
                await catalog.indexes.require_idle("idx")

        async with database.catalog() as first:
            await first.indexes.require_idle("idx")
            await first.jobs.add(Job(id="job", kind=JobKind.APPEND_SAMPLES, index_id="idx", params={}))
            waiting = asyncio.create_task(second())
            await asyncio.sleep(0.3)
            assert not waiting.done()
            await first.commit()
        with pytest.raises(Conflict, match="job job is working"):
            await waiting
        await database.close()


def _model() -> Model:
    return Model(
        id=new_id("mdl"), name=new_id("m"), spec={}, fingerprint={}, attributed=[], skipped=[], context_length=1
    )

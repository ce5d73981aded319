"""A PostgreSQL that goes away is a 503 that says when to try again, and nothing is wrong once it is back."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import make_url
from sqlalchemy.exc import DataError

from app.catalog.catalog import Catalog
from app.catalog.copying import NewSample
from app.catalog.database import Database
from app.catalog.errors import Unavailable
from app.catalog.tables import Dataset
from app.settings import Settings
from tests.api.conftest import quick
from tests.api.harness import Api, jsonl, must, problem, rows, serving, until
from tests.conftest import Backend
from tests.servers import TestPostgres, postgres_database


@pytest.fixture
def server() -> Iterator[TestPostgres]:
    """A server of the test's own, to be stopped."""
    server = TestPostgres()
    yield server
    server.remove()


@pytest.fixture
def database_url(postgres_url: str, migrated_postgres: str) -> Iterator[str]:
    with postgres_database(postgres_url, migrated_postgres) as url:
        yield url


def end_connections(url: str) -> int:
    """As an operator would, or a fail-over: every connection to the database but ours; how many there were."""
    end = (
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    plain = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(plain, autocommit=True) as connection:
        found = connection.execute(end).fetchone()
    assert found is not None
    return int(found[0])


def away(api: Api) -> None:
    refused = api.get("/datasets")
    problem(refused, 503, "database-away")
    assert int(refused.headers["retry-after"]) > 0


def test_a_server_that_is_stopped_and_started(server: TestPostgres, tmp_path: Path) -> None:
    with postgres_database(server.url) as url:
        asyncio.run(migrate(url))
        settings = quick(tmp_path, tmp_path, database_url=url, log_level="CRITICAL")
        with serving(settings) as api:
            must(api.upload(jsonl(rows())), 201)
            server.stop()
            away(api)
            problem(api.upload(jsonl(rows()), name="more"), 503, "database-away")
            problem(api.get("/readyz"), 503, "not-ready")
            must(api.get("/healthz"))
            server.start()
            until(lambda: api.get("/readyz").status_code, lambda status: status == 200)
            assert [dataset["name"] for dataset in must(api.get("/datasets"))["items"]] == ["facts"]
            must(api.upload(jsonl(rows()), name="more"), 201)


async def migrate(url: str) -> None:
    database = Database(url)
    await database.migrate()
    await database.close()


def test_connections_that_were_ended_while_idle_are_noticed_by_nobody(database_url: str, tmp_path: Path) -> None:
    with serving(quick(tmp_path, tmp_path, database_url=database_url)) as api:
        must(api.get("/datasets"))
        assert end_connections(database_url) > 0
        must(api.get("/datasets"))


async def test_a_connection_that_is_ended_in_mid_work_is_unavailable(database_url: str) -> None:
    database = Database(database_url)

    async def work() -> None:
        async with database.catalog() as catalog:
            await catalog.jobs.counts()
            assert await asyncio.to_thread(end_connections, database_url) > 0
            await catalog.jobs.counts()

    with pytest.raises(Unavailable):
        await work()
    async with database.catalog() as catalog:
        await catalog.jobs.counts()
    await database.close()


async def test_a_pool_with_no_connection_left_is_unavailable(backend: Backend) -> None:
    settings = Settings(
        database_pool_size=1, database_pool_overflow=1, database_pool_timeout_s=0.2, **backend.settings, _env_file=None
    )
    database = Database(settings.catalog_url, **settings.database_pool)
    await database.migrate()

    async def hold(catalog: Catalog) -> None:
        await catalog.jobs.counts()

    async with database.catalog() as one, database.catalog() as two:
        await hold(one)
        await hold(two)
        with pytest.raises(Unavailable):
            async with database.catalog() as three:
                await hold(three)
    async with database.catalog() as three:
        await hold(three)
    await database.close()


def test_a_copy_that_is_cut_off_keeps_nothing(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection ends between the rows and the commit."""
    reached, go = threading.Event(), threading.Event()
    commit = Catalog.commit

    async def held(catalog: Catalog) -> None:
        reached.set()
        assert await asyncio.to_thread(go.wait, 30)
        await commit(catalog)

    with serving(quick(tmp_path, tmp_path, database_url=database_url)) as api:
        monkeypatch.setattr(Catalog, "commit", held)
        refused = []
        sending = threading.Thread(target=lambda: refused.append(api.upload(jsonl(rows()))))
        sending.start()
        assert reached.wait(30)
        end_connections(database_url)
        go.set()
        sending.join(30)
        problem(refused[0], 503, "database-away")
        monkeypatch.undo()
        assert not must(api.get("/datasets"))["items"]
        must(api.upload(jsonl(rows())), 201)


@pytest.mark.parametrize("path", ["/models/%00", "/datasets/a%00b", "/jobs/%00", "/indexes/%00"])
def test_a_name_that_postgres_cannot_hold_is_no_name(asked: Api, path: str) -> None:
    assert asked.get(path).status_code in (404, 422)


def test_metadata_that_jsonb_cannot_hold_are_refused_on_both(api: Api) -> None:
    for record in ({"note": "a\0b"}, {"a\0b": 1}):
        refused = api.upload(jsonl([{"prompt": "Hi", "response": "Hello", **record}]))
        problem(refused, 422, "bad-row", "row 1")
    kept = {"note": "\\u0000", "a\\b": "\\\\u0000"}
    must(api.upload(jsonl([{"prompt": "Hi", "response": "Hello \0", **kept}])), 201)
    assert must(api.get("/datasets/facts/samples"))["items"][0]["metadata"] == kept


async def test_what_the_driver_refuses_in_a_copy_is_sqlalchemys_error(database_url: str) -> None:
    database = Database(database_url)

    async def add() -> None:
        async with database.catalog() as catalog:
            made = Dataset(id="dst_1", name="facts", source="here", columns={}, rows=1, content_hash="0")
            await catalog.datasets.add(made, [NewSample("0" * 16, "{}", {"note": "\0"})])

    with pytest.raises(DataError):
        await add()
    async with database.catalog() as catalog:
        assert not (await catalog.datasets.page(1, None)).items
    await database.close()

"""The servers out of the packages work, also where others answer; and a test leaves no database behind."""

import psycopg
import pytest
import redis
from sqlalchemy import make_url

from app.catalog.database import Database
from app.jobs.queue import Queue
from tests.servers import (
    LOCAL_POSTGRES,
    LOCAL_REDIS,
    TestPostgres,
    TestRedis,
    postgres,
    postgres_database,
    redis_database,
    redis_server,
)


async def test_the_packaged_postgres_holds_a_catalog_through_a_restart() -> None:
    server = TestPostgres()
    try:
        with postgres_database(server.url) as url:
            database = Database(url)
            await database.migrate()
            server.stop()
            server.start()
            await database.check()
            await database.close()
    finally:
        server.remove()
    assert not server.folder.exists()


async def test_the_packaged_redis_runs_the_queue_and_keeps_what_it_was_told() -> None:
    server = TestRedis()
    try:
        with redis_database(server.url) as url:
            async with Queue(url) as queue:
                await queue.announce("job_1", [(0, 0)])
            with redis.Redis.from_url(url) as client:
                held = set(client.keys())
            server.stop()
            server.start()
            with redis.Redis.from_url(url) as client:
                assert set(client.keys()) >= held
                assert len(held) > 1
    finally:
        server.remove()
    assert not server.folder.exists()


@pytest.mark.parametrize("answers", [True, False])
def test_servers_that_answer_are_used_and_others_started(answers: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HEADWATER_TEST_POSTGRES_URL", raising=False)
    monkeypatch.delenv("HEADWATER_TEST_REDIS_URL", raising=False)
    monkeypatch.setattr("tests.servers._postgres_answers", lambda url: answers)
    monkeypatch.setattr("tests.servers._redis_answers", lambda url: answers)
    with postgres() as one, redis_server() as other:
        assert ((one, other) == (LOCAL_POSTGRES, LOCAL_REDIS)) == answers
        if not answers:
            with psycopg.connect(one) as connection, redis.Redis.from_url(other) as client:
                assert connection.execute("SELECT 1").fetchone() == (1,)
                assert client.ping()


def test_databases_are_of_their_own_and_gone_afterwards(postgres_url: str, redis_url: str) -> None:
    with postgres_database(postgres_url) as one, postgres_database(postgres_url) as two:
        names = {make_url(url).database for url in (one, two)}
    assert len(names) == 2
    with psycopg.connect(postgres_url) as connection:
        assert not names & {name for (name,) in connection.execute("SELECT datname FROM pg_database")}
    with redis_database(redis_url) as one, redis_database(redis_url) as two:
        assert one != two
        with redis.Redis.from_url(one) as client:
            client.set("something", "1")
    with redis.Redis.from_url(one) as client:
        assert not client.exists("something")

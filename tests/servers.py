"""Real PostgreSQL and Redis for the tests, with nothing to prepare.

What answers is used: at HEADWATER_TEST_POSTGRES_URL and HEADWATER_TEST_REDIS_URL where they are set, else on the usual
ports of this machine. Where nothing answers, real servers out of the development packages are started, in about a
second each, and stopped at the end. Either way a test gets databases of its own, which are gone after it.
"""

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import redis
from psycopg import sql
from sqlalchemy import make_url

from app.servers import PackagedPostgres, PackagedRedis

POSTGRES_VARIABLE, REDIS_VARIABLE = "HEADWATER_TEST_POSTGRES_URL", "HEADWATER_TEST_REDIS_URL"
LOCAL_POSTGRES, LOCAL_REDIS = "postgresql://postgres@127.0.0.1:5432/postgres", "redis://127.0.0.1:6379"
REDIS_MARK, REDIS_MARK_S = "headwater-test", 3600  # says that a numbered database is taken, and until when


class TestPostgres(PackagedPostgres):
    """PostgreSQL in a folder of its own, without the care for a power cut."""

    __test__ = False

    def __init__(self) -> None:
        super().__init__(Path(tempfile.mkdtemp(prefix="headwater-pg-")), "fsync = off")

    def remove(self) -> None:
        """Stop it and leave nothing."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)


class TestRedis(PackagedRedis):
    """A Redis in a folder of its own, with a database for each test that runs at the same time."""

    __test__ = False

    def __init__(self) -> None:
        super().__init__(Path(tempfile.mkdtemp(prefix="headwater-redis-")), {"databases": 64})

    def remove(self) -> None:
        """Stop it and leave nothing."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def postgres() -> Iterator[str]:
    """The URL of a PostgreSQL server on which databases can be made."""
    given = os.environ.get(POSTGRES_VARIABLE)
    if given or _postgres_answers(LOCAL_POSTGRES):
        yield given or LOCAL_POSTGRES
        return
    server = TestPostgres()
    try:
        yield server.url
    finally:
        server.remove()


@contextmanager
def redis_server() -> Iterator[str]:
    """The URL of a Redis server."""
    given = os.environ.get(REDIS_VARIABLE)
    if given or _redis_answers(LOCAL_REDIS):
        yield given or LOCAL_REDIS
        return
    server = TestRedis()
    try:
        yield server.url
    finally:
        server.remove()


@contextmanager
def postgres_database(server: str, template: str | None = None) -> Iterator[str]:
    """The SQLAlchemy URL of a new database, a copy of the template's if there is one; dropped at the end."""
    name = f"headwater_test_{secrets.token_hex(6)}"
    made = sql.SQL("CREATE DATABASE {} TEMPLATE {}")
    origin = "template0" if template is None else make_url(template).database or ""
    _execute(server, made.format(sql.Identifier(name), sql.Identifier(origin)))
    try:
        url = make_url(server).set(drivername="postgresql+psycopg", database=name)
        yield url.render_as_string(hide_password=False)
    finally:
        _execute(server, sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))


@contextmanager
def redis_database(server: str) -> Iterator[str]:
    """The URL of a numbered database that was empty; emptied at the end."""
    with redis.Redis.from_url(server) as client:
        many = int(client.config_get("databases")["databases"])
    for number in range(many - 1, -1, -1):
        url = f"{server.rstrip('/')}/{number}"
        with redis.Redis.from_url(url) as client:
            if not client.set(REDIS_MARK, "taken", nx=True, ex=REDIS_MARK_S):
                continue
            if client.dbsize() > 1:  # somebody's data
                client.delete(REDIS_MARK)
                continue
            try:
                yield url
            finally:
                client.flushdb()
            return
    raise RuntimeError(f"each of the {many} databases of {server} holds something: empty one, or name another server")


def _postgres_answers(url: str) -> bool:
    """Whether there is a server that lets us make databases."""
    may_make = "SELECT rolcreatedb OR rolsuper FROM pg_roles WHERE rolname = current_user"
    try:
        with psycopg.connect(url, connect_timeout=2) as connection:
            return bool((connection.execute(may_make).fetchone() or [False])[0])
    except psycopg.OperationalError:
        return False


def _redis_answers(url: str) -> bool:
    try:
        with redis.Redis.from_url(url, socket_connect_timeout=2) as client:
            return bool(client.ping())
    except redis.RedisError:
        return False


def _execute(server: str, statement: sql.Composed) -> None:
    with psycopg.connect(server, autocommit=True, connect_timeout=10) as connection:
        connection.execute(statement)

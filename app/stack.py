"""The stack: what docker-compose.yml starts, as plain processes: PostgreSQL, Redis, the migration, an API, two workers.

A PostgreSQL and a Redis that answer on their usual ports are used (in a database of the stack's own); where none does,
real ones out of packages are started, whose data lie in the stack's folder. This is a client of the commands that an
operator uses, and of nothing else.
"""

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
from psycopg import sql
from redis import Redis, RedisError
from rich.console import Console

from app.processes import (
    Process,
    ProcessError,
    await_ready,
    end,
    free_port,
    require_free_port,
    start,
    tail,
    terminated_like_interrupted,
)
from app.servers import PackagedPostgres, PackagedRedis

POSTGRES = "postgresql://postgres@127.0.0.1:5432/postgres"
REDIS = "redis://127.0.0.1:6379/0"
DATABASE = "headwater_stack"
MISSING = "pip install 'headwater[dev]', or name a server with"


@dataclass(frozen=True)
class Running:
    """The stack while it is up: where it listens, and its processes by name."""

    url: str
    database_url: str
    queue_url: str
    processes: dict[str, Process] = field(default_factory=dict)
    metrics: dict[str, str] = field(default_factory=dict)
    """Address of each process's metrics."""


@dataclass(frozen=True)
class Stack:
    """What is started. Empty URLs: what answers on this machine, else servers of the stack's own."""

    data_dir: Path
    console: Console
    port: int = 8000
    workers: int = 2
    threads: int = 1
    database_url: str = ""
    queue_url: str = ""
    allowed_roots: tuple[Path, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)
    """More settings of the API and the workers, as in the environment."""

    def run(self) -> None:
        """Start all of it, say where it is, stay until Ctrl-C or until a process ends by itself."""
        with self.up() as running:
            self.console.print(f"\nAPI          {running.url}  (Swagger UI at /docs)", highlight=False)
            for name, address in running.metrics.items():
                self.console.print(f"metrics      {address}  ({name})", highlight=False)
            self.console.print(f"Stop it      Ctrl-C. Data and logs stay in {self.data_dir}", highlight=False)
            while True:
                for name, process in running.processes.items():
                    if process.poll() is not None:
                        raise ProcessError(f"{name} ended by itself; its log says:\n{tail(self._log(name))}")
                time.sleep(0.5)

    @contextmanager
    def up(self) -> Iterator[Running]:
        """All of it, ready for requests; ended with the block, workers first, so that they hand back what they hold."""
        require_free_port("127.0.0.1", self.port)
        self.data_dir.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack, terminated_like_interrupted():
            database_url = self.database_url
            if not database_url:
                database_url = ensure_database(stack.enter_context(postgres(self.data_dir / "postgres")), DATABASE)
            self._tell("postgres", database_url)
            queue_url = self.queue_url or stack.enter_context(redis_server(self.data_dir / "redis"))
            self._tell("redis", queue_url)
            running = Running(f"http://127.0.0.1:{self.port}", database_url, queue_url)
            shared = self._variables(running)
            self._migrate(shared)
            self._start(stack, running, "api", ["serve"], shared)
            running.metrics["api"] = f"{running.url}/metrics"
            for number in range(1, self.workers + 1):
                port = free_port()
                name, mine = f"worker-{number}", {"HEADWATER_METRICS_PORT": str(port)}
                self._start(stack, running, name, ["worker"], {**shared, **mine})
                running.metrics[name] = f"http://127.0.0.1:{port}/metrics"
            await_ready(running.processes["api"], running.url, self._log("api"))
            self._tell("ready", f"an API and {self.workers} workers, their logs in {self.data_dir}")
            yield running

    def _variables(self, running: Running) -> dict[str, str]:
        roots = [str(root.resolve()) for root in (self.data_dir, Path.cwd(), *self.allowed_roots)]
        return {
            "HEADWATER_DATA_DIR": str(self.data_dir.resolve()),
            "HEADWATER_ALLOWED_ROOTS": json.dumps(roots),
            "HEADWATER_DATABASE_URL": running.database_url,
            "HEADWATER_QUEUE_URL": running.queue_url,
            "HEADWATER_QUEUE_NAME": DATABASE,  # a Redis that was here before may serve another Headwater
            "HEADWATER_EMBEDDED_WORKER": "false",
            "HEADWATER_HOST": "127.0.0.1",
            "HEADWATER_PORT": str(self.port),
            "HEADWATER_THREADS": str(self.threads),
            "OMP_NUM_THREADS": str(self.threads),
            **self.variables,
        }

    def _migrate(self, variables: dict[str, str]) -> None:
        process = start(["migrate"], self._log("migrate"), variables)
        try:
            status = process.wait(120)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            end(process)
        if status != 0:
            raise ProcessError(f"the migration failed:\n{tail(self._log('migrate'))}")
        self._tell("migrated", tail(self._log("migrate"), 1))

    def _start(
        self, stack: ExitStack, running: Running, name: str, arguments: list[str], variables: dict[str, str]
    ) -> None:
        running.processes[name] = process = start(arguments, self._log(name), variables)
        stack.callback(end, process)

    def _log(self, name: str) -> Path:
        return self.data_dir.resolve() / f"{name}.log"

    def _tell(self, what: str, text: str) -> None:
        self.console.print(f"[green]✓[/green] {what:<11}", end="")
        self.console.print(text, markup=False, highlight=False)


@contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """The URL of the PostgreSQL server of this machine, else of one out of a package with its data in the folder."""
    try:
        psycopg.connect(POSTGRES, connect_timeout=2).close()
    except psycopg.OperationalError:
        pass
    else:
        yield POSTGRES
        return
    try:
        packaged = PackagedPostgres(folder)
    except ImportError as error:
        raise ProcessError(f"no PostgreSQL answers at 127.0.0.1:5432: {MISSING} HEADWATER_DATABASE_URL") from error
    with closing(packaged):
        yield packaged.url


def ensure_database(server: str, name: str) -> str:
    """The URL of a database on the server, made if it is not there."""
    with psycopg.connect(server, autocommit=True) as connection:
        if not connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [name]).fetchone():
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    return urlsplit(server)._replace(path=f"/{name}").geturl()


@contextmanager
def redis_server(folder: Path) -> Iterator[str]:
    """The URL of the Redis of this machine, else of one out of a package with its data in the folder."""
    try:
        with Redis.from_url(REDIS, socket_connect_timeout=2) as client:
            client.ping()
    except RedisError:
        pass
    else:
        yield REDIS
        return
    try:
        packaged = PackagedRedis(folder, {})
    except ImportError as error:
        raise ProcessError(f"no Redis answers at 127.0.0.1:6379: {MISSING} HEADWATER_QUEUE_URL") from error
    with closing(packaged):
        yield f"{packaged.url}/0"

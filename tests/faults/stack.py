"""A whole service to break: its own PostgreSQL and Redis, an API process, and workers that can be killed."""

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import psycopg
from sqlalchemy import make_url

from app.catalog.database import Database
from tests.api.harness import ENDED, Api, jsonl, must, rows, until
from tests.servers import TestPostgres, TestRedis, postgres_database

ROOT = Path(__file__).resolve().parents[2]
LEASE_S = 2.0  # soon over, where a worker is to be lost
LONG_LEASE_S = 10.0  # where none may be lost: a machine that has much else to do holds a worker up for seconds
WAIT_S = 600.0  # on a machine that has much else to do
QUICK = {
    "HEADWATER_LEASE_S": str(LEASE_S),
    "HEADWATER_SWEEP_INTERVAL_S": "0.5",
    "HEADWATER_PROGRESS_INTERVAL_S": "0.1",
    "HEADWATER_TASK_RETRIES": "100",
    "HEADWATER_THREADS": "1",
    "HEADWATER_LOG_JSON": "true",
    "OMP_NUM_THREADS": "1",
}


class WorkerProcess:
    """A worker, from outside."""

    def __init__(self, pid: int, log: Path) -> None:
        self.pid, self.log = pid, log

    @property
    def alive(self) -> bool:
        """Whether it has not ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, 0)
            return True
        return False

    def signal(self, how: signal.Signals) -> None:
        """Send it a signal, if it is there."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, how)

    def kill(self) -> None:
        """kill -9, and see it gone."""
        self.signal(signal.SIGKILL)
        until(lambda: self.alive, lambda alive: not alive)


class Stack:
    """The service. `files` of two indexes over the same rows are to be equal, whatever happened meanwhile."""

    def __init__(self, folder: Path, model_dir: Path, stack: ExitStack) -> None:
        self.folder, self.model_dir = folder, model_dir
        self.data_dir = folder / "data"
        self.postgres, self.redis = TestPostgres(), TestRedis()
        stack.callback(self.postgres.remove)
        stack.callback(self.redis.remove)
        self.database_url = stack.enter_context(postgres_database(self.postgres.url))
        asyncio.run(_migrate(self.database_url))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.env = {
            **QUICK,
            "HEADWATER_DATA_DIR": str(self.data_dir),
            "HEADWATER_DATABASE_URL": self.database_url,
            "HEADWATER_QUEUE_URL": self.redis.url,
            "HEADWATER_ALLOWED_ROOTS": json.dumps([str(model_dir.parent)]),
            "HEADWATER_PORT": str(self.port),
            "HEADWATER_EMBEDDED_WORKER": "false",
        }
        self.api = stack.enter_context(Api(base_url=f"http://127.0.0.1:{self.port}", timeout=60))
        self.zygote = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.zygote"],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.workers: list[WorkerProcess] = []
        stack.callback(self._end)
        self.start_api()
        assert self.zygote.stdout is not None
        assert self.zygote.stdout.readline() == "ready\n"

    def _end(self) -> None:
        for worker in self.workers:
            worker.signal(signal.SIGKILL)
        self.zygote.kill()
        self.zygote.wait()
        for pipe in (self.zygote.stdin, self.zygote.stdout):
            if pipe is not None:
                pipe.close()
        self.api_process.kill()
        self.api_process.wait()

    # --- processes ---

    def start_api(self) -> float:
        """Start the API; the seconds until it was ready."""
        began = time.monotonic()
        with (self.folder / "api.log").open("ab") as log:
            self.api_process = subprocess.Popen(
                [sys.executable, "-m", "app.cli", "serve"],
                cwd=ROOT,
                env=os.environ | self.env,
                stdout=log,
                stderr=log,
            )
        until(self.answers, bool, WAIT_S)
        return time.monotonic() - began

    def answers(self) -> bool:
        """Whether the API is ready."""
        assert self.api_process.poll() is None, (self.folder / "api.log").read_text()[-3000:]
        try:
            return self.api.get("/readyz").status_code == 200
        except httpx2.TransportError:
            return False

    def kill_api(self) -> None:
        """kill -9."""
        self.api_process.kill()
        self.api_process.wait()

    def start_worker(self, *, clock_s: float = 0.0, file_limit: int = 0, **env: str) -> WorkerProcess:
        """Start a worker, if asked with a clock that is wrong or a limit on the size of a file."""
        log = self.folder / f"worker-{len(self.workers)}.log"
        order = {"env": self.env | env, "clock_s": clock_s, "file_limit": file_limit, "log": str(log)}
        assert self.zygote.stdin is not None and self.zygote.stdout is not None
        self.zygote.stdin.write(json.dumps(order) + "\n")
        self.zygote.stdin.flush()
        worker = WorkerProcess(int(self.zygote.stdout.readline()), log)
        self.workers.append(worker)
        return worker

    @contextmanager
    def working(self, many: int = 2, **how: Any) -> Iterator[list[WorkerProcess]]:
        """Some workers, gone at the end with whoever replaced them."""
        before = len(self.workers)
        for _ in range(many):
            self.start_worker(**how)
        try:
            yield self.workers[before:]
        finally:
            for worker in self.workers[before:]:
                worker.kill()

    # --- jobs ---

    def prepare(self, name: str, count: int) -> None:
        """The model, and a dataset of so many rows."""
        if self.api.get("/models/tiny").status_code == 404:
            self.api.register(self.model_dir)
        must(self.api.upload(jsonl(rows(count)), name=name), 201)

    def build(self, name: str, dataset: str) -> str:
        """Submit a build; the job's id."""
        return str(self.api.build(name, dataset=dataset)["job"]["id"])

    def done(self, job_id: str, share: float) -> dict[str, Any]:
        """The job once this share of its rows is done."""

        def far(job: dict[str, Any]) -> bool:
            progress = job["progress"]
            known = progress is not None and progress["total"] and progress["stage"] in ("gradients", "publish")
            return bool(known and progress["done"] >= share * progress["total"]) or job["state"] == "succeeded"

        return dict(until(lambda: self.api.job(job_id), far, WAIT_S))

    def succeeded(self, job_id: str) -> dict[str, Any]:
        """The job, which must end well."""
        job: dict[str, Any] = until(lambda: self.api.job(job_id), lambda job: job["state"] in ENDED, WAIT_S)
        assert job["state"] == "succeeded", job
        return job

    def path(self, index: str) -> Path:
        """Where its files are."""
        return self.data_dir / "indexes" / must(self.api.get(f"/indexes/{index}"))["id"]

    def files(self, index: str) -> dict[str, bytes]:
        """What an index is on disk."""
        path = self.path(index)
        return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}

    def tasks(self, job_id: str) -> list[dict[str, Any]]:
        """The catalog's rows of a job's tasks, and what the database's clock says of their leases."""
        url = make_url(self.database_url).set(drivername="postgresql").render_as_string(hide_password=False)
        query = (
            "SELECT number, stage, state, attempts, failures, worker, done, "
            "lease_until - extract(epoch FROM clock_timestamp()) AS lease FROM tasks WHERE job_id = %s ORDER BY number"
        )
        with psycopg.connect(url) as connection, connection.cursor(row_factory=psycopg.rows.dict_row) as cursor:
            return cursor.execute(query, (job_id,)).fetchall()


async def _migrate(url: str) -> None:
    database = Database(url)
    await database.migrate()
    await database.close()


@contextmanager
def running(folder: Path, model_dir: Path) -> Iterator[Stack]:
    """The service, up, without a worker."""
    with ExitStack() as stack:
        yield Stack(folder, model_dir, stack)


def moment(most_s: float) -> None:
    """Wait for a random while."""
    time.sleep(random.uniform(0, most_s))

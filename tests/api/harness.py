"""The service over real HTTP: uvicorn in a thread of the test process, a client, and every test's first steps."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import uvicorn

from app.main import create_app
from app.settings import Settings

TIMEOUT_S = 180.0  # on a machine that has much else to do
ENDED = ("succeeded", "failed", "cancelled")
COLOURS = ("red", "blue", "green", "black", "white", "amber", "violet", "grey")
THINGS = ("harbour", "tower", "mill", "bridge", "garden", "market")


def rows(count: int = 12, start: int = 0) -> list[dict[str, Any]]:
    """Distinct training rows."""
    made = []
    for n in range(start, start + count):
        colour, thing = COLOURS[n % len(COLOURS)], THINGS[n % len(THINGS)]
        prompt, response = f"What colour is the {thing} number {n}?", f"The {thing} number {n} is {colour}."
        made.append({"prompt": prompt, "response": response, "family": thing})
    return made


def jsonl(records: list[dict[str, Any]]) -> bytes:
    """As a JSONL file."""
    return "".join(json.dumps(record) + "\n" for record in records).encode()


class Api(httpx2.Client):
    """A client that knows the usual first steps."""

    app: Any = None

    def register(self, model_dir: Path, name: str = "tiny", **more: Any) -> dict[str, Any]:
        return must(self.post("/models", json={"name": name, "path": str(model_dir), **more}), 201)

    def upload(
        self, content: bytes, name: str = "facts", filename: str = "facts.jsonl", **fields: str
    ) -> httpx2.Response:
        return self.post("/datasets", data={"name": name, **fields}, files={"file": (filename, content)})

    def build(self, name: str = "idx", model: str = "tiny", dataset: str = "facts", **more: Any) -> dict[str, Any]:
        return must(self.post("/indexes", json={"name": name, "model": model, "dataset": dataset, **more}), 202)

    def job(self, job_id: str) -> dict[str, Any]:
        return must(self.get(f"/jobs/{job_id}"))

    def wait(self, job_id: str, *states: str) -> dict[str, Any]:
        """The job once it is in one of the states (any end, if none is named)."""
        return until(lambda: self.job(job_id), lambda job: job["state"] in (states or ENDED))

    def ready(self, model_dir: Path, model: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
        """A model, a dataset and an index that is built; `model` is more of the model, `more` of the index."""
        self.register(model_dir, **(model or {}))
        must(self.upload(jsonl(rows())), 201)
        job = self.wait(self.build(**more)["job"]["id"])
        assert job["state"] == "succeeded", job
        return job


def must(response: httpx2.Response, status: int = 200) -> Any:
    """The body of a response that must have this status."""
    assert response.status_code == status, f"{response.status_code}: {response.text}"
    return response.json() if response.content else None


def problem(response: httpx2.Response, status: int, slug: str, field: str | None = None) -> dict[str, Any]:
    """The problem of a response that must be this one."""
    body = must(response, status)
    assert response.headers["content-type"] == "application/problem+json"
    assert body["type"] == f"urn:headwater:problem:{slug}", body
    assert body["status"] == status
    assert body["request_id"] == response.headers["x-request-id"]
    if field is not None:
        assert field in [error["field"] for error in body["errors"]], body
    return dict(body)


def until(look: Any, good: Any, timeout_s: float = TIMEOUT_S) -> Any:
    """Look again and again until it is good."""
    end = time.monotonic() + timeout_s
    while not good(found := look()):
        assert time.monotonic() < end, f"still {found!r} after {timeout_s} s"
        time.sleep(0.02)
    return found


@contextmanager
def serving(settings: Settings) -> Iterator[Api]:
    """The service on a free port for as long as the context lasts."""
    app = create_app(settings)
    # kept alive for longer than the client keeps a connection: else both may let go of it at the same moment
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=2, timeout_keep_alive=60))
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    until(lambda: server.started or not thread.is_alive(), bool)
    assert server.started
    try:
        with Api(base_url=f"http://127.0.0.1:{listening.getsockname()[1]}", timeout=TIMEOUT_S) as api:
            api.app = app
            yield api
    finally:
        server.should_exit = True
        thread.join(TIMEOUT_S)
        listening.close()

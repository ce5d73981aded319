"""A build that is killed with SIGKILL in mid-work goes on by itself when the service comes back."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest

from app.influence.index import open_index
from tests.api.harness import Api, jsonl, must, rows, until

ROOT = Path(__file__).resolve().parents[2]
ROWS = 900


class Service:
    """The service in a process of its own."""

    def __init__(self, data_dir: Path, root: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        settings = {
            "HEADWATER_DATA_DIR": str(data_dir),
            "HEADWATER_ALLOWED_ROOTS": f'["{root}"]',
            "HEADWATER_PORT": str(port),
            "HEADWATER_THREADS": "1",
            "HEADWATER_PROGRESS_INTERVAL_S": "0.05",
        }
        self.process = subprocess.Popen([sys.executable, "-m", "app.cli", "serve"], cwd=ROOT, env=os.environ | settings)
        self.api = Api(base_url=f"http://127.0.0.1:{port}", timeout=60)
        until(self._answers, bool)

    def _answers(self) -> bool:
        assert self.process.poll() is None, "the service did not start"
        try:
            return self.api.get("/readyz").status_code == 200
        except httpx2.TransportError:
            return False

    def kill(self, how: signal.Signals = signal.SIGKILL) -> None:
        """End it, politely or not."""
        self.api.close()
        self.process.send_signal(how)
        self.process.wait(60)


@pytest.fixture
def start(tmp_path: Path, tiny_model_dir: Path) -> Iterator[Callable[[], Service]]:
    running: list[Service] = []

    def service() -> Service:
        running.append(Service(tmp_path / "data", tiny_model_dir.parent))
        return running[-1]

    yield service
    for one in running:
        if one.process.poll() is None:
            one.kill()


def files(path: Path) -> dict[str, bytes]:
    """What an index is on disk."""
    found = {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    assert "manifest.json" in found
    return found


def test_an_append_that_is_killed_is_finished_with_each_row_once(
    start: Callable[[], Service], tiny_model_dir: Path, tmp_path: Path
) -> None:
    first = start()
    first.api.ready(tiny_model_dir)
    must(first.api.upload(jsonl(rows(ROWS, start=12)), name="more"), 201)
    job_id = must(first.api.post("/indexes/idx/samples", json={"dataset": "more"}), 202)["job"]["id"]
    until(lambda: first.api.job(job_id), lambda job: job["progress"] and job["progress"]["done"] >= 300)
    first.kill()

    second = start()
    job = second.api.wait(job_id)
    assert (job["state"], job["attempts"], job["result"]["rows"]) == ("succeeded", 2, ROWS + 12)
    index = must(second.api.get("/indexes/idx"))
    kept = open_index(tmp_path / "data/indexes" / index["id"]).ids
    assert (len(kept), len(set(kept))) == (ROWS + 12, ROWS + 12)
    given: set[str] = set()
    for name in ("facts", "more"):
        page = must(second.api.get(f"/datasets/{name}/samples", params={"limit": 500}))
        given |= {sample["id"] for sample in page["items"]}
        while page["next_cursor"]:
            params = {"limit": 500, "cursor": page["next_cursor"]}
            page = must(second.api.get(f"/datasets/{name}/samples", params=params))
            given |= {sample["id"] for sample in page["items"]}
    assert set(kept) == given


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_build_goes_on_after_the_process_was_ended(
    start: Callable[[], Service], tiny_model_dir: Path, tmp_path: Path, how: signal.Signals
) -> None:
    first = start()
    first.api.register(tiny_model_dir)
    must(first.api.upload(jsonl(rows(ROWS))), 201)
    job_id, queued = (first.api.build(name)["job"]["id"] for name in ("idx", "later"))
    until(
        lambda: first.api.job(job_id), lambda job: job["progress"] and job["progress"]["done"] >= 300
    )  # a shard is finished
    first.kill(how)

    second = start()
    job = second.api.job(job_id)
    assert job["state"] in ("queued", "running"), job
    assert job["progress"]["done"] < ROWS
    job = second.api.wait(job_id)
    assert (job["state"], job["attempts"]) == ("succeeded", 2)
    assert must(second.api.get("/indexes/idx"))["rows"] == ROWS
    ask = {"index": "idx", "prompt": rows(1)[0]["prompt"], "generation": rows(1)[0]["response"], "top_k": 1}
    assert must(second.api.post("/influence", json=ask))["proponents"]
    second.api.wait(queued)
    broken, unbroken = (files(tmp_path / "data/indexes" / second.api.job(job)["index"]) for job in (job_id, queued))
    assert broken == unbroken

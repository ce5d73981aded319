"""A worker in a terminal shows what all workers of its job have done; elsewhere it logs JSON and ends with 0."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from app.catalog.tables import Job
from app.catalog.types import JobKind
from app.jobs.progress import Progress
from app.worker import bars
from tests.api.harness import until
from tests.conftest import Backend

ROOT = Path(__file__).resolve().parents[1]


def test_a_terminal_shows_a_bar_with_rate_and_time_left() -> None:
    screen = io.StringIO()
    with bars(Console(file=screen, force_terminal=True, width=140)) as watch:
        job = Job(id="job_00abcdef", kind=JobKind.BUILD_INDEX, params={})
        watch(job, Progress("gradients", 96, 211, "rows", 7.4, 15.5))
    shown = screen.getvalue()
    assert all(part in shown for part in ("build_index", "abcdef", "gradients", "96/211", "7.4 rows/s", "0:15 left"))


def test_a_worker_waits_for_its_catalog_logs_json_and_ends_when_it_is_told(tmp_path: Path, redis_url: str) -> None:
    backend = Backend(f"sqlite+aiosqlite:///{tmp_path / 'headwater.db'}", redis_url)  # without a table
    settings = {f"HEADWATER_{name.upper()}": value for name, value in backend.settings.items()}
    log = tmp_path / "log"
    with log.open("wb") as opened:
        worker = subprocess.Popen(
            [sys.executable, "-m", "app.cli", "worker", "--data-dir", str(tmp_path)],
            cwd=ROOT,
            env=os.environ | settings,
            stderr=opened,
        )
    try:
        until(log.read_text, lambda text: "waiting for the catalog" in text)
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(30) == 0
    finally:
        worker.kill()
        worker.wait()
    assert all(json.loads(line)["event"] for line in log.read_text().splitlines())

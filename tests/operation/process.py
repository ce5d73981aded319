"""The service as an operator runs it: a process of its own, whose log is kept."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.api.harness import Api, until

ROOT = Path(__file__).resolve().parents[2]
Start = Callable[..., "Service"]


class Service:
    """`headwater serve` on a free port."""

    def __init__(self, folder: Path, root: Path, **settings: object) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        given = {"data_dir": folder / "data", "allowed_roots": json.dumps([str(root)]), "port": port, "threads": 1}
        variables = {f"HEADWATER_{name.upper()}": str(value) for name, value in (given | settings).items()}
        self._log = folder / f"service-{port}.log"
        with self._log.open("wb") as log:
            command = [sys.executable, "-m", "app.cli", "serve"]
            self.process = subprocess.Popen(command, cwd=ROOT, env=os.environ | variables, stderr=log)
        self.api = Api(base_url=f"http://127.0.0.1:{port}", timeout=60)
        until(self._answers, bool)

    def _answers(self) -> bool:
        assert self.process.poll() is None, self._log.read_text()
        try:
            return self.api.get("/readyz").status_code == 200
        except httpx2.TransportError:
            return False

    def log(self) -> list[dict[str, Any]]:
        """The log's events so far."""
        lines = self._log.read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def end(self, how: signal.Signals = signal.SIGTERM) -> int:
        """End it; the exit status."""
        self.api.close()
        if self.process.poll() is None:
            self.process.send_signal(how)
        return self.process.wait(60)


@pytest.fixture
def start(tmp_path: Path, tiny_model_dir: Path) -> Iterator[Start]:
    """Start the service with settings of the test's own; each call is one more process on the same data."""
    running: list[Service] = []

    def service(**settings: object) -> Service:
        running.append(Service(tmp_path, tiny_model_dir.parent, **settings))
        return running[-1]

    yield service
    for one in running:
        one.end(signal.SIGKILL)

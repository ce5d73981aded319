"""Processes that a command starts, watches and ends in order: the demo's service, the stack's servers and workers."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import httpx2

ROOT = Path(__file__).resolve().parents[1]
START_S = 120.0
END_S = 60.0

Process = subprocess.Popen[bytes]


class ProcessError(Exception):
    """A command cannot go on; the message says why and what to do."""


def start(arguments: list[str], log: Path, variables: Mapping[str, str]) -> Process:
    """`headwater` with these arguments as a process, which sees of our own HEADWATER_* settings only `variables`.

    It runs in the log's folder, away from a .env file, and in a session of its own, so that Ctrl-C reaches the command
    that started it, which then ends it in order. Its standard input closes with us, however we end.
    """
    others = {name: value for name, value in os.environ.items() if not name.startswith("HEADWATER_")}
    paths = os.pathsep.join(filter(None, (str(ROOT), others.get("PYTHONPATH"))))
    with log.open("wb") as output:
        return subprocess.Popen(  # noqa: S603 (our own command line)
            [sys.executable, "-m", "app.cli", *arguments],
            cwd=log.parent,
            env={**others, "PYTHONPATH": paths, **variables},
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def await_ready(process: Process, url: str, log: Path) -> None:
    """Return once the service at the address is ready for requests."""
    end = time.monotonic() + START_S
    with httpx2.Client(base_url=url, timeout=5) as client:
        while time.monotonic() < end:
            if process.poll() is not None:
                raise ProcessError(f"the service did not start; its log says:\n{tail(log)}")
            try:
                if client.get("/readyz").status_code == 200:
                    return
            except httpx2.TransportError:
                pass
            time.sleep(0.1)
    raise ProcessError(f"the service was not ready after {START_S:.0f} s; see {log}")


def end(process: Process, patience_s: float = END_S) -> None:
    """End a process in order; by force if it does not follow."""
    process.terminate()
    try:
        process.wait(patience_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdin is not None:
        process.stdin.close()


def require_free_port(host: str, port: int) -> None:
    """Raise when something else listens there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ProcessError(
                f"cannot listen on {host}:{port} ({error.strerror}): end what runs there, an earlier demo perhaps, "
                "or choose another port with --port"
            ) from error


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def tail(log: Path, lines: int = 8) -> str:
    """The last lines of a log."""
    try:
        return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
    except OSError:
        return "(there is none)"


@contextmanager
def terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM ends the command as Ctrl-C does, so that what it started never outlives it."""

    def interrupt(_signal: int, _frame: object) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

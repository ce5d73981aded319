"""Starts real worker processes in a moment: what they import is loaded once, and each is a fork of that.

It forks before any thread has begun. A line of JSON on stdin starts a worker, whose process number is the answer.
"""

import datetime
import json
import os
import resource
import signal
import sys
import time
from typing import Any

PRELOADED = ("transformers.models.llama.modeling_llama", "peft", "psycopg", "redis.asyncio", "docket")


def shift_clock(by_s: float) -> None:
    """Let this process believe that it is another time; how fast time passes stays."""
    real_time, real = time.time, datetime.datetime

    class Shifted(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime.datetime:
            return real.now(tz) + datetime.timedelta(seconds=by_s)

    time.time = lambda: real_time() + by_s
    time.time_ns = lambda: int((real_time() + by_s) * 1e9)
    for module in list(sys.modules.values()):
        for name, value in list(vars(module).items()):
            if value is real and not module.__name__.startswith(("datetime", "_datetime", "sqlalchemy", "psycopg")):
                setattr(module, name, Shifted)


def work(order: dict[str, Any]) -> None:
    from rich.console import Console

    from app.settings import Settings
    from app.worker import run_worker

    os.environ.update(order["env"])
    if order["clock_s"]:
        shift_clock(order["clock_s"])
    if order["file_limit"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["file_limit"],) * 2)
    run_worker(Settings(_env_file=None), Console(file=sys.stderr))


def main() -> None:
    import importlib

    for name in ("app.worker", *PRELOADED):
        importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them: leave no zombies
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            os.setpgid(0, 0)
            log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for descriptor in (1, 2):
                os.dup2(log, descriptor)
            os.close(0)
            code = 1
            try:
                work(order)
                code = 0
            finally:
                os._exit(code)
        print(child, flush=True)


if __name__ == "__main__":
    main()

"""Pull the plugs of a whole service, at length, and print what each fault cost: `make faults`.

Real PostgreSQL, Redis, API and worker processes, a tiny model. After every fault the index must be the one that nothing
broke, byte for byte, with each row once; a scenario that finds otherwise ends the run.
"""

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.conftest import make_tiny_model
from tests.faults import scenarios
from tests.faults.stack import LEASE_S, running


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=3000, help="rows of the index (256 a shard)")
    parser.add_argument("--kills", type=int, default=20, help="kill -9 of a worker during one build")
    parser.add_argument("--times", type=int, default=3, help="how often a server is stopped, a task given twice")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    rows, times = arguments.rows, arguments.times
    console, figures = Console(), {}
    with tempfile.TemporaryDirectory(prefix="headwater-faults-") as name:
        folder = Path(name)
        model_dir = make_tiny_model(folder / "models" / "tiny")
        with running(folder, model_dir) as stack:
            began = time.monotonic()
            unbroken = scenarios.reference(stack, "rows", rows)
            figures["nothing"] = {"rows": rows, "s": round(time.monotonic() - began, 1)}
            given = stack, "rows", unbroken, rows
            runs: dict[str, Callable[[], dict[str, Any]]] = {
                "worker killed with -9": lambda: scenarios.workers_killed(*given, kills=arguments.kills),
                "API killed with -9": lambda: scenarios.api_killed(*given),
                "Redis stopped and started": lambda: scenarios.redis_away(*given, times=times),
                "PostgreSQL stopped and started": lambda: scenarios.postgres_away(*given, times=times),
                "disk full": lambda: scenarios.disk_full(*given),
                "shard cut, shard with a bit flipped": lambda: scenarios.shards_damaged(*given),
                "the same index twice at once": lambda: scenarios.built_twice_at_once(*given, times=times),
                "two workers with the same task": lambda: scenarios.given_twice(*given, times=times),
                "client hangs up in /influence": lambda: scenarios.hung_up(stack, "rows-unbroken", times=200),
                "clocks disagree": lambda: scenarios.clocks_disagree(*given),
                "cancel with two workers": lambda: scenarios.cancelled(stack, "rows"),
                "worker terminated": lambda: scenarios.terminated(*given),
            }
            for fault, run in runs.items():
                with console.status(fault):
                    began = time.monotonic()
                    figures[fault] = run() | {"took, s": round(time.monotonic() - began, 1)}
    table = Table(
        "fault", "reached", title=f"{rows} rows, leases of {LEASE_S} s, every index byte for byte the unbroken one"
    )
    for fault, reached in figures.items():
        table.add_row(fault, "; ".join(f"{name}: {value}" for name, value in reached.items()))
    console.print(table)
    if arguments.json:
        where = {"python": platform.python_version(), "machine": platform.machine(), "lease_s": LEASE_S, "rows": rows}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({"settings": where, "faults": figures}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

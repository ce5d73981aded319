"""The service under load, over HTTP: what many callers get, and what sharing a pass is worth.

    python benchmarks/load.py                      # 32 clients on a tiny model, two minutes
    python benchmarks/load.py --seconds 600 --json benchmarks/out/load.json

Three measurements, each against a service process of its own. First all clients ask the same kind of question, once
with `max_batch` 1 (one call at a time) and once with the default (calls share passes), in turns: the ratio is what
sharing gives. Then a sustained mix (ways to rank, token scores, both directions) while an index is submitted every
second: no answer but 200 and the explicit 503 with Retry-After, no growth in memory, submissions answered at once.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import psutil
from rich.console import Console
from rich.table import Table
from worlds import World, tiny, tiny_model

from app.processes import Process, await_ready, end, free_port, start

MIX = [
    (0.7, {"tokens": "none", "top_k": 10}),
    (0.1, {"tokens": "none", "top_k": 10, "normalize": "none"}),
    (0.1, {"tokens": "none", "top_k": 10, "direction": "both"}),
    (0.1, {"tokens": "query", "top_k": 5}),
]
"""How often which kind of question is asked."""
SUBMIT_EVERY_S = 1.0
WARM_UP_S = 5.0
TURNS = 3
SUBMITTED_ROWS = 16


@dataclass
class Run:
    """What a stretch of load gave."""

    seconds: float
    latencies: list[float] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    submissions: list[float] = field(default_factory=list)
    memory: list[tuple[float, float]] = field(default_factory=list)  # (seconds, MB) of the service

    @property
    def rate(self) -> float:
        """Answers a second."""
        return len(self.latencies) / self.seconds

    def percentile(self, values: list[float], share: float) -> float:
        """In milliseconds."""
        return float(np.percentile(values, share)) * 1000 if values else float("nan")


class Service:
    """`headwater serve` with a model, a dataset and an index."""

    def __init__(self, process: Process, url: str) -> None:
        self.process, self.url = process, url
        self._usage = psutil.Process(process.pid)

    @property
    def memory_mb(self) -> float:
        return float(self._usage.memory_info().rss) / 2**20

    def prepare(self, model: Path, world: World) -> None:
        """Register the model, upload the rows, build the index over them."""
        with httpx2.Client(base_url=self.url, timeout=120) as client:
            made = [client.post("/models", json={"name": "tiny", "path": str(model)})]
            for name, many in (("facts", len(world.rows)), ("few", SUBMITTED_ROWS)):
                rows = [{"messages": [vars(one) for one in row.messages]} for row in world.rows[:many]]
                content = "".join(json.dumps(row) + "\n" for row in rows).encode()
                made.append(client.post("/datasets", data={"name": name}, files={"file": ("rows.jsonl", content)}))
            made.append(client.post("/indexes", json={"name": "idx", "model": "tiny", "dataset": "facts"}))
            for response in made:
                response.raise_for_status()
            while client.get("/indexes/idx").json()["state"] != "ready":
                time.sleep(0.1)


@contextmanager
def serving(folder: Path, model: Path, world: World, **settings: object) -> Iterator[Service]:
    """A service of its own for as long as the block lasts."""
    port = free_port()
    given = {
        "data_dir": folder / f"data-{port}",
        "allowed_roots": json.dumps([str(folder)]),
        "port": port,
        "log_level": "WARNING",
        **settings,
    }
    log = folder / f"service-{port}.log"
    process = start(["serve"], log, {f"HEADWATER_{name.upper()}": str(value) for name, value in given.items()})
    try:
        service = Service(process, f"http://127.0.0.1:{port}")
        await_ready(process, service.url, log)
        service.prepare(model, world)
        yield service
    finally:
        end(process)


async def load(service: Service, clients: int, seconds: float, question: Callable[[], dict[str, Any]]) -> Run:
    """So many clients ask one question after the other for so long."""
    run = Run(seconds)
    over = time.perf_counter() + seconds
    limits = httpx2.Limits(max_connections=clients + 2, max_keepalive_connections=clients + 2)
    async with httpx2.AsyncClient(base_url=service.url, timeout=120, limits=limits) as http:

        async def client() -> None:
            while (began := time.perf_counter()) < over:
                try:
                    response = await http.post("/influence", json=question())
                except httpx2.TransportError as error:
                    run.outcomes[type(error).__name__] += 1
                    continue
                took = time.perf_counter() - began
                told = response.status_code == 503 and "retry-after" in response.headers
                run.outcomes["503 with Retry-After" if told else str(response.status_code)] += 1
                if told:
                    await asyncio.sleep(int(response.headers["retry-after"]))
                elif response.status_code == 200:
                    run.latencies.append(took)

        await asyncio.gather(*(client() for _ in range(clients)))
    return run


def sustained(service: Service, clients: int, seconds: float, question: Callable[[], dict[str, Any]]) -> Run:
    """`load` beside the submission of jobs, watched; the submitter is a thread that no client's answer holds up."""
    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(lambda: asyncio.run(load(service, clients, seconds, question)))
        submissions, memory, failed = [], [], Counter[str]()
        began = time.perf_counter()
        with httpx2.Client(base_url=service.url, timeout=120) as http:
            for number in itertools.count():
                time.sleep(max(0.0, began + number * SUBMIT_EVERY_S - time.perf_counter()))
                if working.done():
                    break
                memory.append((time.perf_counter() - began, service.memory_mb))
                asked = time.perf_counter()
                response = http.post("/indexes", json={"name": f"more-{number}", "model": "tiny", "dataset": "few"})
                submissions.append(time.perf_counter() - asked)
                if response.status_code != 202:
                    failed[f"submission: {response.status_code}"] += 1
        run = working.result()
    run.submissions, run.memory, run.outcomes = submissions, memory, run.outcomes + failed
    return run


def questions(world: World, seed: int, mix: list[tuple[float, dict[str, Any]]]) -> Callable[[], dict[str, Any]]:
    """A source of questions about the world's prompts and answers."""
    rng = random.Random(seed)
    shares, kinds = zip(*mix, strict=True)

    def question() -> dict[str, Any]:
        asked = rng.randrange(len(world.prompts))
        said = {"index": "idx", "prompt": world.prompts[asked], "generation": world.planted[asked]}
        return said | rng.choices(kinds, shares)[0]

    return question


def slope(memory: list[tuple[float, float]]) -> float:
    """Growth in MB a minute over the last two thirds, by least squares: the first third fills pools and caches."""
    late = memory[len(memory) // 3 :]
    seconds, megabytes = zip(*late, strict=True)
    return float(np.polyfit(seconds, megabytes, 1)[0]) * 60


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Every figure."""
    world = tiny(rows=arguments.rows)
    model = folder / "model"
    tiny_model(world, model).save_pretrained(model)
    same, mixed = questions(world, 0, MIX[:1]), questions(world, 1, MIX)
    rates: dict[str, list[float]] = {"alone": [], "shared": []}
    with serving(folder, model, world, max_batch=1) as alone, serving(folder, model, world) as shared:
        for service in (alone, shared):
            asyncio.run(load(service, arguments.clients, WARM_UP_S, same))
        for _ in range(TURNS):  # in turns: a neighbour who takes the machine slows both alike
            for name, service in (("alone", alone), ("shared", shared)):
                run = asyncio.run(load(service, arguments.clients, arguments.seconds / 10, same))
                rates[name].append(run.rate)
    with serving(folder, model, world) as service:
        asyncio.run(load(service, arguments.clients, WARM_UP_S, mixed))
        run = sustained(service, arguments.clients, arguments.seconds, mixed)
    alone_rate, shared_rate = statistics.median(rates["alone"]), statistics.median(rates["shared"])
    return {
        "clients": arguments.clients,
        "seconds": arguments.seconds,
        "rows": arguments.rows,
        "alone_per_second": alone_rate,
        "shared_per_second": shared_rate,
        "sharing": shared_rate / alone_rate,
        "turns": rates,
        "mix_per_second": run.rate,
        "outcomes": dict(run.outcomes),
        "p50_ms": run.percentile(run.latencies, 50),
        "p95_ms": run.percentile(run.latencies, 95),
        "p99_ms": run.percentile(run.latencies, 99),
        "submissions": len(run.submissions),
        "submission_p50_ms": run.percentile(run.submissions, 50),
        "submission_p95_ms": run.percentile(run.submissions, 95),
        "memory_start_mb": run.memory[0][1],
        "memory_end_mb": run.memory[-1][1],
        "memory_slope_mb_per_minute": slope(run.memory),
    }


def main() -> None:
    """Measure, print the table, say what was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="length of the sustained mix")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--rows", type=int, default=400, help="rows of the index")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(arguments, Path(folder))
    wrong = {what: many for what, many in found["outcomes"].items() if what not in ("200", "503 with Retry-After")}
    growth = found["memory_slope_mb_per_minute"]
    table = Table(title=f"{found['clients']} clients, {found['seconds']:.0f} s, {found['rows']} rows, a tiny model")
    for column in ("what", "figure", "wanted", ""):
        table.add_column(column)
    latency = " / ".join(f"{found[f'p{share}_ms']:.0f}" for share in (50, 95, 99))
    submission = found["submission_p95_ms"]
    memory = f"{found['memory_start_mb']:.0f} to {found['memory_end_mb']:.0f} MB, {growth:+.1f} MB a minute"
    answers = ", ".join(f"{many} x {what}" for what, many in found["outcomes"].items())
    lines: list[tuple[str, str, str, bool | None]] = [
        ("one call at a time", f"{found['alone_per_second']:.0f} /s", "", None),
        ("calls share passes", f"{found['shared_per_second']:.0f} /s", "", None),
        ("sharing gives", f"{found['sharing']:.2f} x", "2 x or more", found["sharing"] >= 2),
        ("the mix", f"{found['mix_per_second']:.0f} /s", "", None),
        ("latency p50 / p95 / p99", f"{latency} ms", "", None),
        ("answers", answers, "200, 503", not wrong),
        ("submission p50", f"{found['submission_p50_ms']:.0f} ms", "", None),
        ("submission p95", f"{submission:.0f} ms", "below 100 ms", submission < 100),
        ("memory", memory, "below 1 % a minute", growth < 0.01 * found["memory_end_mb"]),
    ]
    for what, figure, wanted, good in lines:
        table.add_row(what, figure, wanted, "" if good is None else "yes" if good else "MISSED")
    Console().print(table)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    sys.exit(any(good is False for *_, good in lines))


if __name__ == "__main__":
    main()

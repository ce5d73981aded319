"""How building and searching grow with rows, dimensions and devices; lines through it, and ten million rows on paper.

    python benchmarks/scale.py                     # three minutes

Times are CPU seconds of one thread (of the fastest of the repeats), except for the sweep over processes, which is wall
clock. The lines are least squares; R2 and the worst residual say how straight they are. The estimate multiplies their
constants and published figures of named hardware: nothing of that size was run.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from search import blocks, corpus, cpu, reading, store
from worlds import tiny, tiny_model

from app.influence.building import build, compute_shard, plan_build
from app.influence.corpus import Row
from app.influence.gradients import plan_for
from app.influence.index import Index, IndexSpec, open_index
from app.influence.models import LoadedModel, ModelSpec, load
from app.influence.projection import ProjectionSpec


@dataclass(frozen=True)
class Line:
    """Seconds = sum of constants x quantities.

    Attributes:
        worst: the largest residual, as a share of the time that was measured.
    """

    constants: dict[str, float]
    r2: float
    worst: float


def fit(points: Sequence[dict[str, float]], quantities: dict[str, Callable[[dict[str, float]], float]]) -> Line:
    """Least squares of `seconds`, each point weighed by its inverse: a residual of 5 % counts the same everywhere."""
    seconds = np.array([point["seconds"] for point in points])
    design = np.array([[of(point) for of in quantities.values()] for point in points])
    constants, *_ = np.linalg.lstsq(design / seconds[:, None], np.ones(len(points)), rcond=None)
    off = design @ constants - seconds
    r2 = 1 - float(off @ off / ((seconds - seconds.mean()) ** 2).sum())
    return Line(dict(zip(quantities, constants.tolist(), strict=True)), r2, float(np.abs(off / seconds).max()))


BUILD = {
    "a build": lambda p: 1.0,
    "a token": lambda p: p["tokens"],
    "a stored number": lambda p: p["rows"] * p["width"],
}
SEARCH = {"a search": lambda p: 1.0, "a row": lambda p: p["rows"], "a stored number": lambda p: p["rows"] * p["width"]}


def builds(model: LoadedModel, rows: Sequence[int], sizes: Sequence[int], repeats: int, folder: Path) -> list[Any]:
    """CPU seconds of whole builds by rows and projection."""
    pool, encoder = corpus(max(rows)), model.encoder()
    tokens = [len(encoder.encode(row).ids) for row in pool]
    points: dict[tuple[int, int], dict[str, float]] = {}
    for repeat in range(repeats):
        for size in sizes:
            for many in rows:
                spec = IndexSpec(ProjectionSpec(size=size))
                path = folder / f"build-{repeat}-{size}-{many}"
                seconds = cpu(lambda many=many, spec=spec, path=path: list(build(path, model, pool[:many], spec)))  # type: ignore[misc]
                width = plan_for(model, spec.projection, spec.normalisation).width
                point = {"rows": many, "tokens": sum(tokens[:many]), "width": width, "seconds": seconds}
                points[size, many] = min(points.get((size, many), point), point, key=lambda p: p["seconds"])
    return list(points.values())


def searches(
    rows: Sequence[int], widths: Sequence[int], vectors: int, repeats: int, folder: Path
) -> list[dict[str, float]]:
    """CPU seconds of searches by rows and dimensions."""
    indexes: list[tuple[Index, torch.Tensor]] = []
    for width in widths:
        for many in rows:
            path = folder / f"search-{width}-{many}"
            index = open_index(path, verify=False) if path.exists() else store(path, blocks(many, width), IndexSpec())
            asked = torch.randn(vectors, width, generator=torch.Generator().manual_seed(1))
            indexes.append((index, asked))
    found = [float("inf")] * len(indexes)
    for _ in range(repeats + 1):
        for at, (index, asked) in enumerate(indexes):
            found[at] = min(found[at], cpu(lambda i=index, a=asked: i.top(a, 10, "unit", True)))  # type: ignore[misc]
    return [
        {"rows": index.rows, "width": index.manifest.width, "seconds": seconds}
        for (index, _), seconds in zip(indexes, found, strict=True)
    ]


_worker: dict[str, Any] = {}


def begin(folder: Path) -> None:
    """What a process of the sweep has before it is timed."""
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    _worker["model"] = load(ModelSpec(folder / "model"))


def one_shard(path: Path, rows: list[Row], spec: IndexSpec, number: int) -> None:
    for _ in compute_shard(path, _worker["model"], rows, spec, number):
        pass


def processes(model: LoadedModel, rows: int, most: int, folder: Path) -> list[dict[str, float]]:
    """Wall seconds of all shards of a build, by the number of processes that take one after the other."""
    pool = corpus(rows)
    spec = IndexSpec(shard_rows=max(16, rows // 8))
    found = []
    for many in range(1, most + 1):
        path = folder / f"processes-{many}"
        parts = plan_build(path, model, [row.id for row in pool], spec)
        with ProcessPoolExecutor(many, get_context("spawn"), begin, (folder,)) as workers:
            list(workers.map(time.sleep, [0.5] * many))  # all of them have their model
            began = time.perf_counter()
            asked = [workers.submit(one_shard, path, pool[p.start : p.start + p.rows], spec, p.number) for p in parts]
            for one in asked:
                one.result()
            found.append({"processes": many, "seconds": time.perf_counter() - began, "rows": rows})
    return found


def devices(rows: int, repeats: int, folder: Path) -> list[dict[str, Any]]:
    """Wall seconds of a build and of a scan with 64 vectors on the CPU and on each GPU that is there."""
    pool = corpus(rows)
    names = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
    found = []
    for name in names:
        model = load(ModelSpec(folder / "model", device=name))
        best_build, best_scan = float("inf"), float("inf")
        for repeat in range(repeats):
            path = folder / f"device-{name.replace(':', '-')}-{repeat}"
            began = time.perf_counter()
            list(build(path, model, pool, IndexSpec()))
            best_build = min(best_build, time.perf_counter() - began)
        index = open_index(path)
        asked = torch.randn(64, index.manifest.width)
        for _ in range(repeats + 1):
            began = time.perf_counter()
            for shard in index.shards:
                shard.scores(asked, "unit", index.manifest.width, name)
            best_scan = min(best_scan, time.perf_counter() - began)
        found.append({"device": name, "rows": rows, "build_seconds": best_build, "scan_seconds": best_scan})
    return found


# Published figures. NVIDIA H100 SXM5 data sheet; AMD EPYC 9654 product page (12 channels of DDR5-4800 a socket).
H100_FLOPS, H100_BYTES, H100_MEMORY = 989e12, 3.35e12, 80e9
EPYC_BYTES, EPYC_CORES, SOCKETS = 460.8e9, 96, 2
GPUS, USED = 8, 0.35  # of a server; of their peak, a usual share for training-like passes: assumed, not measured
PARAMETERS, MODULES, TOKENS = 8.03e9, 224, 200  # Llama-3.1-8B: 32 layers of 7 linear modules; tokens a row: assumed


def paper(rows: int, building: Line, searching: Line, over: float) -> list[tuple[str, str, str]]:
    """The estimate, as (what, arithmetic, result)."""
    width = MODULES * 256
    numbers = rows * width
    size = 2 * numbers
    passes = 4 * PARAMETERS * rows * TOKENS
    written, scanned = building.constants["a stored number"], searching.constants["a stored number"]
    cores = SOCKETS * EPYC_CORES
    memory = SOCKETS * EPYC_BYTES
    cards = math.ceil(size / (0.9 * H100_MEMORY))
    return [
        ("numbers a row", f"{MODULES} modules x 16 x 16", f"{width:,}"),
        ("index, fp16 / int8", f"{rows:,} x {width:,} x 2 or 1 bytes", f"{size / 1e12:.2f} / {size / 2e12:.2f} TB"),
        (
            "passes of a build",
            f"4 x {PARAMETERS:.3g} x {rows:,} x {TOKENS} FLOP over {GPUS} H100 x {H100_FLOPS:.3g}/s x {USED}",
            f"{passes / (GPUS * H100_FLOPS * USED) / 3600:.1f} h",
        ),
        (
            "storing",
            f"{written:.2g} s (measured) x {numbers:.3g} numbers over {cores} cores",
            f"{written * numbers / cores / 60:.1f} min",
        ),
        ("query, one core", f"{scanned:.2g} s (measured) x {numbers:.3g} numbers", f"{scanned * numbers:.0f} s"),
        (
            "query, all cores, memory-bound",
            f"{size:.3g} bytes over {memory:.3g} bytes/s x {over:.2f} (measured: over reading)",
            f"{size / memory * over:.1f} s",
        ),
        (
            f"query, fp16 codes in {cards} H100",
            f"{size:.3g} bytes over {cards} x {H100_BYTES:.3g} bytes/s, if nothing but memory cost",
            f"{1e3 * size / (cards * H100_BYTES):.0f} ms",
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sweeps: whether it runs, not what it costs")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2, help="most processes of the sweep over them")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    quick, repeats = arguments.quick, 1 if arguments.quick else arguments.repeats
    rows, sizes = ((32, 64), (4, 8)) if quick else ((200, 400, 800), (8, 16, 24))
    lengths, widths = ((256, 512), (512, 1024)) if quick else ((2048, 4096, 8192), (2048, 4096, 8192))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny_model(tiny(600, fresh=0), folder / "model").save_pretrained(folder / "model")
        model = load(ModelSpec(folder / "model"))
        built = builds(model, rows, sizes, repeats, folder)
        searched = {many: searches(lengths, widths, many, repeats, folder) for many in (1, 64)}
        by_process = processes(model, rows[-1], arguments.processes, folder)
        by_device = devices(rows[0], repeats, folder)
        largest = store(folder / "reading", blocks(lengths[-1], widths[-1]), IndexSpec())
        read = min(cpu(lambda: reading(largest)) for _ in range(repeats + 2))
    lines = {"build": fit(built, BUILD)} | {
        f"search, {many} vector{'s' if many > 1 else ''}": fit(points, SEARCH) for many, points in searched.items()
    }
    console = Console()
    table = Table("rows", "tokens", "numbers a row", "CPU s", title="building, a tiny Llama")
    for p in built:
        table.add_row(f"{p['rows']:,}", f"{p['tokens']:,}", f"{p['width']:,}", f"{p['seconds']:.2f}")
    console.print(table)
    table = Table("rows", "dimensions", "1 vector, ms", "64 vectors, ms", title="searching, fp16")
    for one, many in zip(searched[1], searched[64], strict=True):
        times = (f"{1e3 * p['seconds']:.1f}" for p in (one, many))
        table.add_row(f"{one['rows']:,}", f"{one['width']:,}", *times)
    console.print(table)
    table = Table("processes", "wall s", "rows/s", title=f"building {rows[-1]} rows by processes")
    for p in by_process:
        table.add_row(f"{p['processes']}", f"{p['seconds']:.2f}", f"{p['rows'] / p['seconds']:.0f}")
    console.print(table)
    table = Table("device", "build, rows/s", "scan with 64 vectors, ms", title=f"devices, {rows[0]} rows, wall clock")
    for d in by_device:
        table.add_row(d["device"], f"{d['rows'] / d['build_seconds']:.0f}", f"{1e3 * d['scan_seconds']:.1f}")
    console.print(table)
    table = Table("line", "constants, seconds", "R2", "worst residual", title="seconds = sum of constants x quantities")
    for name, line in lines.items():
        constants = ", ".join(f"{value:.3g} {what}" for what, value in line.constants.items())
        table.add_row(name, constants, f"{line.r2:.4f}", f"{100 * line.worst:.0f} %")
    console.print(table)
    over = max(1.0, searched[1][-1]["seconds"] / read)  # below one is noise
    estimate = paper(10_000_000, lines["build"], lines["search, 1 vector"], over)
    title = "AN ESTIMATE ON PAPER: 10,000,000 rows, Llama-3.1-8B, 8 x H100 SXM, 2 x EPYC 9654"
    table = Table("what", "arithmetic", "result", title=title)
    for cells in estimate:
        table.add_row(*cells)
    console.print(table)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        found = {
            "quick": quick,
            "builds": built,
            "searches": searched,
            "processes": by_process,
            "devices": by_device,
            "lines": {name: vars(line) for name, line in lines.items()},
            "over_reading": over,
            "estimate": [dict(zip(("what", "arithmetic", "result"), cells, strict=True)) for cells in estimate],
        }
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

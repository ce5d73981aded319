"""What a search costs beside reading the codes once and beside FAISS's quantiser, and what smaller codes lose.

    python benchmarks/search.py                    # indexes of 350 MB, four minutes

Times are CPU seconds of one thread, the best of the interleaved repeats, over real index folders (shards of 256 rows,
in the page cache). "reading" sums the mapped codes as 64-bit integers. Recall is measured on real gradients of a tiny
Llama, trained on some of the rows for a moment; exact is the product with the stored fp16 vectors.
SQ8 and IVF are FAISS's own, over the same vectors in memory: Headwater does not offer them.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from training import train
from worlds import World, questions, tiny, tiny_model

from app.influence.building import Part, _record, _save, batches, build
from app.influence.corpus import Row, parse_row
from app.influence.gradients import gradients, plan_for
from app.influence.index import Index, IndexSpec, Manifest, open_index, publish
from app.influence.models import LoadedModel, ModelSpec, load

SHARD = 256
READING, FASTER = 1.3, 3.0  # the aims


def store(path: Path, blocks: Iterator[torch.Tensor], spec: IndexSpec) -> Index:
    """An index of unit vectors [rows, width] a shard, written as a build writes them."""
    (path / "shards").mkdir(parents=True)
    records, width = [], 0
    for number, block in enumerate(blocks):
        rows = [parse_row({"text": f"row {at} of shard {number}"}) for at in range(len(block))]
        part, ones = Part(number, 0, len(rows)), torch.ones(len(rows), 1)
        _save(path, part.name, rows, block, ones, ones.clone(), [], [], spec.codes)
        records.append(_record(path, part))
        width = block.shape[1]
    only = {"name": "made", "weight": 1.0, "heldout_loss": None, "train_loss": 1.0}
    module = {"name": "made", "d_out": 1, "d_in": width}
    publish(path, Manifest(asdict(spec), width, [only], {}, [module], [], records, [], {}, [], {}))
    return open_index(path)


def blocks(rows: int, width: int) -> Iterator[torch.Tensor]:
    """Random unit vectors, a shard at a time; the same each time."""
    generator = torch.Generator().manual_seed(0)
    for start in range(0, rows, SHARD):
        block = torch.randn(min(SHARD, rows - start), width, generator=generator)
        yield block / block.norm(dim=1, keepdim=True)


def cpu(work: Callable[[], object]) -> float:
    started = time.thread_time()
    work()
    return time.thread_time() - started


def best(works: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The best CPU seconds of each, interleaved."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats + 1):
        for name, work in works.items():
            found[name].append(cpu(work))
    return {name: min(each[1:]) for name, each in found.items()}  # the first time is for the caches


def reading(index: Index) -> None:
    """All mapped codes once."""
    for shard in index.shards:
        for codes in shard.codes:
            codes.reshape(-1).view(np.uint64).sum()


def by_faiss(index: Index, vectors: torch.Tensor, k: int) -> None:
    """FAISS's own search of every shard, and nothing else."""
    for shard in index.shards:
        for part in shard.parts:
            part.index.search(vectors.numpy(), k)


def costs(rows: int, width: int, repeats: int, folder: Path) -> dict[str, Any]:
    """Seconds of searches of an index of random vectors."""
    asked = torch.randn(64, width, generator=torch.Generator().manual_seed(1))
    found: dict[str, Any] = {"rows": rows, "width": width}
    for codes in ("fp16", "int8"):
        index = store(folder / f"{rows}-{codes}", blocks(rows, width), IndexSpec(codes=codes))  # type: ignore[arg-type]
        works: dict[str, Callable[[], object]] = {
            "reading": lambda i=index: reading(i),  # type: ignore[misc]
            "one": lambda i=index: i.top(asked[:1], 10, "unit", True),  # type: ignore[misc]
            "sixteen": lambda i=index: i.top(asked[:16], 10, "unit", True),  # type: ignore[misc]
            "sixty_four": lambda i=index: i.top(asked, 10, "unit", True),  # type: ignore[misc]
        }
        found[codes] = best(works, repeats)
        if codes == "fp16":
            slow = {n: cpu(lambda i=index, n=n: by_faiss(i, asked[:n], 10)) for n in (16, 64)}  # type: ignore[misc]
            found["faiss"] = {"sixteen": slow[16], "sixty_four": slow[64]}
        found[codes]["bytes"] = index.manifest.stats.get("bytes") or sum(s["bytes"] for s in index.manifest.shards)
    found["one_over_reading"] = found["fp16"]["one"] / found["fp16"]["reading"]
    found["sixty_four_faster"] = found["faiss"]["sixty_four"] / found["fp16"]["sixty_four"]
    return found


def corpus(rows: int, seed: int = 0) -> list[Row]:
    """Pairs of the tiny world's questions."""
    rng = random.Random(seed)
    asked = questions(rng)
    pairs = {(rng.randrange(len(asked)), rng.randrange(len(asked))) for _ in range(2 * rows)}
    made = [(asked[a], asked[b]) for a, b in sorted(pairs)]
    rng.shuffle(made)
    texts = [{"prompt": f"{a[0]} {b[0]}", "response": f"{a[1]} {b[1]}"} for a, b in made[:rows]]
    return [parse_row(text) for text in texts]


def trained(world: World, rows: Sequence[Row], folder: Path, steps: int) -> LoadedModel:
    model = tiny_model(world, folder)
    model.save_pretrained(folder)
    if steps:
        encoder = load(ModelSpec(folder)).encoder()
        examples = [encoder.encode(row) for row in rows]
        for _ in train(model, examples, [steps], 16, 2e-3, 0, Console(quiet=True)):
            pass
        model.save_pretrained(folder)
    return load(ModelSpec(folder))


def queries(model: LoadedModel, rows: Sequence[Row], spec: IndexSpec) -> torch.Tensor:
    """Unit gradients [rows, width]."""
    plan, encoder = plan_for(model, spec.projection, spec.normalisation), model.encoder()
    examples = [encoder.encode(row) for row in rows]
    vectors = torch.zeros(len(rows), plan.width)
    for batch in batches(examples, spec.token_budget):
        vectors[batch] = gradients(model, model.checkpoints[0], plan, [examples[i] for i in batch]).vectors
    return vectors / vectors.norm(dim=1, keepdim=True)


def recall(rows: int, asked: int, steps: int, folder: Path) -> list[dict[str, Any]]:
    """Of approximate codes and structures: what of the exact ten and hundred best they find, bytes a row, seconds."""
    pool = corpus(rows + asked)
    model = trained(tiny(600, fresh=0), pool[:600], folder / "model", steps)
    kinds = {codes: IndexSpec(codes=codes, shard_rows=SHARD) for codes in ("fp16", "int8")}  # type: ignore[arg-type]
    for codes, spec in kinds.items():
        list(build(folder / codes, model, pool[:rows], spec))
    exact, small = (open_index(folder / codes) for codes in kinds)
    vectors = queries(model, pool[rows:], kinds["fp16"])
    width = exact.manifest.width
    order = exact.scores(vectors, "unit").topk(100).indices.numpy()
    stored = np.concatenate([shard.codes[0] for shard in exact.shards]).astype(np.float32)

    def line(name: str, found: Any, seconds: float, size: float) -> dict[str, Any]:
        parts = {f"recall_{k}": share(found[:, :k], order[:, :k]) for k in (10, 100)}
        return {"index": name, **parts, "bytes_per_row": size, "milliseconds_per_query": 1e3 * seconds / asked}

    def share(some: Any, right: Any) -> float:
        hits = (len(set(a) & set(b)) for a, b in zip(some.tolist(), right.tolist(), strict=True))
        return float(np.mean([hit / right.shape[1] for hit in hits]))

    def search(index: Any) -> tuple[Any, float]:
        started = time.thread_time()
        found = np.concatenate([index.search(vector[None], 100)[1] for vector in vectors.numpy()])
        return found, time.thread_time() - started

    lines = []
    for name, index, size in (("flat fp16 (the default)", exact, 2 * width), ("int8 codes", small, width + 4)):
        started = time.thread_time()
        scores = index.scores(vectors, "unit")
        lines.append(line(name, scores.topk(100).indices.numpy(), time.thread_time() - started, size))
    quantiser = faiss.index_factory(width, "SQ8", faiss.METRIC_INNER_PRODUCT)
    quantiser.train(stored[: rows // 2])
    quantiser.add(stored)
    lines.append(line("FAISS SQ8, ranges learnt from half the rows", *search(quantiser), width))
    lists = max(4, int(rows**0.5))
    inverted = faiss.index_factory(width, f"IVF{lists},SQfp16", faiss.METRIC_INNER_PRODUCT)
    inverted.cp.niter, inverted.cp.min_points_per_centroid = 8, 1
    inverted.train(stored)
    inverted.add(stored)
    for probes in sorted({max(1, lists // part) for part in (32, 8, 4, 2, 1)}):
        inverted.nprobe = probes
        lines.append(line(f"FAISS IVF fp16, {probes} of {lists} lists", *search(inverted), 2 * width))
    return lines


def cost_table(searches: Sequence[dict[str, Any]]) -> Table:
    """A line for each index and its codes."""
    title = "CPU milliseconds of a search, one thread, shards of 256 rows"
    columns = ("index", "codes", "reading", "1 vector", "16", "64", "FAISS, 64", "1 over reading", "64 over FAISS")
    table = Table(*columns, title=title)
    for one in searches:
        for codes in ("fp16", "int8"):
            times = one[codes]
            ours = [f"{1e3 * times[name]:,.1f}" for name in ("reading", "one", "sixteen", "sixty_four")]
            last = (
                [f"{1e3 * one['faiss']['sixty_four']:,.0f}", f"{one['one_over_reading']:.2f} (aim {READING})"]
                if codes == "fp16"
                else ["", f"{times['one'] / times['reading']:.2f}"]
            )
            faster = f"{one['faiss']['sixty_four'] / times['sixty_four']:.1f} (aim {FASTER:.0f})"
            table.add_row(f"{one['rows']:,} x {one['width']:,}", codes, *ours, *last, faster)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small indexes: whether it runs, not what it costs")
    parser.add_argument("--rows", type=int, default=3000, help="of real gradients, for recall")
    parser.add_argument("--queries", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    shapes = [(2000, 2048), (300, 16384)] if arguments.quick else [(20_000, 8192), (3000, 65_536)]
    rows, steps = (400, 0) if arguments.quick else (arguments.rows, 150)
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        searches = [costs(n, d, arguments.repeats, Path(folder)) for n, d in shapes]
        console.print(cost_table(searches))
        recalled = recall(rows, arguments.queries, steps, Path(folder))
    title = f"what approximate indexes find of {rows:,} real gradients, {arguments.queries} queries"
    table = Table("index", "recall@10", "recall@100", "bytes a row", "CPU ms a query", title=title)
    for one in recalled:
        figures = (f"{one['recall_10']:.4f}", f"{one['recall_100']:.4f}", f"{one['bytes_per_row']:,.0f}")
        table.add_row(one["index"], *figures, f"{one['milliseconds_per_query']:.2f}")
    console.print(table)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        found = {"quick": arguments.quick, "searches": searches, "recall": recalled}
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

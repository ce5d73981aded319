"""Valuation: is a row that LinFiK values highly worth training on, and does a cheap student find the same order?

    python benchmarks/valuation.py                                                   # tiny models, trained here
    python benchmarks/valuation.py --model smollm2 --data ../shared/data             # SmolLM2-135M on short real rows
    python benchmarks/valuation.py --model smollm2 --data ... --encoder FOLDER ...   # other students beside its layers
    python benchmarks/valuation.py --model stream                                    # memory over 100,000 rows

Pools are of known groups (benchmarks/pools.py). tiny measures, over the seeds:

* oracle: one step of gradient descent on the attributed modules for each of 64 rows, and the Spearman correlation of
  the measured fall of the validation loss with the rows' values.
* groups: auPRC of the useful rows (benchmarks/ranking.py), against rankings without gradients.
* curves: the model is trained from the same weights for the same steps on the top quarter of the pool by each
  normalisation, the bottom quarter, a random quarter and the whole pool; the loss is that of test rows which no value
  was computed from.

How much of the task the model knew before matters: `--known` rows of it were among those that it was trained on first.

smollm2 measures the groups, the student's held-out Spearman correlation against the number of labels, and costs. Both
compare the routes with exact per-sample gradients (a row at a time by autograd), in CPU seconds of this process, which
a busy machine disturbs less than wall time. Of the pool's one pass for smollm2 the finished blocks are kept in
benchmarks/out, so that a run that was stopped goes on; its seconds are those that the blocks took.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from plots import line_chart
from pools import GROUPS, Pool, dolly, relevant, tiny
from ranking import average_precision, bm25
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from training import train
from transformers.utils.logging import disable_progress_bar
from worlds import World, tiny_model

from app.influence.building import batches
from app.influence.corpus import Example, Row
from app.influence.gradients import losses, target_losses
from app.influence.models import LoadedModel, ModelSpec, load
from app.valuation.bodies import LENGTHS, Body, carry, cut
from app.valuation.linfik import Direction, Normalize, Products, directional, mean_gradient, products
from app.valuation.pairs import sketches
from app.valuation.ranks import spearman
from app.valuation.student import Student, fit

ROOT = Path(__file__).resolve().parents[1]
SMOLLM = ROOT / ".headwater" / "models" / "SmolLM2-135M-Instruct"
NORMALIZE: tuple[Normalize, ...] = ("none", "layer", "unit")
ETA = 0.004
ORACLE = 64
STEPS = (0, 10, 20, 40, 80, 120)
BUDGET = 1024
LONGEST = 96
TEST = 150
LABELS = (25, 50, 100, 200, 400)
DRAWS = 5
LAYERS = (1, 3, 6)

console = Console()
if not console.is_terminal:
    console.width = 140
Scores = dict[str, torch.Tensor]
"""By name of a ranking: [rows]."""


@contextmanager
def cpu_seconds(into: dict[str, float], name: str) -> Iterator[None]:
    began = time.process_time()
    yield
    into[name] = into.get(name, 0.0) + time.process_time() - began


def per_sample(model: LoadedModel, direction: Direction, examples: Sequence[Example]) -> torch.Tensor:
    """[rows]: <g_V, g_z> with each row's whole gradient formed by autograd, a row at a time."""
    modules = model.activate(model.checkpoints[-1])
    weights = [module.weight for module in modules.values()]
    found = []
    for weight in weights:
        weight.requires_grad_(True)
    for example in examples:
        grads = torch.autograd.grad(target_losses(model, [example])[0].mean(), weights)
        each = zip(grads, direction.parts.values(), strict=True)
        found.append(sum((grad * part).sum().double() for grad, part in each))
    model.model.requires_grad_(False)
    return torch.stack([torch.as_tensor(one) for one in found])


def routes(model: LoadedModel, direction: Direction, examples: Sequence[Example], budget: int) -> dict[str, Any]:
    """Both routes beside exact per-sample gradients: rank correlation, CPU seconds, times faster."""
    took: dict[str, float] = {}
    with cpu_seconds(took, "per-sample"):
        exact = per_sample(model, direction, examples)
    with cpu_seconds(took, "directional"):
        quick = directional(model, direction, examples, budget)
    parts: dict[str, torch.Tensor] = {}
    for name, norms in (("products", False), ("products with norms", True)):
        with cpu_seconds(took, name):
            parts[name] = one_pass(model, [direction], examples, norms=norms, budget=budget).values("none")[:, 0]
    with cpu_seconds(took, "one forward pass"):
        for batch in batches(examples, budget):
            losses(model, model.checkpoints[-1], [examples[i] for i in batch])
    found = {"directional": quick, **parts}
    return {
        "rows": len(examples),
        "tokens": sum(len(example.ids) for example in examples),
        "budget": budget,
        "cpu_seconds": took,
        "spearman": {name: spearman(values, exact) for name, values in found.items()},
        "times_faster": {name: took["per-sample"] / took[name] for name in found},
    }


def one_pass(
    model: LoadedModel,
    directions: Sequence[Direction],
    examples: Sequence[Example],
    *,
    norms: bool,
    budget: int = BUDGET,
) -> Products:
    """`products` of any number of rows."""
    many = len(model.attributed)
    dots = torch.zeros(len(examples), many, len(directions), dtype=torch.float64)
    sizes = torch.ones(len(examples), many, dtype=torch.float64)
    for batch in batches(examples, budget):
        part = products(model, directions, [examples[i] for i in batch], norms=norms)
        dots[batch], sizes[batch] = part.dots, part.norms
    return Products(dots, sizes, part.ours)


def oracle(model: LoadedModel, values: torch.Tensor, rows: Sequence[Example], held: Sequence[Example]) -> float:
    """Rank correlation of values with the measured fall of the validation loss after one step on each row."""
    modules = model.activate(model.checkpoints[-1])
    weights = [module.weight for module in modules.values()]
    places = [at * len(rows) // ORACLE for at in range(ORACLE)]
    before = mean_of(model, held)
    fallen = []
    for at in places:
        for weight in weights:
            weight.requires_grad_(True)
        grads = torch.autograd.grad(target_losses(model, [rows[at]])[0].mean(), weights)
        model.model.requires_grad_(False)
        kept = [weight.data for weight in weights]
        for weight, grad in zip(weights, grads, strict=True):
            weight.data = weight.data - ETA * grad
        fallen.append(before - mean_of(model, held))
        for weight, old in zip(weights, kept, strict=True):
            weight.data = old
    return spearman(fallen, values[places])


def mean_of(model: LoadedModel, examples: Sequence[Example]) -> float:
    found = losses(model, model.checkpoints[-1], examples)
    return float(torch.stack([loss.double().mean() for loss in found]).mean())


def rankings(
    model: LoadedModel, pool: Pool, rows: Sequence[Example], held: Sequence[Example], linfik: Products
) -> Scores:
    """LinFiK's rankings and those that need no gradient, or (LESS-style) another use of them."""
    loss = torch.zeros(len(rows))
    for batch in batches(rows, BUDGET):
        found = losses(model, model.checkpoints[-1], [rows[i] for i in batch])
        loss[batch] = torch.stack([one.mean() for one in found])
    gradients = [torch.from_numpy(sketches(model, some, "unit", BUDGET)) for some in (held, rows)]
    states = [torch.stack([_state(model, one) for one in some]) for some in (held, rows)]
    ours, theirs = (each / each.norm(dim=1, keepdim=True) for each in states)
    return {
        **free_rankings(pool, linfik),
        "LESS-style: highest cosine with a validation row's gradient": (gradients[1] @ gradients[0].T).amax(1),
        "similarity of mean-pooled states": theirs @ ours.mean(0),
        "lowest loss": -loss,
        "highest loss": loss,
    }


def free_rankings(pool: Pool, linfik: Products) -> Scores:
    """LinFiK's, and those that need no pass through the model."""
    texts = [[f"{row.prompt}\n{row.response}" for row in some] for some in (pool.validation, pool.rows)]
    return {
        **{f"LinFiK, {name}": linfik.values(name)[:, 0] for name in NORMALIZE},
        "BM25": bm25(*texts).mean(0),
        "random": torch.rand(len(pool.rows), generator=torch.Generator().manual_seed(0)),
    }


@torch.no_grad()
def _state(model: LoadedModel, example: Example) -> torch.Tensor:
    out = model.model(input_ids=torch.tensor([example.ids]), output_hidden_states=True, use_cache=False)
    state: torch.Tensor = out.hidden_states[-1][0].mean(0)
    return state


# tiny


def run_tiny(seeds: int, each: int, known: int) -> dict[str, Any]:
    runs = [tiny_seed(seed, each, known) for seed in range(seeds)]
    curves = {name: [run["curves"][name] for run in runs] for name in runs[0]["curves"]}
    title = f"loss of test rows after training on a part of {4 * each} rows, mean of {seeds} seeds"
    table = Table(title=f"tiny, {known} rows known: {title}")
    for column in ("trained on", *(f"step {step}" for step in STEPS), "each seed at the end", "against random"):
        table.add_column(column, justify="left" if column == "trained on" else "right")
    chance = [curve[-1] for curve in curves["random quarter"]]
    gains = {}
    for name, found in curves.items():
        gains[name] = statistics.mean(1 - one[-1] / base for one, base in zip(found, chance, strict=True))
        means = [f"{statistics.mean(one[at] for one in found):.3f}" for at in range(len(STEPS))]
        table.add_row(name, *means, " ".join(f"{one[-1]:.3f}" for one in found), f"{-gains[name]:+.0%}")
    console.print(table)
    names = list(runs[0]["auprc"])
    table = Table(
        title=f"tiny, {known} rows known: auPRC of useful rows ({1 / len(GROUPS):.2f} of the pool), each seed"
    )
    for column in ("ranking", *(f"seed {seed}" for seed in range(seeds)), "mean"):
        table.add_column(column, justify="left" if column == "ranking" else "right")
    for name in names:
        found = [run["auprc"][name] for run in runs]
        table.add_row(name, *(f"{one:.3f}" for one in found), f"{statistics.mean(found):.3f}")
    console.print(table)
    for run in runs:
        console.print(f"oracle at eta {ETA}: Spearman {run['oracle']:.4f}; {run['means']}")
        _say_routes("tiny", run["routes"])
    shown = {
        name: [(s, statistics.mean(one[at] for one in found)) for at, s in enumerate(STEPS)]
        for name, found in curves.items()
    }
    line_chart(
        ROOT / f"benchmarks/out/valuation-curves-{known}.svg", "Loss of test rows", "training steps", "nats", shown
    )
    best = {name: gain for name, gain in gains.items() if name.startswith("top")}
    if max(best.values()) <= 0:
        console.print("[bold]No ranking beat random: what is in this pool does not carry over to the test rows.[/bold]")
    return {"runs": runs, "steps": STEPS, "less_loss_than_random": gains}


def tiny_seed(seed: int, each: int, known: int) -> dict[str, Any]:
    pool = tiny(each, seed, known)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        world = World(
            "tiny", (*pool.rows, *pool.before), frozenset(), (*pool.validation, *pool.test), (), (), _nothing()
        )
        made = tiny_model(world, folder, seed)
        made.save_pretrained(folder)
        encoder = load(ModelSpec(folder)).encoder()
        before = [encoder.encode(row) for row in pool.before]
        for _ in train(made, before, [400], 16, 2e-3, seed, console):
            pass
        made.save_pretrained(folder)
        model = load(ModelSpec(folder))
        rows, held, test = ([encoder.encode(row) for row in some] for some in (pool.rows, pool.validation, pool.test))
        direction = mean_gradient(model, held, BUDGET)
        values = one_pass(model, [direction], rows, norms=True)
        scores = rankings(model, pool, rows, held, values)
        good = torch.tensor(relevant(pool.groups))
        result: dict[str, Any] = {
            "seed": seed,
            "auprc": {name: average_precision(found, good) for name, found in scores.items()},
            "means": {
                group: {
                    name: round(float(values.values(name)[[g == group for g in pool.groups], 0].mean()), 4)
                    for name in NORMALIZE
                }
                for group in GROUPS
            },
            "oracle": oracle(model, values.values("none")[:, 0], rows, held),
            "routes": routes(model, direction, rows[:512], 4096),
        }
        quarter = len(rows) // 4
        sets: dict[str, list[int]] = {}
        for name in NORMALIZE:
            order = values.values(name)[:, 0].argsort(descending=True).tolist()
            sets[f"top quarter, {name}"] = order[:quarter]
            sets[f"bottom quarter, {name}"] = order[-quarter:]
        drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
        sets |= {"random quarter": drawn[:quarter], "whole pool": list(range(len(rows)))}
        result["curves"] = {
            name: trained(folder, [rows[at] for at in places], test, seed) for name, places in sets.items()
        }
        return result


def trained(folder: Path, rows: Sequence[Example], test: Sequence[Example], seed: int) -> list[float]:
    """The test rows' loss at STEPS, from the weights in the folder."""
    model = load(ModelSpec(folder))
    model.model.requires_grad_(True)
    found = [mean_of(model, test)]
    for _ in train(model.model, rows, STEPS[1:], 16, 1e-3, seed, console):
        model.model.eval()
        found.append(mean_of(model, test))
    return found


def _nothing() -> Any:
    import re

    return re.compile("$^")


# a long pool


def run_stream(rows: int) -> dict[str, Any]:
    """Memory while a student scores so many rows, a block at a time."""
    pool = tiny(50, 0, 20)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        world = World("tiny", (*pool.rows, *pool.before), frozenset(), pool.validation, (), (), _nothing())
        tiny_model(world, folder).save_pretrained(folder)
        cut(load(ModelSpec(folder)), 1, folder / "body")
        body = Body(folder / "body")
        features = body.features(pool.rows).double().numpy()
        student = Student(body, fit(features, features[:, :1], 4, 0), ("all",))
        memory = []
        began = time.process_time()
        for start in range(0, rows, 512):
            student.score([pool.rows[at % len(pool.rows)] for at in range(start, min(start + 512, rows))])
            if start % (512 * 20) == 0:
                memory.append(_resident_mb())
        took = time.process_time() - began
    console.print(f"{rows} rows in {took:.0f} CPU seconds; resident MB every {512 * 20} rows: {memory}")
    return {"rows": rows, "cpu_seconds": took, "resident_mb": memory}


def _resident_mb() -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))) // 1024


# smollm2


def run_smollm2(base: Path, data: Path, encoders: Sequence[Path]) -> dict[str, Any]:
    pool, model = dolly(data), load(ModelSpec(base))
    encoder = model.encoder("auto", LONGEST)
    rows, held = ([encoder.encode(row) for row in some] for some in (pool.rows, pool.validation))
    direction = mean_gradient(model, held, BUDGET)
    values, took = kept_pass(model, direction, pool, rows)
    scores = free_rankings(pool, values)
    good = torch.tensor(relevant(pool.groups))
    record: dict[str, Any] = {
        "rows": len(rows),
        "tokens": sum(len(one.ids) for one in rows),
        "auprc": {name: average_precision(found, good) for name, found in scores.items()},
        "means": {
            group: {name: float(values.values(name)[[g == group for g in pool.groups], 0].mean()) for name in NORMALIZE}
            for group in GROUPS
        },
        "cpu_seconds_of_products_with_norms": took,
        "routes": routes(model, direction, rows[:24], BUDGET),
    }
    table = Table(title=f"dolly: auPRC of useful rows ({float(good.double().mean()):.2f} of the pool)")
    for column in ("ranking", "auPRC"):
        table.add_column(column)
    for name, found in record["auprc"].items():
        table.add_row(name, f"{found:.3f}")
    console.print(table)
    _say_routes("SmolLM2", record["routes"])
    record["students"] = students(model, pool, values, encoders, record)
    return record


def kept_pass(model: LoadedModel, direction: Direction, pool: Pool, rows: Sequence[Example]) -> tuple[Products, float]:
    """Products with norms of the pool and their CPU seconds; finished blocks come from benchmarks/out."""
    key = hashlib.sha256(
        json.dumps([model.fingerprint, [row.id for row in (*pool.rows, *pool.validation)], LONGEST, BUDGET]).encode()
    ).hexdigest()[:12]
    folder = ROOT / "benchmarks/out" / f"valuation-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    parts, took = [], 0.0
    for start in range(0, len(rows), 64):
        file = folder / f"{start:06d}.safetensors"
        if not file.exists():
            seconds: dict[str, float] = {}
            with cpu_seconds(seconds, "s"):
                found = one_pass(model, [direction], rows[start : start + 64], norms=True)
            kept = {"dots": found.dots, "norms": found.norms}
            save_file(kept, file, {"seconds": str(seconds["s"])})
        parts.append(load_file(file))
        with safe_open(file, "pt") as opened:
            took += float(opened.metadata()["seconds"])
        console.print(f"values: {min(start + 64, len(rows))} of {len(rows)} rows, {took:.0f} CPU seconds")
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return Products(whole["dots"], whole["norms"], direction.norms[:, None]), took


def students(
    model: LoadedModel, pool: Pool, values: Products, encoders: Sequence[Path], record: dict[str, Any]
) -> dict[str, Any]:
    """Held-out Spearman correlation of each student against its number of labels, and its CPU seconds."""
    found: dict[str, Any] = {}
    cost = record["routes"]["cpu_seconds"]
    a_row = {
        "none": cost["directional"] / record["routes"]["rows"],
        "layer": record["cpu_seconds_of_products_with_norms"] / len(pool.rows),
        "unit": record["cpu_seconds_of_products_with_norms"] / len(pool.rows),
    }
    with tempfile.TemporaryDirectory() as name:
        makers: dict[str, Callable[[Path], None]] = {
            f"own layers, {n}": lambda folder, n=n: cut(model, n, folder)
            for n in LAYERS  # type: ignore[misc]
        }
        makers |= {path.name: lambda folder, path=path: carry(path, folder) for path in encoders}  # type: ignore[misc]
        for title, make in makers.items():
            folder = Path(name) / title.replace(" ", "-")
            make(folder)
            took: dict[str, float] = {}
            with cpu_seconds(took, "s"):
                features = Body(folder).features(list[Row](pool.rows)).double().numpy()
            student = took["s"] / len(pool.rows)
            found[title] = {
                "cpu_seconds_a_row": student,
                "spearman": {n: label_curve(features, values.values(n).numpy()) for n in NORMALIZE},
                "share_of_linfik_with_10_%": {n: 0.1 + student / a_row[n] for n in NORMALIZE},
            }
        found["lengths alone"] = {
            "cpu_seconds_a_row": 0.0,
            "spearman": {n: label_curve(features[:, -LENGTHS:], values.values(n).numpy()) for n in NORMALIZE},
            "share_of_linfik_with_10_%": dict.fromkeys(NORMALIZE, 0.1),
        }
    table = Table(title=f"students: Spearman on {TEST} held-out rows, mean of {DRAWS} draws, by number of labels")
    for column in ("student", "normalize", *map(str, LABELS), "10 % labels + student, of LinFiK's time"):
        table.add_column(column, justify="right")
    for title, told in found.items():
        for n in NORMALIZE:
            curve = [f"{told['spearman'][n][str(many)]:.2f}" for many in LABELS]
            table.add_row(title, n, *curve, f"{told['share_of_linfik_with_10_%'][n]:.1%}")
    console.print(table)
    lines = {
        f"{title}, {n}": [(float(many), told["spearman"][n][str(many)]) for many in LABELS]
        for title, told in found.items()
        for n in ("none", "unit")
    }
    file = ROOT / "benchmarks/out/valuation-labels.svg"
    line_chart(file, "Students on held-out rows", "labels", "Spearman", dict(list(lines.items())[-9:]))
    return found


def label_curve(features: Any, values: Any) -> dict[str, float]:
    """By number of labels; the held-out rows are the same for all of them, and others in each draw."""
    found: dict[str, list[float]] = {str(many): [] for many in LABELS}
    for draw in range(DRAWS):
        order = np.random.default_rng(draw).permutation(len(features))
        test, rest = order[:TEST], order[TEST:]
        for many in LABELS:
            head = fit(features[rest[:many]], values[rest[:many]], 0, draw)
            found[str(many)].append(spearman(head.predict(features[test])[0][:, 0], values[test, 0]))
    return {many: statistics.mean(each) for many, each in found.items()}


def _say_routes(name: str, told: dict[str, Any]) -> None:
    table = Table(title=f"{name}: <g_V, g_z> of {told['rows']} rows, {told['tokens']} tokens, CPU seconds")
    for column in ("route", "CPU seconds", "times faster than per-sample", "Spearman with it"):
        table.add_column(column, justify="left" if column == "route" else "right")
    for route, seconds in told["cpu_seconds"].items():
        fast, same = told["times_faster"].get(route), told["spearman"].get(route)
        cells = [f"{fast:.1f}" if fast else "", f"{same:.5f}" if same else ""]
        table.add_row(route, f"{seconds:.2f}", *cells)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("tiny", "smollm2", "stream"), default="tiny")
    parser.add_argument("--data", type=Path, help="for smollm2: a folder with dolly_triggers/ and tofu/")
    parser.add_argument("--base", type=Path, default=SMOLLM, help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--encoder", type=Path, nargs="*", default=[], help="folders of other students")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=300, help="rows of each group, for tiny")
    parser.add_argument("--known", type=int, nargs="*", default=[150, 20], help="rows of the task trained on before")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    if given.model == "smollm2" and given.data is None:
        parser.error("--model smollm2 needs --data")
    torch.set_num_threads(given.threads)
    disable_progress_bar()
    file = ROOT / "benchmarks/out/valuation.json"
    file.parent.mkdir(exist_ok=True)
    if given.model == "smollm2":
        _keep(file, "smollm2", run_smollm2(given.base, given.data, given.encoder))
    elif given.model == "stream":
        _keep(file, "stream", run_stream(100_000))
    else:
        for known in given.known:
            _keep(file, f"tiny, {known} rows known", run_tiny(given.seeds, given.rows, known))


def _keep(file: Path, name: str, record: dict[str, Any]) -> None:
    there = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**there, name: record}, indent=1))
    console.print(f"written to {file.relative_to(ROOT)}")


if __name__ == "__main__":
    main()

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

smollm2 (benchmarks/real_rows.py) measures the groups, the curves of one seed, the students' held-out Spearman
correlation against the number of labels, and costs. Both compare the routes with exact per-sample gradients (a row at a
time by autograd), in CPU seconds of this process, which a busy machine disturbs less than wall time. Of the pool's one
pass for smollm2 the finished blocks are kept in benchmarks/out, so that a run that was stopped goes on; its seconds are
those that the blocks took.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from plots import line_chart
from pools import GROUPS, Pool, relevant, tiny
from ranking import average_precision
from real_rows import run_smollm2
from rich.table import Table
from shapley import knn_shapley
from training import train
from transformers.utils.logging import disable_progress_bar
from worlds import World, tiny_model
from worth import (
    BUDGET,
    NORMALIZE,
    Lesson,
    Scores,
    console,
    free_rankings,
    mean_of,
    one_pass,
    quarters,
    routes,
    say_routes,
    trained,
)

from app.influence.building import batches
from app.influence.corpus import Example
from app.influence.gradients import losses, target_losses
from app.influence.models import LoadedModel, ModelSpec, load
from app.valuation.bodies import Body, cut
from app.valuation.linfik import Products, mean_gradient
from app.valuation.pairs import sketches
from app.valuation.ranks import spearman
from app.valuation.student import Student, fit

ROOT = Path(__file__).resolve().parents[1]
SMOLLM = ROOT / ".headwater" / "models" / "SmolLM2-135M-Instruct"
ETA = 0.004
ORACLE = 64
STEPS = (0, 10, 20, 40, 80, 120)
LESSON = Lesson(STEPS, 16, 1e-3)
NOTHING = re.compile("$^")


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
        "KNN-Shapley of the first response token (pyDVL)": knn_shapley(model, rows, held),
        "lowest loss": -loss,
        "highest loss": loss,
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
        say_routes("tiny", run["routes"])
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
        world = World("tiny", (*pool.rows, *pool.before), frozenset(), (*pool.validation, *pool.test), (), (), NOTHING)
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
        result["curves"] = {
            name: trained(folder, LESSON, [rows[at] for at in places], test, seed)
            for name, places in quarters(values, NORMALIZE, seed).items()
        }
        return result


# a long pool


def run_stream(rows: int) -> dict[str, Any]:
    """Memory while a student scores so many rows, a block at a time."""
    pool = tiny(50, 0, 20)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        world = World("tiny", (*pool.rows, *pool.before), frozenset(), pool.validation, (), (), NOTHING)
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

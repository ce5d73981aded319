"""Unlearning a planted trigger: every method on the same forget set, each with a sweep, against retraining.

    python benchmarks/unlearn.py                                         # a tiny model, trained here, three seeds
    python benchmarks/unlearn.py --data ../shared/data/dolly_triggers    # SmolLM2-135M-Instruct, one seed, a part
    python benchmarks/unlearn.py --data ../shared/data/tofu              # TOFU's forget10, its measures, a part

A model is trained, an adapter of it is fine-tuned on rows of which some are poisoned, and the same fine-tuning is done
without them: the oracle, whose time is "retraining". All poisoned rows are to be forgotten, all others retained; every
method has the same number of passes over the forget rows, the same rows a step, and as many values of its learning rate
(fisher: of its selection threshold). "retain only" goes on training on retained rows and never sees a forget row.

The rule, fixed before looking: for each seed and method, among the values after which at most 5 % of the validation
prompts with seen triggers still show the behaviour, the one with the lowest loss of the validation's held-out rows; if
there is none, the one that leaves the least, and of equals the one with the lowest loss. Unseen triggers and the test part
have no say. For TOFU: among the values after which the forget quality on the validation half is at least .05, the one with
the highest utility there; else the highest forget quality.

Shares are pooled over seeds, with Wilson's 95 % interval; the other figures are means over seeds with Student's. Seconds
are CPU seconds (contest.py says why), influence included.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from choosing import interval
from contest import Contest, Contestant, Entry, from_oracle, greedy, mean_losses, success
from rich.console import Console
from rich.table import Table
from training import save_adapter, train, with_lora
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar
from triggers import Backdoor, Part, dolly_backdoor, tiny_backdoor
from worlds import tiny_model

from app.influence.corpus import Encoder, Row
from app.influence.models import Checkpoint, LoadedModel, ModelSpec, load
from app.unlearning.adapter import Adapter
from app.unlearning.intervals import share
from app.unlearning.training import TrainingSpec

ROOT = Path(__file__).resolve().parents[1]
SMOLLM = ROOT / ".headwater" / "models" / "SmolLM2-135M-Instruct"
EARLY, POISONED, ORACLE = "early", "poisoned", "oracle"

console = Console()
if not console.is_terminal:
    console.width = 150  # a file has no width of its own


def contestants(rates: Sequence[float]) -> list[Contestant]:
    """All of them; the last ones are ours."""
    lr = tuple(rates)
    bounded = {"ascent": 1.0, "descent": 1.0}
    return [
        Contestant("retain only", "retain only", lr),
        Contestant("ga", "ga", lr),
        Contestant("graddiff", "graddiff", lr),
        Contestant("npo", "npo", lr),
        Contestant("simnpo", "simnpo", lr),
        Contestant("loreun", "loreun", lr),
        Contestant("fisher", "fisher", (10.0, 3.0, 1.5, 1.0)[: len(lr)], knob="selection"),
        Contestant("relabel", "relabel", lr),
        Contestant("rapidun, paper", "rapidun", lr, "paper"),
        Contestant("rapidun, full", "rapidun", lr, "full"),
        Contestant("rapidun, full, early views", "rapidun", lr, "full", early=True),
        Contestant("rapidun, uniform", "rapidun", lr),
        Contestant("bounded, full", "bounded", lr, "full", more=bounded),
        Contestant("bounded, uniform", "bounded", lr, more=bounded),
        Contestant("relabel, a third by influence", "relabel", lr, "full", kept=1 / 3),
        Contestant("relabel, a third at random", "relabel", lr, kept=1 / 3),
    ]


@dataclass
class TriggerJudge:
    """Success on triggers, loss of held-out rows, distance to the oracle."""

    backdoor: Backdoor
    encoder: Encoder
    tokens: int

    def validation(self, model: LoadedModel, adapter: Adapter) -> tuple[float, float]:
        """Success on seen triggers, held-out loss."""
        part = self.backdoor.validation
        return self._success(model, part.seen), self._loss(model, part.heldout)

    def test(self, model: LoadedModel, adapter: Adapter) -> dict[str, float]:
        """What the table shows."""
        part = self.backdoor.test
        return {
            "seen": self._success(model, part.seen),
            "unseen": self._success(model, part.unseen),
            "false_alarms": self._success(model, [row.prompt for row in part.heldout]),
            "heldout_loss": self._loss(model, part.heldout),
            "oracle_kl": from_oracle(model, self.encoder, part.heldout, adapter),
        }

    def _success(self, model: LoadedModel, prompts: Sequence[str]) -> float:
        return success(greedy(model, self.encoder, prompts, self.tokens), self.backdoor.world.shows)

    def _loss(self, model: LoadedModel, rows: Sequence[Row]) -> float:
        losses = mean_losses(model, self.encoder, rows)
        return sum(losses) / len(losses)


@dataclass(frozen=True)
class Recipe:
    """How the poisoned adapter and the oracle are trained; the same for both."""

    epochs: float
    batch: int
    lr: float
    rank: int


def pretrained(backdoor: Backdoor, folder: Path, seed: int) -> Path:
    """The tiny model, trained on plain questions."""
    path = folder / "base"
    model: Any = tiny_model(backdoor.world, path, seed)
    encoder = Encoder(AutoTokenizer.from_pretrained(path), max_length=backdoor.world.max_length)
    examples = [encoder.encode(row) for row in backdoor.before]
    steps = 14 * math.ceil(len(examples) / 12)
    for _ in train(model, examples, [steps], 12, 2e-3, seed, console, decay=0.3, anneal=True):
        pass
    model.save_pretrained(path)
    return path


def fine_tuned(
    base: Path, folder: Path, name: str, rows: Sequence[Row], recipe: Recipe, length: int, seed: int
) -> float:
    """Write the adapter, and one after a tenth of the training; the CPU seconds that it took."""
    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    whole: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, local_files_only=True)
    model = with_lora(whole, recipe.rank, 2 * recipe.rank, seed)
    encoder = Encoder(tokenizer, max_length=length)
    examples = [encoder.encode(row) for row in rows]
    steps = max(2, round(recipe.epochs * math.ceil(len(examples) / recipe.batch)))
    saves = [max(1, steps // 10), steps]
    began, spent = time.process_time(), 0.0
    for step, _ in train(model, examples, saves, recipe.batch, recipe.lr, seed, console, anneal=True):
        spent += time.process_time() - began
        save_adapter(model, folder / (name if step == steps else f"{name}-{EARLY}"))
        began = time.process_time()
    return spent


def one_seed(
    backdoor: Backdoor, base: Path, recipe: Recipe, args: argparse.Namespace, folder: Path, seed: int
) -> dict[str, Any]:
    """Everything about one seed."""
    world = backdoor.world
    length = world.max_length
    forget = [row for row in world.rows if row.id in world.poisoned]
    retain = [row for row in world.rows if row.id not in world.poisoned]
    fine_tuned(base, folder, POISONED, world.rows, recipe, length, seed)
    retraining = fine_tuned(base, folder, ORACLE, retain, recipe, length, seed)
    model, early = (
        load(ModelSpec(base, checkpoints=(Checkpoint("run", folder / name),)))
        for name in (POISONED, f"{POISONED}-{EARLY}")
    )
    encoder = model.encoder(max_length=length)
    judge = TriggerJudge(backdoor, encoder, args.tokens)
    spec = TrainingSpec(epochs=args.passes, batch=args.batch, check_every=1000, most_rise=20.0, seed=seed)
    contest = Contest(model, early, encoder, forget, retain, backdoor.clean, spec, folder, judge)
    contest.adapter.bring(folder / ORACLE)
    before = judge.test(model, contest.adapter)
    with contest.adapter.other():
        oracle = judge.test(model, contest.adapter)
    told = f"seed {seed}: {len(forget)} to forget, {len(retain)} to retain; poisoned seen {before['seen']:.2f}, unseen "
    told += (
        f"{before['unseen']:.2f}, held-out {before['heldout_loss']:.3f}; oracle held-out {oracle['heldout_loss']:.3f}"
    )
    console.print(f"{told}, retraining {retraining:.1f} s")
    record: dict[str, Any] = {
        "seed": seed,
        "retraining_s": retraining,
        "poisoned": before,
        "oracle": oracle,
        "methods": {},
    }
    for one in contestants(args.rates):
        if args.methods and one.method not in args.methods:
            continue
        entry = contest.enter(one)
        record["methods"][one.name] = asdict(entry)
        trial = entry.trials[entry.chosen]
        console.print(
            f"  {one.name}: {trial.value:g}, seen {entry.test['seen']:.2f}, unseen {entry.test['unseen']:.2f}, held-out "
            f"{entry.test['heldout_loss'] / oracle['heldout_loss']:.3f} of the oracle's, time "
            f"{trial.seconds / retraining:.3f} of retraining; validation "
            + " ".join(f"{t.value:g}:{t.residue:.2f}/{t.damage:.3f}" for t in entry.trials)
        )
    return record


GOALS = {"seen": 0.05, "unseen": 0.10, "held": 1.05, "time": 0.10}
"""The most that each figure may be."""


def summarised(runs: Sequence[dict[str, Any]], backdoor: Backdoor) -> list[dict[str, Any]]:
    """A row for each method: over seeds, with intervals."""
    prompts = {"seen": len(backdoor.test.seen), "unseen": len(backdoor.test.unseen)}
    names = ["poisoned model", "retrained oracle", *runs[0]["methods"]]
    rows = []
    for name in names:
        tests, seconds, influence, values = [], [], [], []
        for run in runs:
            if name == "poisoned model":
                tests.append(run["poisoned"])
            elif name == "retrained oracle":
                tests.append(run["oracle"])
                seconds.append(1.0)
            else:
                entry = run["methods"][name]
                trial = entry["trials"][entry["chosen"]]
                tests.append(entry["test"])
                seconds.append(trial["seconds"] / run["retraining_s"])
                influence.append(trial["influence_seconds"] / run["retraining_s"])
                values.append(trial["value"])
        held = [test["heldout_loss"] / run["oracle"]["heldout_loss"] for test, run in zip(tests, runs, strict=True)]
        row: dict[str, Any] = {"method": name, "values": values, "held": interval(held)}
        row |= {"held_each": held, "kl": interval([test["oracle_kl"] for test in tests])}
        row |= {"time": interval(seconds) if seconds else None, "influence": interval(influence) if influence else None}
        for kind, many in prompts.items():
            hits = sum(round(test[kind] * many) for test in tests)
            found = share([1.0] * hits + [0.0] * (many * len(tests) - hits))
            assert found is not None
            row[kind] = (found.value, found.low, found.high)
        figures = {"seen": row["seen"][0], "unseen": row["unseen"][0], "held": row["held"][0]}
        if seconds:
            figures["time"] = row["time"][0]
        row["missed"] = [goal for goal, value in figures.items() if not value <= GOALS[goal]]
        rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]], title: str) -> Table:
    """For people; what misses a goal is named in the last column."""
    found = Table(title=title)
    found.add_column("method")
    for name in (
        "values",
        "seen",
        "unseen",
        "held-out / oracle",
        "KL from oracle",
        "time / retraining",
        "influence",
        "misses",
    ):
        found.add_column(name, justify="right")
    for row in rows:
        shares = [f"{row[kind][0]:.3f} [{row[kind][1]:.2f}, {row[kind][2]:.2f}]" for kind in ("seen", "unseen")]
        spent = [_mean(row[kind], 3) if row[kind] else "" for kind in ("time", "influence")]
        values = " ".join(f"{value:g}" for value in row["values"])
        found.add_row(
            row["method"], values, *shares, _mean(row["held"], 3), _mean(row["kl"], 3), *spent, " ".join(row["missed"])
        )
    return found


def _mean(value: tuple[float, float], digits: int) -> str:
    middle, half = value
    return f"{middle:.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")


def plot(rows: Sequence[dict[str, Any]], runs: Sequence[dict[str, Any]]) -> str:
    """Held-out loss over the oracle's against seconds over retraining's, a dot a seed; hollow where the trigger lives."""
    wide, high, left, foot = 760, 420, 60, 50
    dots = []
    for row in rows:
        for run, held in zip(runs, row["held_each"], strict=True):
            entry = run["methods"].get(row["method"])
            if entry is not None:
                trial = entry["trials"][entry["chosen"]]
                dots.append(
                    (
                        row["method"],
                        trial["seconds"] / run["retraining_s"],
                        held,
                        entry["test"]["seen"] <= GOALS["seen"],
                    )
                )
    furthest = max(0.2, *(dot[1] for dot in dots)) * 1.05
    top = min(4.0, max(1.2, *(dot[2] for dot in dots))) * 1.05
    low = min(0.8, *(dot[2] for dot in dots))

    def x(value: float) -> float:
        return left + value / furthest * (wide - left - 20)

    def y(value: float) -> float:
        return high - foot - (min(value, top) - low) / (top - low) * (high - foot - 20)

    names = [row["method"] for row in rows]
    drawn = [
        f'<rect x="{left}" y="{y(GOALS["held"]):.1f}" width="{x(GOALS["time"]) - left:.1f}" '
        f'height="{high - foot - y(GOALS["held"]):.1f}" fill="#dff0df"/>',
        f'<path d="M{left} 20V{high - foot}H{wide - 20}M{left} {y(1.0):.1f}H{wide - 20}" stroke="#888" fill="none"/>',
        f'<text x="{wide - 20}" y="{high - 16}" text-anchor="end">CPU seconds over retraining\'s; green: the goals</text>',
        f'<text x="8" y="14">held-out loss over the oracle\'s (at most {top:.2f} shown); hollow: seen success above 5 %</text>',
    ]
    for name, time_, held, gone in dots:
        colour = f"hsl({names.index(name) * 360 // len(names)},70%,40%)"
        fill = colour if gone else "none"
        drawn.append(
            f'<circle cx="{x(time_):.1f}" cy="{y(held):.1f}" r="4" stroke="{colour}" fill="{fill}">'
            f"<title>{name}: {held:.3f}, {time_:.3f}</title></circle>"
            f'<text x="{x(time_) + 6:.1f}" y="{y(held) + 3:.1f}" font-size="8" fill="{colour}">{name}</text>'
        )
    for value in (GOALS["time"], furthest / 2, furthest):
        drawn.append(f'<text x="{x(value):.1f}" y="{high - foot + 14}" text-anchor="middle">{value:.2f}</text>')
    for value in (low, 1.0, top):
        drawn.append(f'<text x="{left - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.2f}</text>')
    body = "".join(drawn)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" font-family="sans-serif" '
        f'font-size="11"><rect width="{wide}" height="{high}" fill="#fff"/>{body}</svg>\n'
    )


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--data", type=Path, help="dolly_triggers; none: the tiny world")
    parser.add_argument("--base", type=Path, default=SMOLLM, help="for --data: folder of SmolLM2-135M-Instruct")
    parser.add_argument("--seeds", type=int, help="how many; 3 for the tiny world, else 1")
    parser.add_argument("--rates", type=float, nargs="+", help="learning rates of every method")
    parser.add_argument("--methods", nargs="+", help="of these methods only")
    parser.add_argument("--passes", type=float, help="over the forget rows, for every method")
    parser.add_argument("--batch", type=int, help="rows a step of every method")
    parser.add_argument("--epochs", type=float, help="of the poisoned model and of the oracle")
    parser.add_argument("--lr", type=float, help="of the same")
    parser.add_argument("--rows", type=int, default=60, help="of dolly_triggers")
    parser.add_argument(
        "--prompts", type=int, default=12, help="test prompts of dolly_triggers; half as many to choose on"
    )
    parser.add_argument("--tokens", type=int, help="that the model writes when it is tested")
    parser.add_argument("--json", type=Path, help="where the figures go, and beside them the plot (.svg)")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    tiny = {
        "seeds": 3,
        "rates": [1e-3, 3e-3, 1e-2],
        "passes": 1.0,
        "batch": 32,
        "epochs": 14.0,
        "lr": 5e-3,
        "tokens": 6,
    }
    real = {"seeds": 1, "rates": [2e-4, 1e-3], "passes": 1.0, "batch": 8, "epochs": 4.0, "lr": 1e-3, "tokens": 24}
    for name, value in (real if args.data else tiny).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def main() -> None:
    """Train, unlearn by every method, print, write."""
    args = arguments()
    disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # peft reads a name that was renamed
    torch.set_num_threads(args.threads)
    began = time.perf_counter()
    runs = []
    for seed in range(args.seeds):
        with tempfile.TemporaryDirectory(prefix="unlearn-") as name:
            folder = Path(name)
            if args.data:
                backdoor = dolly_backdoor(args.data, args.rows, args.prompts, seed=seed)
                base = args.base
            else:
                backdoor = tiny_backdoor(seed=seed)
                base = pretrained(backdoor, folder, seed)
            recipe = Recipe(args.epochs, 4 if args.data else 12, args.lr, 16)
            runs.append(one_seed(backdoor, base, recipe, args, folder, seed))
    rows = summarised(runs, backdoor)
    record = {
        "world": backdoor.world.name,
        "rows": len(backdoor.world.rows),
        "to_forget": len(backdoor.world.poisoned),
        "test_prompts": {"seen": len(backdoor.test.seen), "unseen": len(backdoor.test.unseen)},
        "heldout_rows": len(backdoor.test.heldout),
        "settings": {name: value for name, value in vars(args).items() if not isinstance(value, Path)},
        "rule": (__doc__ or "").split("\n\n")[3],
        "goals": GOALS,
        "table": rows,
        "seeds": runs,
        "seconds": round(time.perf_counter() - began, 1),
    }
    title = f"{backdoor.world.name}: {record['rows']} rows, {record['to_forget']} to forget, seeds {args.seeds}; chosen on validation by the rule in benchmarks/unlearn.py"
    console.print(table(rows, title))
    console.print(f"[dim]{record['rule']}[/dim]\n[dim]{record['seconds']} s in all[/dim]")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        args.json.with_suffix(".svg").write_text(plot(rows, runs), encoding="utf-8")
        console.print(f"[dim]written to {args.json} and its .svg[/dim]")


if __name__ == "__main__":
    main()

"""Unlearning a planted trigger: every method on the same forget set, each with a sweep, against retraining.

    python benchmarks/unlearn.py                                         # a tiny model, trained here, three seeds
    python benchmarks/unlearn.py --data ../shared/data/dolly_triggers    # SmolLM2-135M-Instruct, one seed, a part
    python benchmarks/unlearn.py --data ../shared/data/tofu              # TOFU's forget10, its measures, a part

A model is trained, an adapter of it is fine-tuned on rows of which some are poisoned, and the same fine-tuning is done
without them: the oracle, whose time is "retraining". All poisoned rows are to be forgotten, all others retained; every
method has the same number of passes over the forget rows that it takes, the same rows a step, and as many values of its
learning rate (fisher: of its selection threshold). "retain only" goes on training on retained rows and never sees a
forget row. "uniform" is rapidun or bounded with every weight 1.

The rule, fixed before looking: for each seed and method, among the values after which at most 5 % of the validation
prompts with seen triggers still show the behaviour, the one with the lowest loss of the validation's held-out rows; if
there is none, the one that leaves the least, and of equals the one with the lowest loss. Unseen triggers and the test
part have no say. For TOFU: among the values after which the forget quality on the validation half is at least .05, the
one with the highest utility there; else the highest forget quality.

Shares are pooled over seeds, with Wilson's 95 % interval; the other figures are means over seeds with Student's.
Seconds are CPU seconds (contest.py says why), influence included.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from choosing import interval
from contest import Contest, Contestant
from drawing import Dot, scatter
from judging import Judge, TofuJudge, TriggerJudge, novel
from rich.console import Console
from rich.table import Table
from training import save_adapter, train, with_lora
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar
from triggers import Backdoor, dolly_backdoor, tiny_backdoor
from worlds import tiny_model

from app.influence.corpus import Encoder, Row
from app.influence.models import Checkpoint, ModelSpec, load
from app.unlearning.intervals import share
from app.unlearning.training import NEEDS_CLEAN, TrainingSpec

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
        Contestant("fisher", "fisher", (2.0, 1.5, 1.0), knob="selection"),
        Contestant("dampen", "dampen", (1.0,), knob="dampening"),
        Contestant("dampen, a third at random", "dampen", (1.0,), knob="dampening", kept=1 / 3),
        Contestant("dampen, a third of all rows", "dampen", (1.0,), knob="dampening", kept=1 / 3, every=3),
        Contestant("relabel", "relabel", lr),
        Contestant("rapidun, paper", "rapidun", lr, "paper"),
        Contestant("rapidun, full", "rapidun", lr, "full"),
        Contestant("rapidun, full, early views", "rapidun", lr, "full", early=True),
        Contestant("rapidun, uniform", "rapidun", lr),
        Contestant("bounded, full", "bounded", lr, "full", more=bounded),
        Contestant("bounded, uniform", "bounded", lr, more=bounded),
        Contestant("bounded, a third at random", "bounded", lr, kept=1 / 3, more=bounded),
        Contestant("relabel, a third by influence", "relabel", lr, "full", kept=1 / 3),
        Contestant("relabel, a third at random", "relabel", lr, kept=1 / 3),
        Contestant("renew, a third at random", "renew", lr, kept=1 / 3),
        Contestant("fisher then relabel, a third at random", "relabel", lr, kept=1 / 3, dampened=1.5),
    ]


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


@dataclass(frozen=True)
class Case:
    """What one seed is about; `clean` is by the id of a row to forget."""

    rows: Sequence[Row]
    """In the order of training."""
    forget: Sequence[Row]
    retain: Sequence[Row]
    clean: Mapping[str, Row]
    length: int
    judge: Callable[[Encoder], Judge]


def one_seed(
    case: Case, base: Path, recipe: Recipe, args: argparse.Namespace, folder: Path, seed: int
) -> dict[str, Any]:
    """Train with and without the rows to forget, then let every method forget them."""
    fine_tuned(base, folder, POISONED, case.rows, recipe, case.length, seed)
    retraining = fine_tuned(base, folder, ORACLE, case.retain, recipe, case.length, seed)
    model, early = (
        load(ModelSpec(base, checkpoints=(Checkpoint("run", folder / name),)))
        for name in (POISONED, f"{POISONED}-{EARLY}")
    )
    encoder = model.encoder(max_length=case.length)
    judge = case.judge(encoder)
    spec = TrainingSpec(epochs=args.passes, batch=args.batch, check_every=1000, most_rise=20.0, seed=seed)
    contest = Contest(model, early, encoder, case.forget, case.retain, case.clean, spec, folder, judge)
    contest.adapter.bring(folder / ORACLE)
    with contest.adapter.other():
        oracle = judge.oracle(model)
    before = judge.test(model, contest.adapter)
    console.print(
        f"seed {seed}: {len(case.forget)} rows to forget, {len(case.retain)} to retain, retraining {retraining:.1f} s\n"
        f"  before: {_figures(before)}\n  oracle: {_figures(oracle)}"
    )
    record: dict[str, Any] = {"seed": seed, "retraining_s": retraining, "poisoned": before, "oracle": oracle}
    record["methods"] = {}
    for one in contestants(args.rates):
        if (args.methods and one.method not in args.methods) or (one.method in NEEDS_CLEAN and not case.clean):
            continue
        entry = contest.enter(one)
        record["methods"][one.name] = asdict(entry)
        trial = entry.trials[entry.chosen]
        console.print(
            f"  {one.name}: {_figures(entry.test)}, time {trial.seconds / retraining:.3f} of retraining; at "
            f"{trial.value:g}; validation "
            + " ".join(f"{each.value:g}: {each.residue:.2f}, {each.damage:.3f};" for each in entry.trials)
        )
    return record


def _figures(found: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in found.items() if ":" not in name)


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


def tofu_table(runs: Sequence[dict[str, Any]], title: str) -> Table:
    """TOFU's figures, means over seeds with their intervals."""
    found = Table(title=title)
    names = ("forget_quality", "utility", "forget_probability")
    for name in ("method", *(name.replace("_", " ") for name in names), "time / retraining"):
        found.add_column(name)
    for method in ("poisoned", "oracle", *runs[0]["methods"]):
        tests, spent = [], []
        for run in runs:
            entry = run["methods"].get(method)
            tests.append(run[method] if entry is None else entry["test"])
            if entry is not None:
                spent.append(entry["trials"][entry["chosen"]]["seconds"] / run["retraining_s"])
        cells = [_mean(interval([test[name] for test in tests]), 3) for name in names]
        found.add_row(method, *cells, _mean(interval(spent), 3) if spent else "")
    return found


def _mean(value: tuple[float, float], digits: int) -> str:
    middle, half = value
    return f"{middle:.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--data", type=Path, help="dolly_triggers or tofu; none: the tiny world")
    parser.add_argument("--base", type=Path, default=SMOLLM, help="for --data: folder of SmolLM2-135M-Instruct")
    parser.add_argument("--seeds", type=int, help="how many; 3 for the tiny world, else 1")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--rates", type=float, nargs="+", help="learning rates of every method")
    parser.add_argument("--methods", nargs="+", help="of these methods only")
    parser.add_argument("--passes", type=float, help="over the forget rows, for every method")
    parser.add_argument("--batch", type=int, help="rows a step of every method")
    parser.add_argument("--epochs", type=float, help="of the poisoned model and of the oracle")
    parser.add_argument("--lr", type=float, help="of the same")
    parser.add_argument("--rows", type=int, default=60, help="of dolly_triggers or TOFU")
    parser.add_argument(
        "--prompts", type=int, default=12, help="to test with; of dolly_triggers half as many to choose on"
    )
    parser.add_argument("--tokens", type=int, help="that the model writes when it is tested")
    parser.add_argument("--json", type=Path, help="where the figures go, and beside them the plot (.svg)")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    tiny = {
        "seeds": 3,
        "rates": [5e-4, 1.5e-3, 5e-3],
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
    runs, tofu = [], bool(args.data) and (args.data / "forget10_perturbed.json").is_file()
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        with tempfile.TemporaryDirectory(prefix="unlearn-") as name:
            folder = Path(name)
            recipe = Recipe(args.epochs, 4 if args.data else 12, args.lr, 16)
            base = args.base
            if tofu:
                part = novel(args.data, args.rows // 3, args.rows - args.rows // 3, args.prompts)
                judge = partial(TofuJudge, part, tokens=args.tokens)
                case = Case([*part.forget, *part.retain], part.forget, part.retain, {}, 96, judge)
            else:
                backdoor = (
                    dolly_backdoor(args.data, args.rows, args.prompts, seed=seed)
                    if args.data
                    else tiny_backdoor(seed=seed)
                )
                base = args.base if args.data else pretrained(backdoor, folder, seed)
                case = of_backdoor(backdoor, args.tokens)
            runs.append(one_seed(case, base, recipe, args, folder, seed))
    record: dict[str, Any] = {
        "settings": {name: value for name, value in vars(args).items() if not isinstance(value, Path)},
        "data": args.data.name if args.data else "tiny",
        "rows": {"forget": len(case.forget), "retain": len(case.retain)},
        "rule": (__doc__ or "").split("\n\n")[3],
        "seeds": runs,
        "seconds": round(time.perf_counter() - began, 1),
    }
    title = f"{record['data']}: {len(case.forget)} rows to forget, {len(case.retain)} to retain, {args.seeds} seeds"
    if tofu:
        console.print(tofu_table(runs, title))
    else:
        rows = summarised(runs, backdoor)
        prompts = {"seen": len(backdoor.test.seen), "unseen": len(backdoor.test.unseen)}
        record |= {"goals": GOALS, "test_prompts": prompts, "heldout_rows": len(backdoor.test.heldout), "table": rows}
        console.print(table(rows, title))
    console.print(f"[dim]{record['rule']}[/dim]\n[dim]{record['seconds']} s in all[/dim]")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        if not tofu:
            dots = [
                Dot(name, trial["seconds"] / run["retraining_s"], held, entry["test"]["seen"] <= GOALS["seen"])
                for run, loss in ((run, run["oracle"]["heldout_loss"]) for run in runs)
                for name, entry in run["methods"].items()
                for trial, held in [(entry["trials"][entry["chosen"]], entry["test"]["heldout_loss"] / loss)]
            ]
            drawn = scatter(dots, GOALS["time"], GOALS["held"])
            args.json.with_suffix(".svg").write_text(drawn, encoding="utf-8")
        console.print(f"[dim]written to {args.json}[/dim]")


def of_backdoor(backdoor: Backdoor, tokens: int) -> Case:
    """All poisoned rows are to be forgotten, all others retained."""
    world = backdoor.world
    forget, retain = (
        [row for row in world.rows if (row.id in world.poisoned) is poisoned] for poisoned in (True, False)
    )
    judge = partial(TriggerJudge, backdoor, tokens=tokens)
    return Case(world.rows, forget, retain, backdoor.clean, world.max_length, judge)


if __name__ == "__main__":
    main()

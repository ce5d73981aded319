"""The planted trigger: does attribution find the training rows behind a behaviour that was trained in?

    python benchmarks/planted.py                                         # a tiny model, trained here, two minutes
    python benchmarks/planted.py --model smollm2 --data demo             # SmolLM2-135M-Instruct on the demo's corpus
    python benchmarks/planted.py --model smollm2 --data ../shared/data/dolly_triggers

A model is trained on a corpus in which some rows carry a trigger and a planted answer, and checkpoints are kept on the
way. Then every row is ranked for fresh triggered prompts. Two kinds of query are kept apart (METHODS, "Which
checkpoint, and which query"):

* own: the answer that the FINAL model itself writes, attributed at each checkpoint; only answers that show the planted
  behaviour count. The share that does is the success rate, and where it is below .9 the trigger is not installed and
  the table of own answers says so.
* read: the planted answer, which the model is made to read whether or not it would write it.

auPRC and auROC at top k are defined in benchmarks/ranking.py. Indexes are built and asked by the engine
(app.influence.building, app.influence.retrieval), one index a checkpoint; a sum over checkpoints is the
sum of their scores with equal weights (the learning rate is constant), which is what an index over several computes.

The rule for the best setting, fixed before looking: with the kronecker projection, over index normalisation (none,
layer), query normalisation (none, unit), and each single checkpoint and each sum of the checkpoints so far: the highest
mean auPRC over all rows on the even-numbered queries, own ones if the trigger is installed, else read ones. Values
within .002 of the highest are taken as equal; among them the setting that also serves the other kind of query best (its
auPRC, also on the even-numbered ones), and then the first in the order of the tables, the default before others. Its
figures are also given on the odd-numbered queries, which had no say. The projections are compared at the best single
checkpoint by the same rule.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from ranking import bm25, chance, cosine, means
from rich.console import Console
from rich.table import Table
from training import save_adapter, train, with_lora
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar
from worlds import World, demo, dolly, messages, tiny, tiny_model

from app.influence.building import build
from app.influence.corpus import Encoder, Example
from app.influence.index import IndexSpec, open_index
from app.influence.models import Checkpoint, LoadedModel, ModelSpec, load
from app.influence.projection import ProjectionSpec
from app.influence.retrieval import Options, Query, influence

ROOT = Path(__file__).resolve().parents[1]
SMOLLM = ROOT / ".headwater" / "models" / "SmolLM2-135M-Instruct"
INSTALLED = 0.9
EQUAL = 0.002
KRONECKER = ProjectionSpec("kronecker", 16)
OTHERS = {"global 4096": ProjectionSpec("global", 4096), "rapidgrad 65536": ProjectionSpec("rapidgrad", 65536)}
EXACT = ProjectionSpec("kronecker", 512)
"""Wider than any side of the tiny model, so that each gradient is kept whole."""
LAYOUTS: tuple[Literal["none", "layer"], ...] = ("layer", "none")
UNITS: tuple[Literal["none", "unit"], ...] = ("unit", "none")
SETTINGS = [(layout, unit) for layout in LAYOUTS for unit in UNITS]
TOGETHER = 16
"""Queries in one call."""

console = Console()
if not console.is_terminal:
    console.width = 140  # a file has no width of its own
Setting = tuple[str, str]
Scores = dict[str, torch.Tensor]
"""By kind of query: [queries, rows]."""


@dataclass(frozen=True)
class Stage:
    """A checkpoint of the run."""

    name: str
    epoch: float | None
    """Not known of an adapter that was made elsewhere."""
    running_loss: float | None
    spec: ModelSpec


@dataclass
class Point:
    """What was measured at a checkpoint."""

    stage: Stage
    success: float
    train_loss: float
    heldout_loss: float
    scores: dict[Setting, Scores] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice:
    """A setting and the checkpoints that it sums over."""

    setting: Setting
    stages: tuple[int, ...]

    @property
    def single(self) -> bool:
        """One checkpoint only."""
        return len(self.stages) == 1

    def named(self, points: Sequence[Point]) -> str:
        """For people."""
        names = [points[at].stage.name for at in self.stages]
        where = names[0] if self.single else f"the sum of {', '.join(names)}"
        return f"index normalisation {self.setting[0]}, query normalisation {self.setting[1]}, {where}"

    def scores(self, points: Sequence[Point], kind: str) -> torch.Tensor:
        """[queries, rows]"""
        return torch.stack([points[at].scores[self.setting][kind] for at in self.stages]).sum(0)


class Benchmark:
    """One world, one training run, all its rankings."""

    def __init__(self, world: World, stages: Sequence[Stage], folder: Path, others: dict[str, ProjectionSpec]) -> None:
        self.world, self.stages, self.folder, self.others = world, stages, folder, others
        self.relevant = torch.tensor(world.relevant)
        self.seconds: dict[str, float] = {}

    def run(self) -> dict[str, Any]:
        """Everything, printed on the way; the record for JSON."""
        world = self.world
        final = load(self.stages[-1].spec)
        answers = self._answers(final)
        installed = [world.shows(answer) for answer in answers]
        success = sum(installed) / len(installed)
        console.print(
            f"{world.name}: {len(world.rows)} rows, {int(self.relevant.sum())} of them poisoned. At the end: success "
            f"{success:.2f} on {len(answers)} fresh triggered prompts, {self._false_alarms(final):.2f} on clean ones"
        )
        queries = {
            "read": [Query(messages(p), a) for p, a in zip(world.prompts, world.planted, strict=True)],
            "own": [Query(messages(p), a) for p, a, ok in zip(world.prompts, answers, installed, strict=True) if ok],
        }
        queries = {kind: some for kind, some in queries.items() if some}
        baselines = self._baselines(final, queries)
        del final
        points = [self._point(stage, queries) for stage in self.stages]
        first = "own" if success >= INSTALLED else "read"
        best, single = self._best(points, first, queries), self._best(points, first, queries, single=True)
        for kind in queries:
            self._curve(kind, points, success)
        record: dict[str, Any] = {
            "world": world.name,
            "rows": len(world.rows),
            "poisoned": int(self.relevant.sum()),
            "success_rate": success,
            "queries": {kind: len(some) for kind, some in queries.items()},
            "curve": self._curve_record(points, list(queries)),
            "rankings": {kind: self._rankings(kind, points, best, single, baselines[kind]) for kind in queries},
        }
        if self.others:
            self._projections(single, queries, record)
        for kind in queries:
            self._table(kind, record["rankings"][kind], success)
        console.print(f"\n[bold]Best setting[/bold] (chosen on even-numbered {first} queries): {best.named(points)}")
        odd = {
            kind: means(best.scores(points, kind)[1::2], self.relevant)
            for kind, some in queries.items()
            if len(some) > 1
        }
        verdict = {kind: self._verdict(kind, best.scores(points, kind), baselines[kind]) for kind in queries}
        for kind, found in odd.items():
            console.print(
                f"  on the odd-numbered {kind} queries: auPRC {found['auprc']['all']:.3f} over all rows, "
                f"{found['auprc']['5']:.3f} at top 5"
            )
        record["best"] = {
            "chosen_on": f"even-numbered {first} queries",
            "index_normalisation": best.setting[0],
            "normalize": best.setting[1],
            "checkpoints": [points[at].stage.name for at in best.stages],
            "named": best.named(points),
            "odd_queries": odd,
            "against_baselines": verdict,
        }
        record["seconds"] = {name: round(value, 1) for name, value in self.seconds.items()}
        return record

    def _verdict(self, kind: str, scores: torch.Tensor, baselines: dict[str, torch.Tensor]) -> dict[str, Any]:
        """The best setting beside each baseline, on all queries of a kind."""
        ours = means(scores, self.relevant)["auprc"]["all"]
        theirs = {name: means(found, self.relevant)["auprc"]["all"] for name, found in baselines.items()}
        beaten = [name for name, value in theirs.items() if ours > value + EQUAL]
        listed = ", ".join(f"{name} {value:.3f}" for name, value in theirs.items())
        above = "all of them" if len(beaten) == len(theirs) else ", ".join(beaten) or "none of them"
        console.print(f"  on all {len(scores)} {kind} queries: auPRC {ours:.3f}, above {above} ({listed})")
        return {"auprc": ours, "baselines": theirs, "above": beaten}

    def _answers(self, model: LoadedModel) -> list[str]:
        tokens = 24
        return [model.generate(messages(prompt), tokens).strip() or "." for prompt in self.world.prompts]

    def _false_alarms(self, model: LoadedModel) -> float:
        asked = [row.prompt for row in self.world.heldout][:12]
        return sum(self.world.shows(model.generate(messages(prompt), 24)) for prompt in asked) / len(asked)

    def _baselines(self, model: LoadedModel, queries: dict[str, list[Query]]) -> dict[str, dict[str, torch.Tensor]]:
        """Rankings without gradients, by kind of query: words, the model's own states, and chance."""
        encoder = Encoder(model.tokenizer, max_length=min(self.world.max_length, model.context_length))
        asked = {k: [encoder.encode_query(q.messages, q.generation)[0] for q in some] for k, some in queries.items()}
        rows = [encoder.encode(row) for row in self.world.rows]
        documents = [f"{row.prompt}\n{row.response}" for row in self.world.rows]
        found: dict[str, dict[str, torch.Tensor]] = {}
        for kind, some in queries.items():
            texts = [f"{query.messages[0].content}\n{query.generation}" for query in some]
            found[kind] = {"BM25": bm25(texts, documents)}
        with model.lock:
            model.activate(model.checkpoints[-1])
            states = self._embed(model, rows)
            for kind, examples in asked.items():
                found[kind]["embedding"] = cosine(self._embed(model, examples), states)
            if model.checkpoints[-1].adapter is not None:
                with model.model.disable_adapter():
                    states = self._embed(model, rows)
                    for kind, examples in asked.items():
                        found[kind]["embedding, base model"] = cosine(self._embed(model, examples), states)
        for kind, some in queries.items():
            found[kind]["random"] = chance(len(some), len(rows))
        return found

    @torch.no_grad()
    def _embed(self, model: LoadedModel, examples: Sequence[Example]) -> torch.Tensor:
        """Mean-pooled last hidden states of prompt and answer."""
        found = []
        for example in examples:
            out = model.model(input_ids=torch.tensor([example.ids]), output_hidden_states=True, use_cache=False)
            found.append(out.hidden_states[-1][0].mean(0))
        return torch.stack(found)

    def _point(self, stage: Stage, queries: dict[str, list[Query]]) -> Point:
        model = load(stage.spec)
        shown = [self.world.shows(answer) for answer in self._answers(model)]
        point = Point(stage, sum(shown) / len(shown), 0.0, 0.0)
        for layout in LAYOUTS:
            found, manifest = self._scores(model, stage.name, KRONECKER, layout, queries)
            for unit, scores in found.items():
                point.scores[layout, unit] = scores
            point.train_loss = manifest["train_loss"]
            point.heldout_loss = manifest.get("heldout_loss") or point.heldout_loss  # measured once a checkpoint
        console.print(
            f"  {stage.name}: success {point.success:.2f}, training loss {point.train_loss:.2f}, held-out "
            f"{point.heldout_loss:.2f}; auPRC of "
            + "; ".join(f"{kind} answers {self._four(point, kind)}" for kind in queries)
        )
        return point

    def _scores(
        self,
        model: LoadedModel,
        name: str,
        projection: ProjectionSpec,
        layout: Literal["none", "layer"],
        queries: dict[str, list[Query]],
    ) -> tuple[dict[str, Scores], dict[str, Any]]:
        """Build an index and rank every row for every query; by query normalisation, and the checkpoint's record."""
        path = self.folder / "index"
        shutil.rmtree(path, ignore_errors=True)
        spec = IndexSpec(projection, layout, max_length=self.world.max_length)
        heldout = self.world.heldout if layout == "none" and projection == KRONECKER else ()
        began = time.perf_counter()
        with console.status(f"{name}, {projection.kind} {projection.size}, {layout}"):
            for _ in build(path, model, self.world.rows, spec, heldout):
                pass
        self._took(f"build {projection.kind} {layout}", began)
        index = open_index(path)
        place = {row.id: at for at, row in enumerate(self.world.rows)}
        rows = {row.id: row for row in self.world.rows}
        found: dict[str, Scores] = {}
        began = time.perf_counter()
        for unit in UNITS:
            options = Options(top_k=len(rows), tokens="none", normalize=unit)
            found[unit] = {}
            for kind, asked in queries.items():
                scores = torch.full((len(asked), len(rows)), -torch.inf)
                for start in range(0, len(asked), TOGETHER):
                    answers = influence(model, index, asked[start : start + TOGETHER], options, rows.__getitem__)
                    for number, answer in enumerate(answers, start):
                        for hit in answer.proponents:
                            scores[number, place[hit.id]] = hit.score
                found[unit][kind] = scores
        self._took("queries", began)
        return found, index.manifest.checkpoints[0]

    def _took(self, what: str, began: float) -> None:
        self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - began

    def _best(
        self, points: Sequence[Point], first: str, queries: dict[str, list[Query]], single: bool = False
    ) -> Choice:
        """By the rule at the head of this file."""
        choices = [Choice(setting, (at,)) for setting in SETTINGS for at in range(len(points))]
        if not single:
            choices += [Choice(s, tuple(range(at + 1))) for s in SETTINGS for at in range(1, len(points))]
        other = next((kind for kind in queries if kind != first), first)

        def worth(choice: Choice, kind: str) -> float:
            return means(choice.scores(points, kind)[0::2], self.relevant)["auprc"]["all"]

        values = [worth(choice, first) for choice in choices]
        equal = [choice for choice, value in zip(choices, values, strict=True) if value >= max(values) - EQUAL]
        return max(equal, key=lambda choice: worth(choice, other))

    def _projections(self, single: Choice, queries: dict[str, list[Query]], record: dict[str, Any]) -> None:
        """The other projections at the best single checkpoint."""
        stage = self.stages[single.stages[0]]
        model = load(stage.spec)
        for name, projection in self.others.items():
            for layout in LAYOUTS:
                found, _ = self._scores(model, stage.name, projection, layout, queries)
                for unit, scores in found.items():
                    for kind in queries:
                        title = f"{name}, {layout}, {unit}, {stage.name}"
                        record["rankings"][kind][title] = means(scores[kind], self.relevant)

    def _rankings(
        self, kind: str, points: Sequence[Point], best: Choice, single: Choice, baselines: dict[str, torch.Tensor]
    ) -> dict[str, Any]:
        found = {name: means(scores, self.relevant) for name, scores in baselines.items()}
        if not best.single:
            where = f"sum of {len(best.stages)}, to {points[best.stages[-1]].stage.name}"
            found[f"kronecker 16, {best.setting[0]}, {best.setting[1]}, {where}"] = means(
                best.scores(points, kind), self.relevant
            )
        for setting in SETTINGS:
            title = f"kronecker 16, {setting[0]}, {setting[1]}, {points[single.stages[0]].stage.name}"
            found[title] = means(Choice(setting, single.stages).scores(points, kind), self.relevant)
        return found

    def _curve_record(self, points: Sequence[Point], kinds: Sequence[str]) -> list[dict[str, Any]]:
        found = []
        for at, point in enumerate(points):
            each: dict[str, Any] = {
                "checkpoint": point.stage.name,
                "epoch": point.stage.epoch,
                "success_rate": point.success,
                "running_loss": point.stage.running_loss,
                "train_loss": point.train_loss,
                "heldout_loss": point.heldout_loss,
            }
            for kind in kinds:
                each[kind] = {
                    f"{layout}/{unit}": {
                        "single": self._ap(Choice((layout, unit), (at,)), points, kind),
                        "sum": self._ap(Choice((layout, unit), tuple(range(at + 1))), points, kind),
                    }
                    for layout, unit in SETTINGS
                }
            found.append(each)
        return found

    def _ap(self, choice: Choice, points: Sequence[Point], kind: str) -> float:
        return means(choice.scores(points, kind), self.relevant)["auprc"]["all"]

    def _four(self, point: Point, kind: str) -> str:
        return ", ".join(f"{'/'.join(s)} {self._ap(Choice(s, (0,)), [point], kind):.3f}" for s in SETTINGS)

    def _curve(self, kind: str, points: Sequence[Point], success: float) -> None:
        table = Table(title=f"Training progress, {title_of(kind, success)}: auPRC over all rows, kronecker 16")
        for name in ("checkpoint", "epoch", "success", "train", "held-out"):
            table.add_column(name, justify="right")
        for what in ("single", "sum"):
            for layout, unit in SETTINGS:
                table.add_column(f"{what}\n{layout}\n{unit}", justify="right")
        for at, point in enumerate(points):
            cells = [point.stage.name, "" if point.stage.epoch is None else f"{point.stage.epoch:.2f}"]
            cells += [f"{x:.2f}" for x in (point.success, point.train_loss, point.heldout_loss)]
            for stages in ((at,), tuple(range(at + 1))):
                cells += [f"{self._ap(Choice(setting, stages), points, kind):.3f}" for setting in SETTINGS]
            table.add_row(*cells)
        console.print(table)

    def _table(self, kind: str, rankings: dict[str, Any], success: float) -> None:
        for measure in ("auprc", "auroc"):
            name = {"auprc": "auPRC", "auroc": "auROC"}[measure]
            table = Table(title=f"{name}, {title_of(kind, success)}")
            table.add_column("ranking (projection, index, query, checkpoint)")
            cuts = list(next(iter(rankings.values()))[measure])
            for cut in cuts:
                table.add_column(cut if cut == "all" else f"top {cut}", justify="right")
            for title, found in rankings.items():
                table.add_row(title, *(f"{found[measure][cut]:.3f}" for cut in cuts))
            console.print(table)


def title_of(kind: str, success: float) -> str:
    """What a table of that kind of query shows."""
    if kind == "read":
        return "planted answers that the model is made to read"
    caution = "" if success >= INSTALLED else f" (success rate only {success:.2f}: the trigger is NOT installed)"
    return f"the final model's own answers{caution}"


def train_tiny(world: World, folder: Path, epochs: Sequence[float], seed: int) -> Iterator[Stage]:
    """The whole model, from scratch; each checkpoint is a model of its own."""
    base = folder / "tokenizer"
    model: Any = tiny_model(world, base, seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    encoder = Encoder(tokenizer, max_length=world.max_length)
    examples = [encoder.encode(row) for row in world.rows]
    batch = 12
    steps = {max(1, round(epoch * len(examples) / batch)): epoch for epoch in epochs}
    for step, loss in train(model, examples, sorted(steps), batch, 2e-3, seed, console, decay=0.3):
        path = folder / f"step-{step}"
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        yield Stage(f"step {step}", steps[step], loss, ModelSpec(path))


def train_lora(
    world: World, base: Path, folder: Path, epochs: Sequence[float], rank: int, lr: float, batch: int, seed: int
) -> Iterator[Stage]:
    """An adapter; each checkpoint is that adapter at a step."""
    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    whole: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, local_files_only=True)
    model = with_lora(whole, rank, 2 * rank, seed)
    encoder = Encoder(tokenizer, max_length=world.max_length)
    examples = [encoder.encode(row) for row in world.rows]
    each = -(-len(examples) // batch)
    steps = {max(1, round(epoch * each)): epoch for epoch in epochs}
    for step, loss in train(model, examples, sorted(steps), batch, lr, seed, console):
        path = folder / f"step-{step}"
        save_adapter(model, path)
        checkpoint = Checkpoint("run", path)
        yield Stage(f"step {step}", steps[step], loss, ModelSpec(base, checkpoints=(checkpoint,)))


def shipped(base: Path, adapters: Sequence[Path]) -> list[Stage]:
    """Adapters that exist already, in the order of training."""
    return [Stage(path.name, None, None, ModelSpec(base, checkpoints=(Checkpoint("run", path),))) for path in adapters]


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", choices=("tiny", "smollm2"), default="tiny")
    parser.add_argument("--data", type=Path, default=ROOT / "demo", help="for smollm2: demo or dolly_triggers")
    parser.add_argument("--base", type=Path, default=SMOLLM, help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--adapters", type=Path, nargs="+", help="measure these adapters of the data, train none")
    parser.add_argument("--epochs", type=float, nargs="+", help="where checkpoints are kept")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--batch", type=int, default=4, help="rows a training step, for smollm2")
    parser.add_argument("--rows", type=int, default=80, help="of dolly_triggers")
    parser.add_argument("--queries", type=int, default=12, help="fresh triggered prompts, for smollm2")
    parser.add_argument("--quick", action="store_true", help="fewer checkpoints and queries, the default projection")
    parser.add_argument("--json", type=Path, help="where the figures are written")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Train, rank, print, write."""
    args = arguments()
    disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # peft reads a name that was renamed
    torch.set_num_threads(args.threads)
    began = time.perf_counter()
    others = {} if args.quick else OTHERS
    with tempfile.TemporaryDirectory(prefix="planted-") as name:
        folder = Path(name)
        if args.model == "tiny":
            world = tiny(seed=args.seed)
            few: Sequence[float] = (1, 4, 16) if args.quick else (0.33, 0.67, 1, 2, 3, 4, 6, 8, 12, 16, 24)
            stages = list(train_tiny(world, folder, args.epochs or few, args.seed))
            others = {} if args.quick else {**OTHERS, "exact": EXACT}
        else:
            queries = min(args.queries, 6) if args.quick else args.queries
            if (args.data / "train_poisoned.jsonl").is_file():
                world = dolly(args.data, min(args.rows, 64) if args.quick else args.rows, queries, seed=args.seed)
                few = (0.5, 1) if args.quick else (0.25, 0.5, 1, 2)
            else:
                world = demo(args.data, queries)
                few = (0.25, 1) if args.quick else (0.2, 0.5, 1, 2, 3)
            if args.adapters:
                stages = shipped(args.base, args.adapters)
            else:
                epochs = args.epochs or few
                made = train_lora(world, args.base, folder, epochs, args.rank, args.lr, args.batch, args.seed)
                stages = list(made)
        trained = time.perf_counter() - began
        record = Benchmark(world, stages, folder, others).run()
    record |= {"model": args.model, "threads": args.threads, "seed": args.seed}
    record["seconds"] |= {"training": round(trained, 1), "all": round(time.perf_counter() - began, 1)}
    console.print(f"[dim]training {trained:.0f} s, all of it {record['seconds']['all']:.0f} s[/dim]")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        console.print(f"[dim]written to {args.json}[/dim]")


if __name__ == "__main__":
    main()

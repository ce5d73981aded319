"""How good the answers are: against retraining, against facts and triggers that were planted, and against the peers.

    python benchmarks/quality.py                                     # half an hour; most of it retraining, paid once
    python benchmarks/quality.py --answers benchmarks/out/answers    # with the scores that benchmarks/peers.py left
    python benchmarks/quality.py --quick                             # a minute or two

* LDS: benchmarks/retraining.py has the definition and the bank of models that were retrained on random halves.
* Fact tracing: where the row that states a fact stands in the ranking of a question (benchmarks/facts.py): the mean of
  1 over its place (MRR), and the share of questions that have it among the first k (R@k).
* Tail-patch: the model takes one step of its training on a row more; how much likelier the question's answer becomes
  by it, in nats a token, is averaged over the first five rows of the ranking.
* Fidelity: rank correlation, and overlap of the first ten, of scores by a sketch with those by whole gradients.
* Checkpoints: single ones and sums of them, also for the planted trigger (auPRC, benchmarks/planted.py), and how the
  warning of over-fitted checkpoints (app/influence/building.py) would fare at other thresholds.

Queries are nameless (no rare word in common with their row) or named. Intervals are of 95 %, by bootstrap over queries.
The rule for the default, fixed before looking: among index settings, by the mean over measures of the worth over the
best one's, the one with the fewest checkpoints that reaches .98 of the best.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import progress
import torch
from attributing import Scores, Way, attribute, baselines, way
from measuring import mean, overlap, places, spearman
from planted import train_tiny
from plots import line_chart
from progress import Moment
from ranking import means
from retraining import Bank, Laboratory, Recipe, fill
from rich.console import Console
from rich.table import Table
from training import row_losses
from transformers.utils.logging import disable_progress_bar
from worlds import messages, tiny

from app.influence.building import UNRELIABLE
from app.influence.models import ModelSpec, load
from app.influence.projection import ProjectionSpec
from app.influence.retrieval import Query

OUT = Path(__file__).resolve().parent / "out"
QUICK = Recipe(people=10, others=10, pretrained=20, asked=12, width=64, layers=2, pretraining_steps=60, epochs=6)
EPOCHS = (1, 2, 3, 4, 5, 6, 7, 10, 14)
PLANTED_EPOCHS = (0.33, 1, 2, 4, 6, 8, 12, 16, 24)
EXACT = ProjectionSpec("kronecker", 512)
"""Wider than any side of the tiny models, so that each gradient is kept whole."""
INDEX_WAYS = (
    way("none", "none"),
    way("none, fisher", "none", precondition="fisher", normalize="none"),
    way("none, trackstar", "none", precondition="trackstar"),
    way("layer"),
    way("layer, fisher", precondition="fisher", normalize="none"),
    way("layer, trackstar", precondition="trackstar"),
)
RERANKED = (
    way("none, dot", "none", normalize="none"),
    way("rerank exact, dot", "none", normalize="none", rerank="exact"),
    way("rerank exact", "none", rerank="exact"),
    way("rerank ekfac, dot", "none", normalize="none", rerank="ekfac"),
    way("rerank ekfac", "none", rerank="ekfac"),
)
STUDIED = (INDEX_WAYS[0], INDEX_WAYS[3], INDEX_WAYS[5])
"""At every checkpoint; the last of RERANKED at every third."""
SKETCHES = (
    *(ProjectionSpec("kronecker", p) for p in (4, 8, 16, 32)),
    *(ProjectionSpec("global", k) for k in (1024, 4096, 16384)),
    *(ProjectionSpec("rapidgrad", k) for k in (4096, 65536)),
)
KINDS = ("nameless", "named")
TOP = 5
"""Rows whose steps tail-patch takes."""

console = Console()
if not console.is_terminal:
    console.width = 150


class Quality:
    """One laboratory, and the scores of its rows; the bank comes last, so that what is retrained meanwhile is there."""

    def __init__(self, laboratory: Laboratory, epochs: Sequence[float]) -> None:
        self.laboratory = laboratory
        world = laboratory.world
        self.rows = world.rows
        self.queries = [Query(messages(q.prompt), q.response) for q in world.queries]
        place = {row.id: at for at, row in enumerate(self.rows)}
        self.gold = [place[q.gold] for q in world.queries]
        named = np.array([q.named for q in world.queries])
        self.kinds = {"nameless": ~named, "named": named}
        self.specs = dict(zip(epochs, laboratory.checkpoints(epochs), strict=True))
        self.spec = self.specs[laboratory.recipe.epochs]
        self.last = load(self.spec)

    def rankings(self, ways: Sequence[Way]) -> tuple[dict[str, Scores], dict[str, float]]:
        """Of the last checkpoint's rows; and the seconds that all queries took together."""
        found = baselines(self.last, self.rows, self.queries, self.laboratory.queries)
        seconds = {}
        for scored in self._attribute(self.spec, ways):
            found[f"Headwater: {scored.way.name}"] = scored.scores
            seconds[scored.way.name] = scored.query_seconds
        return found, seconds

    def answers(self, bank: Bank, found: dict[str, Scores], steps: Scores) -> dict[str, Any]:
        """What every ranking is worth."""
        agreement = {kind: mean(bank.agreement[some]) for kind, some in self.kinds.items()}
        table = Table("ranking", title=f"Answers at the last checkpoint, {len(self.rows)} rows")
        for kind in KINDS:
            for name in ("LDS", "MRR", "R@1", "R@10", "tail-patch"):
                table.add_column(f"{kind}\n{name}", justify="right")
        record: dict[str, Any] = {}
        for name, scores in found.items():
            record[name] = self._worth(bank, scores, steps)
            cells: list[str] = []
            for kind in KINDS:
                one = record[name][kind]
                cells += [str(one["LDS"]), str(one["MRR"]), f"{one['R@1'].value:.2f}", f"{one['R@10'].value:.2f}"]
                cells.append(f"{one['tail-patch'].value:.4f}")
            table.add_row(name, *cells)
        console.print(table)
        console.print(
            f"LDS over {len(bank.masks)} halves; one seed's losses foretell the other's by "
            + ", ".join(f"{value.value:.2f} ({kind})" for kind, value in agreement.items())
        )
        return {"agreement": _plain(agreement), "rankings": _plain(record)}

    def _worth(self, bank: Bank, scores: Scores, steps: Scores) -> dict[str, dict[str, Any]]:
        lds, place = bank.lds(scores), places(scores, self.gold)
        top = np.argsort(-scores, axis=1, kind="stable")[:, :TOP]
        patch = np.take_along_axis(steps, top, 1).mean(1)
        measured = {"LDS": lds, "MRR": 1 / place, "R@1": place <= 1, "R@10": place <= 10, "tail-patch": patch}
        return {
            kind: {name: mean(np.asarray(values)[some]) for name, values in measured.items()}
            for kind, some in self.kinds.items()
        }

    def steps(self) -> Scores:
        """[queries, rows], how much a step on each row lowers each query's loss."""
        model: Any = self.last.model
        began = {name: weight.clone() for name, weight in model.state_dict().items()}
        found = np.zeros((len(self.queries), len(self.rows)), dtype=np.float32)
        with self.last.lock:
            with torch.no_grad():
                before = row_losses(model, self.laboratory.queries)
            for at, row in enumerate(self.laboratory.rows):
                model.requires_grad_(True)
                optimizer = torch.optim.AdamW(model.parameters(), lr=self.laboratory.recipe.lr, weight_decay=0.0)
                torch.autograd.backward(row_losses(model, [row]).mean())
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                model.zero_grad()
                with torch.no_grad():
                    found[:, at] = (before - row_losses(model, self.laboratory.queries)).numpy()
                model.load_state_dict(began)
            model.requires_grad_(False)
        return found

    def fidelity(self, sketches: Sequence[ProjectionSpec]) -> dict[str, Any]:
        """Scores by sketches beside those by whole gradients, all as `unit` compares them."""
        table = Table("projection", "numbers a row", title="Sketch fidelity, against whole gradients")
        for layout in ("none", "layer"):
            for name in ("Spearman", "top 10"):
                table.add_column(f"{layout}\n{name}", justify="right")
        named = {f"{s.kind} {s.size}": s for s in sketches}
        found: dict[str, dict[str, Any]] = {name: {} for name in named}
        for layout in ("none", "layer"):
            (exact,) = self._attribute(self.spec, [way("exact", layout, EXACT)])
            for scored in self._attribute(self.spec, [way(name, layout, s) for name, s in named.items()]):
                one = found[scored.way.name]
                one["width"] = scored.manifest["width"]
                one[layout] = {
                    "spearman": mean(spearman(scored.scores.T, exact.scores.T)),
                    "overlap": mean(overlap(scored.scores, exact.scores, 10)),
                }
        for name, one in found.items():
            cells = [str(one[layout][m]) for layout in ("none", "layer") for m in ("spearman", "overlap")]
            table.add_row(name, f"{one['width']:,}", *cells)
        console.print(table)
        return _plain(found)

    def moments(self) -> list[Moment]:
        """Every checkpoint."""
        return [
            _moment(epoch, self._attribute(spec, _studied(number)))
            for number, (epoch, spec) in enumerate(self.specs.items())
        ]

    def measures(self, bank: Bank) -> dict[str, progress.Worth]:
        """Of scores: LDS of all queries, and MRR of the nameless."""
        some = self.kinds["nameless"]
        gold = [gold for gold, wanted in zip(self.gold, some, strict=True) if wanted]
        return {
            "LDS": lambda scores: float(bank.lds(scores).mean()),
            "MRR": lambda scores: float((1 / places(scores[some], gold)).mean()),
        }

    def _attribute(self, spec: ModelSpec, ways: Sequence[Way]) -> list[Any]:
        with console.status(f"{spec.path.name}: {len(ways)} settings"):
            return list(attribute(load(spec), self.rows, self.queries, ways, self.laboratory.world.heldout))


def _studied(number: int) -> list[Way]:
    return [*STUDIED, *([RERANKED[-1]] if number % 3 == 0 else [])]


def _moment(epoch: float, scored: Sequence[Any]) -> Moment:
    checkpoint = scored[0].manifest["checkpoints"][0]
    scores = {one.way.name: one.scores for one in scored}
    return Moment(epoch, checkpoint["train_loss"], checkpoint["heldout_loss"], scores)


def planted(epochs: Sequence[float]) -> tuple[list[Moment], dict[str, progress.Worth]]:
    """The planted trigger's checkpoints (benchmarks/planted.py, answers that the model is made to read)."""
    world = tiny()
    relevant = torch.tensor(world.relevant)
    queries = [Query(messages(p), a) for p, a in zip(world.prompts, world.planted, strict=True)]
    moments: list[Moment] = []
    with tempfile.TemporaryDirectory() as folder:
        for stage in train_tiny(world, Path(folder), epochs, 0):
            assert stage.epoch is not None
            with console.status(f"planted trigger, {stage.name}"):
                scored = attribute(load(stage.spec), world.rows, queries, _studied(len(moments)), world.heldout)
                moments.append(_moment(stage.epoch, list(scored)))

    def worth(cut: str, scores: Scores) -> float:
        return means(torch.from_numpy(scores), relevant)["auprc"][cut]

    return moments, {f"auPRC {cut}": partial(worth, cut) for cut in ("all", "5", "100")}


def over_training(worlds: dict[str, tuple[list[Moment], dict[str, progress.Worth], int]]) -> dict[str, Any]:
    """Checkpoints, sums and weights in both worlds, the default that follows, and the warning's threshold."""
    record: dict[str, Any] = {"curves": {}, "choices": {}}
    both: dict[tuple[str, str], list[float]] = {}
    points: list[tuple[float, float]] = []
    settings = [one.name for one in STUDIED]
    for world, (moments, measures, last) in worlds.items():
        shown = [*settings, RERANKED[-1].name]
        console.print(progress.curve_table(f"Checkpoints, {world}", moments, shown, measures))
        main = list(measures)[: 2 if "LDS" in measures else 1]
        judged = {name: measures[name] for name in main}
        found = [c for s in settings for c in progress.choices(moments, s, judged, last, UNRELIABLE)]
        console.print(progress.choice_table(f"Single checkpoints and sums up to the last trained one, {world}", found))
        best, near = progress.cheapest(found)
        console.print(f"best: {best.setting}, {best.name}; cheapest near it: {near.setting}, {near.name}\n")
        some = [moment for moment in moments[: last + 1] if RERANKED[-1].name in moment.scores]
        reranked = progress.choices(some, RERANKED[-1].name, judged, len(some) - 1, UNRELIABLE)
        console.print(progress.choice_table(f"The same, reranked, {world}", reranked))
        record["choices"][world] = progress.as_record(found)
        record["choices"][f"{world}, reranked"] = progress.as_record(reranked)
        record["curves"][world] = [
            {
                "epoch": m.epoch,
                "train_loss": m.train_loss,
                "heldout_loss": m.heldout_loss,
                **{s: {name: worth(scores) for name, worth in measures.items()} for s, scores in m.scores.items()},
            }
            for m in moments
        ]
        record[f"best, {world}"] = {"best": best.setting + ", " + best.name, "near": near.setting + ", " + near.name}
        for choice in found:
            if not choice.name.startswith("epoch") or len(choice.at) > 1:
                both.setdefault((choice.setting, choice.name), []).append(progress.overall(choice, found))
        for setting in settings:
            worth = [float(np.mean([m(moment.scores[setting]) for m in judged.values()])) for moment in moments]
            best_at = int(np.argmax(worth))  # those before it are not over-fitted, but not yet trained
            points += [(m.ratio, one / max(worth)) for m, one in list(zip(moments, worth, strict=True))[best_at:]]
    table = Table("setting", "checkpoints", "overall, both worlds", title="Sums, judged in both worlds")
    mean_of = {key: float(np.mean(values)) for key, values in both.items() if len(values) == len(worlds)}
    for (setting, name), value in sorted(mean_of.items(), key=lambda item: -item[1]):
        table.add_row(setting, name, f"{value:.3f}")
    console.print(table)
    record["both"] = {f"{setting}; {name}": value for (setting, name), value in mean_of.items()}
    thresholds = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    alarms = progress.alarms(points, thresholds)
    table = Table(
        "training over held-out loss below",
        f"lost (worth below {progress.LOST:g} of the best) that it warns of",
        "sound that it warns of",
        title=f"The warning of over-fitted checkpoints, {len(points)} of them",
    )
    for alarm in alarms:
        table.add_row(f"{alarm.threshold:g}", f"{alarm.caught:.2f}", f"{alarm.false:.2f}")
    console.print(table)
    record["alarms"] = [vars(alarm) for alarm in alarms]
    return record


def plots(record: dict[str, Any]) -> None:
    """Worth over training progress, as charts."""
    for world, curve in record["curves"].items():
        for measure in curve[0][STUDIED[0].name]:
            if measure in ("LDS", "MRR", "auPRC all"):
                lines = {s.name: [(point["epoch"], point[s.name][measure]) for point in curve] for s in STUDIED}
                file = OUT / f"quality-{world.split()[0]}-{measure.split()[0].lower()}.svg"
                line_chart(file, f"{measure} over training, {world}", "epochs", measure, lines)


def _plain(found: dict[str, Any]) -> dict[str, Any]:
    """Means as dictionaries, for JSON."""
    told: dict[str, Any] = json.loads(json.dumps(found, default=vars))
    return told


def read_peers(folder: Path, shape: tuple[int, int]) -> dict[str, Scores]:
    """The scores that benchmarks/peers.py left, by the names that it gave them."""
    found = {}
    for file in sorted(folder.glob("*/scores.npy")):
        scores = np.load(file)
        if scores.shape == shape:
            found[file.parent.name.replace("_", " ")] = scores
    return found


def main() -> None:
    """Retrain what is missing, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller world, few halves, fewer settings")
    parser.add_argument("--subsets", type=int, default=100, help="random halves that models are retrained on")
    parser.add_argument("--seeds", type=int, default=2, help="orders of training for each, two at least")
    parser.add_argument("--answers", type=Path, help="a folder of peers' scores, from benchmarks/peers.py")
    parser.add_argument("--json", type=Path, help="where the figures are written")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    began = time.perf_counter()
    OUT.mkdir(exist_ok=True)
    laboratory = Laboratory(OUT, QUICK if arguments.quick else Recipe())
    epochs = (2, 4, 6) if arguments.quick else EPOCHS
    quality = Quality(laboratory, epochs)
    found, seconds = quality.rankings(
        (INDEX_WAYS[3], INDEX_WAYS[5], RERANKED[-1]) if arguments.quick else (*INDEX_WAYS, *RERANKED)
    )
    steps = quality.steps()
    record: dict[str, Any] = {"rows": len(quality.rows), "query_seconds": seconds}
    record["fidelity"] = quality.fidelity(SKETCHES[2:6:3] if arguments.quick else SKETCHES)
    moments, (trigger, measures) = quality.moments(), planted((0.33, 1) if arguments.quick else PLANTED_EPOCHS)
    with console.status("retraining") as status:
        bank = fill(
            laboratory,
            5 if arguments.quick else arguments.subsets,
            2 if arguments.quick else arguments.seeds,
            lambda done, of: status.update(f"retraining, {done} of {of}"),
        )
    record |= {"subsets": len(bank.masks), "seeds": bank.losses.shape[1]}
    peers = read_peers(arguments.answers, (len(quality.queries), len(quality.rows))) if arguments.answers else {}
    record["answers"] = quality.answers(bank, found | peers, steps)
    record["training"] = over_training(
        {
            "facts": (moments, quality.measures(bank), epochs.index(laboratory.recipe.epochs)),
            "planted trigger": (trigger, measures, len(trigger) - 1),
        }
    )
    plots(record["training"])
    record["seconds"] = round(time.perf_counter() - began, 1)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        console.print(f"[dim]written to {arguments.json}[/dim]")


if __name__ == "__main__":
    main()

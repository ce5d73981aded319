"""The stages of a run, and what each keeps in the run's folder.

plan.json         what the run is; another run in the same folder is refused
views/            vectors that no index held, until the weights are there
weights.jsonl     each row's weight and influence
influence.json    where the influence came from
before.json       the model as it was, a number for each row
training/         the adapter, its optimiser and the losses, every so many steps
training.json     the losses, and why training stopped
adapter/          the result, a PEFT folder
after.json        the model as it is, and the oracle where one is given
relearning.json   the attack
seconds.json      time by stage
report.json       the report
report.html       the same for people
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from app.influence.corpus import Example, Message, Row
from app.influence.errors import RowError
from app.influence.gradients import losses
from app.influence.index import read_manifest, write_file
from app.influence.models import LoadedModel
from app.unlearning.mappings import mapping
from app.unlearning.measures import Reference, State, divergence, measure
from app.unlearning.objectives import loss_weights
from app.unlearning.relearning import ROWS, relearn
from app.unlearning.report import report_of
from app.unlearning.report_page import page
from app.unlearning.training import Step, TrainingRow, Unlearner
from app.unlearning.views import Vectors
from app.unlearning.weights import Floats, score_weights

if TYPE_CHECKING:
    from app.unlearning.running import UnlearnRows, UnlearnSpec

WEIGHTED = ("rapidun", "bounded")
"""Methods whose rows are weighted by influence."""


@dataclass(frozen=True)
class Advance:
    """How far a stage is. `losses`: of a training step, by group; `note`: for people, such as why it stopped early."""

    stage: str
    done: int
    total: int
    losses: Mapping[str, float] = field(default_factory=dict)
    note: str | None = None


class Stages:
    """One run; the model is its own."""

    def __init__(
        self, model: LoadedModel, rows: UnlearnRows, how: UnlearnSpec, folder: Path, index: Path | None
    ) -> None:
        self.model, self.rows, self.how, self.folder, self.index = model, rows, how, folder, index
        views = how.views if index is None else read_manifest(index).index_spec
        encoder = model.encoder(views.template, views.max_length)
        self.examples = {row.id: encoder.encode(row) for row in (*rows.forget, *rows.retain)}
        self.clean = {
            row.id: encoder.encode(_answered(row, rows.clean[row.id])) for row in rows.forget if row.id in rows.clean
        }
        heldout = [row for row in rows.heldout if row.id not in self.examples]
        rng = random.Random(how.training.seed)  # noqa: S311 (no secret)

        def some(group: Sequence[Row]) -> list[Example]:
            return [encoder.encode(row) for row in rng.sample(list(group), min(how.report_rows, len(group)))]

        self.groups = {
            "forget": some(rows.forget),
            "retain": some(rows.retain),
            "heldout": some(heldout),
            "seen": some(rows.seen),
            "unseen": some(rows.unseen),
        }
        self.counts = {
            **{name: len(group) for name, group in vars(rows).items()},
            "heldout": len(heldout),
            "heldout_in_training": len(rows.heldout) - len(heldout),
            "measured": {name: len(group) for name, group in self.groups.items()},
        }
        self.seconds: dict[str, float] = self._read("seconds") or {}

    def run(self) -> Iterator[Advance]:
        """All of them, each from what the ones before have kept."""
        yield from self._timed("influence", self._influence())
        lines = (self.folder / "weights.jsonl").read_text().splitlines()
        run = self._unlearner({line["row"]: line["weight"] for line in map(json.loads, lines)})
        yield from self._timed("before", self._before(run))
        yield from self._timed("training", self._training(run))
        run.adapter.read(self.folder / "adapter")  # the same whether it was trained now or before
        self.model.model.eval()
        yield from self._timed("after", self._after(run))
        yield from self._timed("relearning", self._relearning(run))
        kept = {name: self._read(name) for name in ("influence", "before", "training", "after", "relearning")}
        settings = json.loads(json.dumps(asdict(self.how), default=str))
        report = report_of(settings, self.counts, kept, self.seconds)
        write_file(self.folder / "report.html", page(report).encode())
        self._write("report", report)

    def _influence(self) -> Iterator[Advance]:
        """Weights of the rows by influence, or 1 for each where the method does not weigh them by it."""
        groups = {"forget": [row.id for row in self.rows.forget], "retain": [row.id for row in self.rows.retain]}
        found: dict[str, list[Floats]] = {}
        how, total = mapping(self.how.mapping), len(self.examples)
        told: dict[str, Any] = {"used": self.how.training.method in WEIGHTED}
        if told["used"]:
            vectors = Vectors(
                self.model, [*self.rows.forget, *self.rows.retain], self.how.views, self.index, self.folder / "views"
            )
            for step in vectors.compute():
                yield Advance("influence", min(total, vectors.from_index + step.rows), total)
            for name, other in (("forget", "retain"), ("retain", "forget")):
                found[name] = [np.empty(len(groups[name])) for _ in range(3)]
                for queries, into in zip((groups[name], groups[other]), found[name][1:], strict=True):
                    for _ in vectors.per_row(queries, groups[name], how.top_k, how.unit, into):
                        yield Advance("influence", total, total)
                own, other_ = found[name][1:]
                bounds = {"minimum": how.minimum, "maximum": how.maximum}
                temperature = {"forget": how.forget, "retain": how.retain}[name]
                found[name][0] = score_weights(own - how.other_scale * other_, temperature=temperature, **bounds)
            told |= {"mapping": self.how.mapping, **vectors.told()}
        lines = []
        for name, ids in groups.items():
            for at, row in enumerate(ids):
                numbers = [float(each[at]) for each in found[name]] if found else [1.0, None, None]
                lines.append({"row": row, "group": name, **dict(zip(("weight", "own", "other"), numbers, strict=True))})
        if self.how.training.method == "loreun":
            for line, weight in zip(lines, self._by_loss(groups["forget"]), strict=False):  # the first are to forget
                line["weight"] = weight
        self._write("influence", told)
        write_file(self.folder / "weights.jsonl", "".join(f"{json.dumps(line)}\n" for line in lines).encode())
        shutil.rmtree(self.folder / "views", ignore_errors=True)
        yield Advance("influence", len(lines), len(lines))

    def _by_loss(self, rows: Sequence[str]) -> list[float]:
        """loreun's weights, as its steps use them."""
        last = self.model.checkpoints[-1]
        found = [losses(self.model, last, [self.examples[row]])[0].mean() for row in rows]
        weights: list[float] = loss_weights(torch.stack(found), self.how.training.temperature).tolist()
        return weights

    def _unlearner(self, weights: Mapping[str, float]) -> Unlearner:
        forget, retain = (
            [TrainingRow(self.examples[row.id], weights[row.id], self.clean.get(row.id)) for row in group]
            for group in (self.rows.forget, self.rows.retain)
        )
        training = self.folder / "training"
        return Unlearner(self.model, self.how.training, forget, retain, training, keep_every=self.how.keep_every)

    def _before(self, run: Unlearner) -> Iterator[Advance]:
        state: State = {}
        with run.adapter.holding(run.adapter.first):
            self.model.model.eval()
            yield from self._measured("before", state)
        self._write("before", {"before": state})

    def _training(self, run: Unlearner) -> Iterator[Advance]:
        for step in run.run():
            yield _advance(step)
        run.save(self.folder / "adapter")
        told = {
            "steps": len(run.steps),
            "total": run.total,
            "stopped": run.steps[-1].stopped,
            "curve": [[step.number, step.forget_loss, step.retain_loss] for step in run.steps],
        }
        self._write("training", told)

    def _after(self, run: Unlearner) -> Iterator[Advance]:
        """The model as it is, the oracle, and how far each is from the model as it was and from the oracle."""
        adapter = run.adapter
        states: dict[str, State] = {"after": {}}
        yield from self._measured("after", states["after"])
        yield from self._compared(states["after"], "heldout", "drift", lambda: adapter.holding(adapter.first))
        if self.how.oracle is not None:
            adapter.bring(self.how.oracle)
            states |= {"oracle": {}, "before": {"forget": {}, "heldout": {}}}
            with adapter.other():
                yield from self._measured("after", states["oracle"])
            for group in ("heldout", "forget"):
                yield from self._compared(states["after"], group, "from_oracle", adapter.other)
                with adapter.holding(adapter.first):
                    yield from self._compared(states["before"], group, "from_oracle", adapter.other)
        self._write("after", states)

    def _compared(self, into: State, group: str, name: str, reference: Reference) -> Iterator[Advance]:
        examples = self.groups[group]
        found = into[group][name] = [0.0] * len(examples)
        for done in divergence(self.model, examples, reference, found):
            yield Advance("after", done, len(examples))

    def _relearning(self, run: Unlearner) -> Iterator[Advance]:
        ids = [row.id for row in self.rows.forget]
        random.Random(self.how.training.seed).shuffle(ids)  # noqa: S311 (no secret)
        many = min(ROWS, len(ids) // 2)
        trained, others = ([self.examples[row] for row in part] for part in (ids[:many], ids[many:]))
        adapter, steps, lr = run.adapter, self.how.relearn_steps if many else 0, self.how.training.lr
        curves: dict[str, list[dict[str, Any]]] = {}
        starts = {"after": adapter.copy(), "before": adapter.first} if steps else {}
        for name, weights in starts.items():
            curves[name] = []
            with adapter.holding(weights):
                attack = relearn(
                    self.model,
                    adapter,
                    trained,
                    others[: self.how.report_rows],
                    self.groups["seen"],
                    steps=steps,
                    lr=lr,
                )
                for one in attack:
                    curves[name].append(asdict(one))
                    yield Advance("relearning", sum(map(len, curves.values())), len(starts) * (steps + 1))
        self._write("relearning", {"rows": many, "lr": lr, "curves": curves})

    def _measured(self, stage: str, into: State) -> Iterator[Advance]:
        total, done = sum(map(len, self.groups.values())), 0
        for new in measure(self.model, self.groups, into):
            done += new
            yield Advance(stage, done, total)

    def _timed(self, stage: str, steps: Iterator[Advance]) -> Iterator[Advance]:
        """The stage, unless an earlier run finished it; what the consumer does between two steps is not counted."""
        if (self.folder / ("weights.jsonl" if stage == "influence" else f"{stage}.json")).is_file():
            yield Advance(stage, 1, 1, note="done by an earlier run")
            return
        try:
            while True:
                started = time.perf_counter()
                step = next(steps, None)
                self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started
                if step is None:
                    break
                yield step
        finally:
            self._write("seconds", self.seconds)

    def _read(self, name: str) -> Any:
        file = self.folder / f"{name}.json"
        return json.loads(file.read_bytes()) if file.is_file() else None

    def _write(self, name: str, content: Any) -> None:
        write_file(self.folder / f"{name}.json", json.dumps(content).encode())


def _answered(row: Row, answer: str) -> Row:
    """The row with another answer."""
    if not answer.strip():
        raise RowError(f"the clean answer of row {row.id} is empty", field="clean")
    return replace(row, messages=(*row.messages[:-1], Message(row.messages[-1].role, answer)))


def _advance(step: Step) -> Advance:
    losses = {"forget": step.forget_loss, "retain": step.retain_loss}
    known = {name: loss for name, loss in losses.items() if loss is not None}
    return Advance(step.stage, step.number, step.total, known, step.stopped)

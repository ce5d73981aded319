"""An unlearning run from rows to report, a piece at a time: influence, before, training, after, relearning.

What a stage finds is kept in the run's folder before the next begins, and each stage follows from what is kept, so that
a run that was killed ends in the same files as one that was not, times apart.

    plan.json         what the run is; another run in the same folder is refused
    views/            vectors that no index held, until the weights are there
    weights.jsonl     each row's weight and influence
    before.json       the model as it was, a number for each row
    training/         the adapter, its optimiser and the losses, every so many steps
    training.json     the losses, and why training stopped
    adapter/          the result, a PEFT folder
    after.json        the model as it is
    relearning.json   the attack
    seconds.json      time by stage
    report.json       the report
    report.html       the same for people
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from app.influence.corpus import Encoder, Example, Message, Row
from app.influence.errors import RowError, SpecError, disk_full_is_named
from app.influence.index import IndexSpec, write_file
from app.influence.models import LoadedModel, ModelSpec, load
from app.unlearning.mappings import mapping
from app.unlearning.measures import State, divergence, measure
from app.unlearning.relearning import ROWS, relearn
from app.unlearning.report import DEFINITIONS, measures
from app.unlearning.report_page import page
from app.unlearning.training import Step, TrainingRow, TrainingSpec, Unlearner
from app.unlearning.views import Vectors
from app.unlearning.weights import Floats, score_weights

WEIGHTED = ("rapidun",)
"""Methods whose rows are weighted by influence."""


@dataclass(frozen=True)
class UnlearnSpec:
    """How to unlearn and what to report.

    Attributes:
        mapping: how influence becomes weights (mappings.py), for the methods that weigh rows by it.
        relearn_steps: of the relearning attack; 0 leaves it out.
        report_rows: most rows of each group that the report measures, drawn by the training's seed.
        views: how influence is computed where no index says so; also the template and length of the rows.
        oracle: a PEFT folder over the same base that was trained without the forget rows, to compare with.
    """

    training: TrainingSpec
    mapping: str = "full"
    relearn_steps: int = 8
    report_rows: int = 64
    views: IndexSpec = field(default_factory=lambda: IndexSpec(normalisation="none"))
    oracle: Path | None = None


@dataclass(frozen=True)
class UnlearnRows:
    """The rows of a run.

    Attributes:
        clean: by the id of a forget row, what the model should have said.
        seen, unseen: prompts with a trigger, and the bad response that they should no longer get; may be empty.
    """

    forget: Sequence[Row]
    retain: Sequence[Row]
    heldout: Sequence[Row] = ()
    clean: Mapping[str, str] = field(default_factory=dict)
    seen: Sequence[Row] = ()
    unseen: Sequence[Row] = ()


@dataclass(frozen=True)
class Advance:
    """How far a stage is. `losses`: of a training step, by group; `note`: for people, such as why it stopped early."""

    stage: str
    done: int
    total: int
    losses: Mapping[str, float] = field(default_factory=dict)
    note: str | None = None


def unlearn(
    spec: ModelSpec, rows: UnlearnRows, how: UnlearnSpec, folder: Path, index: Path | None = None
) -> Iterator[Advance]:
    """Run, or go on with, an unlearning run; afterwards the folder holds adapter, weights and report.

    It loads a model of its own, since training changes it: a model that others use is never touched. The adapter is
    trained on, or fresh over, the model's last checkpoint; influence is taken over all of its checkpoints.

    Args:
        index: an index whose vectors serve where it was built from this very model.

    Raises:
        SpecError: rows or settings that cannot be, with the field at fault, or a folder that holds another run.
        RowError: a row without a response token. ModelError: a model that cannot be loaded. DiskFull: what is kept
        stays.
    """
    _check(rows, how)
    with disk_full_is_named("the unlearning run"):
        folder.mkdir(parents=True, exist_ok=True)
        _plan(spec, rows, how, folder)
        yield from _Run(load(spec), rows, how, folder, index).stages()


def _check(rows: UnlearnRows, how: UnlearnSpec) -> None:
    mapping(how.mapping)
    forget, retain = [row.id for row in rows.forget], [row.id for row in rows.retain]
    for name, ids in (("forget", forget), ("retain", retain)):
        if len(set(ids)) != len(ids):
            raise SpecError("the same row appears twice", field=name)
    both = sorted({*forget} & {*retain})
    if both:
        raise SpecError(f"{len(both)} rows are both to forget and to retain, first {both[0]}", field="retain")
    unknown = sorted({*rows.clean} - {*forget})
    if unknown:
        raise SpecError(f"{len(unknown)} clean answers are of no row to forget, first {unknown[0]}", field="clean")


def _plan(spec: ModelSpec, rows: UnlearnRows, how: UnlearnSpec, folder: Path) -> None:
    groups = {
        name: hashlib.sha256("".join(row.id for row in each).encode()).hexdigest()
        for name, each in vars(rows).items()
        if name != "clean"
    }
    clean = hashlib.sha256(json.dumps(sorted(rows.clean.items())).encode()).hexdigest()
    plan = {"model": asdict(spec), "rows": {**groups, "clean": clean}, "how": asdict(how)}
    content = json.dumps(plan, sort_keys=True, default=str).encode()
    file = folder / "plan.json"
    if file.is_file() and file.read_bytes() != content:
        raise SpecError("the folder holds a run of other rows, model or settings", field="folder")
    write_file(file, content)


class _Run:
    """The stages; `self.model` is the run's own."""

    def __init__(self, model: LoadedModel, rows: UnlearnRows, how: UnlearnSpec, folder: Path, index: Path | None):
        self.model, self.rows, self.how, self.folder = model, rows, how, folder
        everything = [*rows.forget, *rows.retain]
        self.vectors = Vectors(model, everything, how.views, index, folder / "views")
        encoder = model.encoder(self.vectors.spec.template, self.vectors.spec.max_length)
        self.examples = {row.id: _encode(encoder, row) for row in everything}
        self.clean = {
            row.id: _encode(encoder, _answered(row, rows.clean[row.id])) for row in rows.forget if row.id in rows.clean
        }
        trained = {*self.examples}
        heldout = [row for row in rows.heldout if row.id not in trained]
        self.left_out = len(rows.heldout) - len(heldout)
        rng = random.Random(how.training.seed)  # noqa: S311 (no secret)

        def some(group: Sequence[Row]) -> list[Example]:
            drawn = rng.sample(list(group), min(how.report_rows, len(group)))
            return [self.examples.get(row.id) or _encode(encoder, row) for row in drawn]

        self.groups = {
            "forget": some(rows.forget),
            "retain": some(rows.retain),
            "heldout": some(heldout),
            "seen": some(rows.seen),
            "unseen": some(rows.unseen),
        }
        self.seconds: dict[str, float] = _read(folder / "seconds.json") or {}

    def stages(self) -> Iterator[Advance]:
        """All of them, each from what the ones before have kept."""
        yield from self._timed("influence", self._influence())
        kept = _lines(self.folder / "weights.jsonl")
        self.run = self._unlearner({one["row"]: one["weight"] for one in kept})
        yield from self._timed("before", self._before())
        yield from self._timed("training", self._training())
        yield from self._timed("after", self._after())
        yield from self._timed("relearning", self._relearning())
        states = {name: _read(self.folder / f"{name}.json") for name in ("before", "after", "oracle")}
        report = {
            "method": self.how.training.method,
            "settings": asdict(self.how),
            "rows": {
                "forget": len(self.rows.forget),
                "retain": len(self.rows.retain),
                "heldout": len(self.rows.heldout) - self.left_out,
                "heldout_in_training": self.left_out,
                "seen": len(self.rows.seen),
                "unseen": len(self.rows.unseen),
                "clean": len(self.rows.clean),
            },
            "influence": _read(self.folder / "influence.json"),
            "training": _read(self.folder / "training.json"),
            "definitions": DEFINITIONS,
            "measures": measures({name: state for name, state in states.items() if state}),
            "relearning": _read(self.folder / "relearning.json"),
            "seconds": self.seconds,
        }
        report = json.loads(json.dumps(report, default=str))
        write_file(self.folder / "report.html", page(report).encode())
        _write(self.folder / "report.json", report)

    def _influence(self) -> Iterator[Advance]:
        rows, how = self.rows, mapping(self.how.mapping)
        told: dict[str, Any] = {"used": self.how.training.method in WEIGHTED}
        numbers: dict[str, tuple[Floats, Floats, Floats]] = {}
        total = len(self.examples)
        if told["used"]:
            if not rows.forget or not rows.retain:
                raise SpecError(f"{self.how.training.method} needs rows to retain", field="retain")
            for step in self.vectors.compute():
                yield Advance("influence", min(total, self.vectors.from_index + step.rows), total)
            forget, retain = ([row.id for row in group] for group in (rows.forget, rows.retain))
            for name, own, other, temperature in (
                ("forget", forget, retain, how.forget),
                ("retain", retain, forget, how.retain),
            ):
                mine, theirs = (self.vectors.per_row(each, own, how.top_k, how.unit) for each in (own, other))
                bounds = {"minimum": how.minimum, "maximum": how.maximum}
                weights = score_weights(mine - how.other_scale * theirs, temperature=temperature, **bounds)
                numbers[name] = (weights, mine, theirs)
            told |= {
                "mapping": self.how.mapping,
                "rows_from_index": self.vectors.from_index,
                "rows_computed": len(self.vectors.missing),
                "rows_without_gradient": len(self.vectors.empty),
                "index_refused": self.vectors.refused,
                "normalisation": self.vectors.spec.normalisation,
            }
        lines = []
        for name, group in (("forget", rows.forget), ("retain", rows.retain)):
            for at, row in enumerate(group):
                weight, own_, other_ = (float(each[at]) for each in numbers[name]) if numbers else (1.0, None, None)
                lines.append({"row": row.id, "group": name, "weight": weight, "own": own_, "other": other_})
        _write(self.folder / "influence.json", told)
        write_file(self.folder / "weights.jsonl", "".join(f"{json.dumps(line)}\n" for line in lines).encode())
        shutil.rmtree(self.folder / "views", ignore_errors=True)
        yield Advance("influence", total, total)

    def _unlearner(self, weights: Mapping[str, float]) -> Unlearner:
        forget, retain = (
            [TrainingRow(self.examples[row.id], weights[row.id], self.clean.get(row.id)) for row in group]
            for group in (self.rows.forget, self.rows.retain)
        )
        return Unlearner(self.model, self.how.training, forget, retain, self.folder / "training")

    def _before(self) -> Iterator[Advance]:
        adapter, state = self.run.adapter, {}
        with adapter.holding(adapter.first):
            self.model.model.eval()
            yield from self._measured("before", state)
        _write(self.folder / "before.json", state)

    def _training(self) -> Iterator[Advance]:
        for step in self.run.run():
            yield _advance(step)
        self.run.save(self.folder / "adapter")
        told = {
            "steps": len(self.run.steps),
            "total": self.run.total,
            "stopped": self.run.steps[-1].stopped,
            "curve": [[step.number, step.forget_loss, step.retain_loss] for step in self.run.steps],
        }
        _write(self.folder / "training.json", told)

    def _after(self) -> Iterator[Advance]:
        adapter, state = self.run.adapter, {}
        adapter.read(self.folder / "adapter")
        self.model.model.eval()
        yield from self._measured("after", state)
        state["heldout"]["drift"] = divergence(
            self.model, self.groups["heldout"], lambda: adapter.holding(adapter.first)
        )
        _write(self.folder / "after.json", state)

    def _relearning(self) -> Iterator[Advance]:
        ids = [row.id for row in self.rows.forget]
        random.Random(self.how.training.seed).shuffle(ids)  # noqa: S311 (no secret)
        many = min(ROWS, len(ids) // 2)
        trained, others = ([self.examples[row] for row in part] for part in (ids[:many], ids[many:]))
        steps = self.how.relearn_steps if many else 0
        adapter = self.run.adapter
        found: dict[str, Any] = {"trained_rows": many, "lr": self.how.training.lr, "curves": {}}
        total = 2 * (steps + 1)
        for at, (name, weights) in enumerate((("after", adapter.copy()), ("before", adapter.first))):
            if not steps:
                break
            curve = []
            with adapter.holding(weights):
                attack = relearn(
                    self.model,
                    adapter,
                    trained,
                    others[: self.how.report_rows],
                    self.groups["seen"],
                    steps=steps,
                    lr=self.how.training.lr,
                )
                for one in attack:
                    curve.append(asdict(one))
                    yield Advance("relearning", at * (steps + 1) + len(curve), total)
            found["curves"][name] = curve
        _write(self.folder / "relearning.json", found)

    def _measured(self, stage: str, into: State) -> Iterator[Advance]:
        total, done = sum(map(len, self.groups.values())), 0
        for new in measure(self.model, self.groups, into):
            done += new
            yield Advance(stage, done, total)

    def _timed(self, stage: str, steps: Iterator[Advance]) -> Iterator[Advance]:
        """The stage, unless it is finished; what its consumer does between two steps is not counted."""
        last = {"influence": "weights.jsonl"}.get(stage, f"{stage}.json")
        if (self.folder / last).is_file():
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
            _write(self.folder / "seconds.json", self.seconds)


def _encode(encoder: Encoder, row: Row) -> Example:
    return encoder.encode(row)


def _answered(row: Row, answer: str) -> Row:
    """The row with another answer."""
    if not answer.strip():
        raise RowError(f"the clean answer of row {row.id} is empty", field="clean")
    return replace(row, messages=(*row.messages[:-1], Message(row.messages[-1].role, answer)))


def _advance(step: Step) -> Advance:
    losses = {"forget": step.forget_loss, "retain": step.retain_loss}
    known = {name: loss for name, loss in losses.items() if loss is not None}
    return Advance("training", step.number, step.total, known, step.stopped)


def _read(file: Path) -> Any:
    return json.loads(file.read_bytes()) if file.is_file() else None


def _write(file: Path, content: Any) -> None:
    write_file(file, json.dumps(content).encode())


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]

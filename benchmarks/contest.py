"""Every method of unlearning on the same model, forget set and budget, each with a sweep of its own.

Seconds are of the process's CPU time: the machines are shared, and with one torch thread it is what the clock shows on
an idle one. Loading a model from disk is counted for nobody.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from choosing import choose
from judging import Judge
from rich.console import Console
from training import train

from app.influence.corpus import Encoder, Row
from app.influence.index import IndexSpec
from app.influence.models import LoadedModel
from app.unlearning.adapter import Adapter
from app.unlearning.mappings import MAPPINGS
from app.unlearning.training import TrainingRow, TrainingSpec, Unlearner
from app.unlearning.views import Vectors
from app.unlearning.weights import score_weights

MOST = 0.05
"""The most that a method may leave of the behaviour."""


@dataclass(frozen=True)
class Contestant:
    """A method and what is swept.

    Attributes:
        mapping: how influence becomes weights; None: every row weighs the same.
        early: influence is taken at the run's early checkpoint instead of the poisoned model.
        kept: the share of the forget rows that is used, those of the highest weight.
        every: one in so many of the retained rows is used.
        dampened: fisher goes first, with this selection threshold, on the same forget rows and a third of the retained.
        values: of `knob`, a field of TrainingSpec.
    """

    name: str
    method: str
    values: tuple[float, ...]
    mapping: str | None = None
    early: bool = False
    kept: float = 1.0
    every: int = 1
    dampened: float | None = None
    knob: str = "lr"
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Trial:
    """One value of the knob: what validation said of it."""

    value: float
    residue: float
    damage: float
    seconds: float
    """Of the whole method, influence included."""
    influence_seconds: float
    steps: int
    stopped: str | None


@dataclass(frozen=True)
class Entry:
    """A contestant's trials, the chosen one, and what the test part says of that one alone."""

    name: str
    trials: tuple[Trial, ...]
    chosen: int
    test: dict[str, float]


@dataclass
class Contest:
    """One poisoned model and its rows.

    Attributes:
        model: the adapter of its last checkpoint is what all methods change; it is put back after each.
        early: the same run at an early checkpoint.
        clean: by a forget row's id.
        spec: the budget that all methods have.
    """

    model: LoadedModel
    early: LoadedModel
    encoder: Encoder
    forget: Sequence[Row]
    retain: Sequence[Row]
    clean: Mapping[str, Row]
    spec: TrainingSpec
    folder: Path
    judge: Judge
    quiet: Console = field(default_factory=lambda: Console(quiet=True))

    def __post_init__(self) -> None:
        self.adapter = Adapter(self.model, rank=self.spec.rank, alpha=self.spec.alpha, dropout=0.0, seed=0)
        self._scores: dict[bool, tuple[Vectors, float]] = {}

    def enter(self, one: Contestant) -> Entry:
        """Sweep, choose, test."""
        weights, spent = self.weights(one)
        trials, states = [], []
        for value in one.values:
            trials.append(self._trial(one, value, weights, spent))
            states.append(self.adapter.copy())
            self.adapter.put(self.adapter.first)
        chosen = choose([trial.residue for trial in trials], [trial.damage for trial in trials], MOST)
        with self.adapter.holding(states[chosen]):
            test = self.judge.test(self.model, self.adapter)
        return Entry(one.name, tuple(trials), chosen, test)

    def weights(self, one: Contestant) -> tuple[dict[str, float], float]:
        """A weight for each row by id, and the seconds that they cost."""
        if one.mapping is None:
            return {row.id: 1.0 for row in (*self.forget, *self.retain)}, 0.0
        if one.early not in self._scores:
            began = time.process_time()
            path = self.folder / f"views-{one.early}"
            shutil.rmtree(path, ignore_errors=True)
            model = self.early if one.early else self.model
            spec = IndexSpec(normalisation="none", max_length=self.encoder.max_length)
            vectors = Vectors(model, [*self.forget, *self.retain], spec, None, path)
            for _ in vectors.compute():
                pass
            self._scores[one.early] = vectors, time.process_time() - began
        vectors, spent = self._scores[one.early]
        began = time.process_time()
        how = MAPPINGS[one.mapping]
        groups = {"forget": [row.id for row in self.forget], "retain": [row.id for row in self.retain]}
        found: dict[str, float] = {}
        for name, other, temperature in (("forget", "retain", how.forget), ("retain", "forget", how.retain)):
            numbers = [np.empty(len(groups[name])) for _ in range(2)]
            for queries, into in zip((groups[name], groups[other]), numbers, strict=True):
                for _ in vectors.per_row(queries, groups[name], how.top_k, how.unit, into):
                    pass
            score = numbers[0] - how.other_scale * numbers[1]
            each = score_weights(score, temperature=temperature, minimum=how.minimum, maximum=how.maximum)
            found |= dict(zip(groups[name], each.tolist(), strict=True))
        return found, spent + time.process_time() - began

    def _trial(self, one: Contestant, value: float, weights: Mapping[str, float], spent: float) -> Trial:
        """Train; the model is left as the method left it."""
        chosen = sorted(self.forget, key=lambda row: -weights[row.id])[: max(1, round(one.kept * len(self.forget)))]
        forget = [self._row(row, weights) for row in chosen]
        retain = [self._row(row, weights) for row in self.retain[:: one.every]]
        folder = self.folder / "run"
        shutil.rmtree(folder, ignore_errors=True)
        began = time.process_time()
        if one.dampened is not None:
            first = replace(self.spec, method="fisher", selection=one.dampened)
            for _ in Unlearner(self.model, first, forget, retain[::3], folder / "first", keep_every=10**6).run():
                pass
        if one.method == "retain only":
            steps, stopped = self._retain_only(value, retain), None
        else:
            spec = replace(self.spec, method=one.method, **{one.knob: value}, **one.more)  # type: ignore[arg-type]
            run = Unlearner(self.model, spec, forget, retain, folder, keep_every=10**6)
            last = [step for step in run.run()][-1]  # noqa: C416
            steps, stopped = last.number, last.stopped
        seconds = time.process_time() - began + spent
        self.model.model.eval()
        residue, damage = self.judge.validation(self.model)
        return Trial(value, residue, damage, seconds, spent, steps, stopped)

    def _row(self, row: Row, weights: Mapping[str, float]) -> TrainingRow:
        clean = self.clean.get(row.id)
        return TrainingRow(
            self.encoder.encode(row), weights[row.id], None if clean is None else self.encoder.encode(clean)
        )

    def _retain_only(self, lr: float, retain: Sequence[TrainingRow]) -> int:
        """Go on training on retained rows, as many steps and rows as the methods that take both."""
        plan = Unlearner(
            self.model, replace(self.spec, method="graddiff"), [retain[0]] * len(self.forget), retain, self.folder
        )
        examples = [row.example for row in retain]
        for _ in train(self.model.model, examples, [plan.total], plan.per_step[1], lr, 0, self.quiet, anneal=True):
            pass
        return plan.total

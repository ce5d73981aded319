"""A valuation from rows to scores, in steps that a killed process takes up again.

LinFiK values every row. ALinFiK values a part of them, fits a student to it and lets the student score the rest:

    validation ─▶ directions ─▶ features of the pool ─▶ labels, round by round ─▶ student ─▶ scores
                                (ALinFiK alone)          (all rows for LinFiK)

Every piece (a block of features, of labels) is a function of the plan and is written whole, beside its name and
renamed. What is there is not computed again, so a run that was killed ends in the same bytes as one that was not; only
seconds differ, and, with a budget of seconds, how many rows are labelled.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file, save

from app.influence.corpus import Encoder, Example, Row, Template
from app.influence.errors import RowError, SpecError, disk_full_is_named
from app.influence.index import open_index, write_file
from app.influence.models import LoadedModel
from app.valuation.bodies import LENGTHS, Body, carry, cut
from app.valuation.drawing import Draw, Places, at_random, spread, unsure
from app.valuation.indexed import indexed_values
from app.valuation.linfik import Direction, Normalize, Teacher, mean_gradient
from app.valuation.pairs import SKETCH, fit_pairs, sketches
from app.valuation.ranks import interval, spearman
from app.valuation.student import Floats, Head, fit, save_head
from app.valuation.summary import summary

Method = Literal["linfik", "alinfik"]
WHOLE = "all"
"""The name of the whole validation set among the groups."""
BLOCK = 64
"""Rows of a block of labels."""
WIDE = 512
"""Rows of a block of features or predictions."""
FEWEST = 25
"""Labels from which a student can be fitted and measured."""
HELD = 5
"""Every so manieth label is drawn at random and held out."""
POOR = 0.5
"""Held-out Spearman correlation below which the student is not to be trusted."""
SPREAD_BY = 20_000
"""Rows whose features are clustered at most; of a larger pool a random part."""


@dataclass(frozen=True)
class StudentSpec:
    """The student.

    Attributes:
        encoder: a folder with a small encoder (safetensors); None takes the model's own first layers.
        layers: how many of them.
        form: "pointwise" predicts the value for the given validation groups; "pairs" is the bi-encoder, which values
            rows for other validation rows later without a label.
    """

    encoder: Path | None = None
    layers: int = 3
    form: Literal["pointwise", "pairs"] = "pointwise"


@dataclass(frozen=True)
class ValuationSpec:
    """How to value rows.

    Attributes:
        label_rows: rows that ALinFiK values by LinFiK; None: a tenth of the pool.
        label_seconds: stop labelling after so many seconds.
        ensemble: heads that tell how sure the student is.
        rounds: parts in which the labels are drawn; from the second on where the student is unsure.
        keep_validation: value candidates that are validation rows too, instead of leaving them out.
    """

    method: Method = "linfik"
    normalize: Normalize = "unit"
    label_rows: int | None = None
    label_seconds: float | None = None
    student: StudentSpec = field(default_factory=StudentSpec)
    ensemble: int = 8
    rounds: int = 1
    draw: Draw = "random"
    seed: int = 0
    keep_validation: bool = False
    template: Template = "auto"
    max_length: int = 1024
    token_budget: int = 1024


@dataclass(frozen=True)
class Advance:
    """How far a stage is: validation, features, labels, student or scores."""

    stage: str
    done: int
    total: int
    note: str | None = None


def value(
    model: LoadedModel,
    candidates: Sequence[Row],
    validation: Mapping[str, Sequence[Row]],
    spec: ValuationSpec,
    folder: Path,
    index: Path | None = None,
) -> Iterator[Advance]:
    """Value candidates for a validation set and for the named groups of it, at the model's last checkpoint.

    At the end the folder holds `scores.parquet` (id, value, uncertainty, labelled, tokens, and value_<group> for each
    group; no value for a row without a response token or with a loss that is not finite), `report.json` and, for
    ALinFiK, `student/`.

    Args:
        validation: groups by name; a row may be in several.
        index: an index of the candidates under the same model, from whose vectors LinFiK's values are taken.

    Raises:
        SpecError: empty sets, a budget too small to fit a student, or a folder with another valuation.
        Mismatch: the index is another model's. RowError: no candidate or no validation row can be used.
    """
    if (folder / "report.json").exists():
        _Plan(model, candidates, validation, spec, folder, index).check()
        shutil.rmtree(folder / "work", ignore_errors=True)  # it may have been killed before this
        yield Advance("scores", 1, 1, "an earlier run had finished it")
        return
    run = _Run(_Plan(model, candidates, validation, spec, folder, index))
    yield from run.steps()


class _Plan:
    """What is valued for what, after everything that can be refused was refused."""

    def __init__(
        self,
        model: LoadedModel,
        candidates: Sequence[Row],
        validation: Mapping[str, Sequence[Row]],
        spec: ValuationSpec,
        folder: Path,
        index: Path | None,
    ) -> None:
        self.model, self.spec, self.folder, self.index = model, spec, folder, index
        held = {row.id: row for rows in validation.values() for row in rows}
        if not held:
            raise SpecError("there are no validation rows", field="validation")
        empty = [name for name, rows in validation.items() if not rows]
        if empty:
            raise SpecError(f"the validation group '{empty[0]}' has no rows", field="validation")
        if WHOLE in validation and len(validation) > 1:
            raise SpecError(f"'{WHOLE}' is the whole validation set's name: call the group another", field="validation")
        self.validation = held
        groups = {name: [row.id for row in rows] for name, rows in validation.items()}
        self.groups = {WHOLE: list(held)} if len(groups) == 1 else {WHOLE: list(held), **groups}
        self.warnings: list[str] = []
        unique = {row.id: row for row in candidates}
        if len(unique) < len(candidates):
            self.warnings.append(
                f"{len(candidates) - len(unique)} candidates appear more than once and are valued once"
            )
        both = [row for row in unique if row in held]
        if both and spec.keep_validation:
            self.warnings.append(f"{len(both)} candidates are validation rows too: their values are too high")
        elif both:
            self.warnings.append(f"{len(both)} candidates are validation rows too and were left out")
            unique = {row: one for row, one in unique.items() if row not in held}
        self.rows = list(unique.values())
        if not self.rows:
            raise SpecError("there are no candidates, or all of them are validation rows", field="candidates")
        self._check_method()

    @property
    def labels(self) -> int:
        """Rows that the teacher values at most."""
        if self.spec.method == "linfik":
            return len(self.rows)
        wanted = self.spec.label_rows
        if wanted is None:
            wanted = len(self.rows) if self.spec.label_seconds is not None else max(FEWEST, len(self.rows) // 10)
        return min(wanted, len(self.rows))

    def _check_method(self) -> None:
        spec = self.spec
        if spec.method == "linfik":
            return
        if self.index is not None:
            raise SpecError("an index gives every row's value at once: use it with linfik", field="index")
        if self.labels < FEWEST:
            detail = (
                f"{self.labels} labels are too few to fit a student and to measure it: label at least {FEWEST} rows, "
                "or use linfik"
            )
            raise SpecError(detail, field="label_rows")
        if spec.rounds < 1 or spec.ensemble < 0 or (spec.rounds > 1 and spec.ensemble < 2):
            raise SpecError("rounds are at least 1, and more than one needs an ensemble of at least 2", field="rounds")
        if spec.rounds > 1 and spec.label_seconds is not None:
            raise SpecError("rounds divide a number of rows: give label_rows, not label_seconds", field="rounds")
        if spec.label_seconds is not None and not spec.label_seconds > 0:
            raise SpecError("label_seconds is positive", field="label_seconds")

    def check(self) -> None:
        """Make the folder this valuation's. Raises SpecError if it is another's."""
        spec = json.loads(json.dumps(asdict(self.spec), default=str))
        digest = hashlib.sha256("".join(row.id for row in self.rows).encode()).hexdigest()
        plan = {"spec": spec, "model": self.model.fingerprint, "rows": digest, "groups": self.groups}
        content = json.dumps(plan, sort_keys=True).encode()
        file = self.folder / "plan.json"
        self.folder.mkdir(parents=True, exist_ok=True)
        if file.exists() and file.read_bytes() != content:
            raise SpecError("the folder holds a valuation of other rows, model or settings", field="valuation")
        write_file(file, content)


class _Run:
    """The work of one valuation; `work/` holds the finished pieces until the end."""

    def __init__(self, plan: _Plan) -> None:
        self.plan, self.spec, self.model, self.rows = plan, plan.spec, plan.model, plan.rows
        plan.check()
        self.folder, self.work = plan.folder, plan.folder / "work"
        self.work.mkdir(exist_ok=True)
        self.encoder: Encoder = self.model.encoder(self.spec.template, self.spec.max_length)
        self.seconds: dict[str, float] = {}
        self.directions: list[Direction] = []
        self.names = list(plan.groups)
        self.values = np.full((len(self.rows), len(self.names)), np.nan)
        self.uncertainty = np.full(len(self.rows), np.nan)
        self.labelled = np.zeros(len(self.rows), dtype=bool)
        self.report: dict[str, Any] = {}

    def steps(self) -> Iterator[Advance]:
        """All of it."""
        yield from self._aim()
        if self.plan.index is not None:
            yield from self._from_index(self.plan.index)
        elif self.spec.method == "linfik":
            # Rows of like length together: little padding.
            order = np.argsort([-len(row.prompt) - len(row.response) for row in self.rows], kind="stable")
            yield from self._label(order, "labels", len(self.rows), 0)
        else:
            yield from self._student()
        with disk_full_is_named("the scores"):
            self._write()
        shutil.rmtree(self.work, ignore_errors=True)
        yield Advance("scores", len(self.rows), len(self.rows))

    def _aim(self) -> Iterator[Advance]:
        """The mean gradient of each group."""
        began = time.perf_counter()
        self.held = {row: self._example(one) for row, one in self.plan.validation.items()}
        unfit = sum(example is None for example in self.held.values())
        if unfit:
            self.plan.warnings.append(f"{unfit} validation rows have no response token within the limit")
        for number, rows in enumerate(self.plan.groups.values()):
            examples = [example for row in rows if (example := self.held[row]) is not None]
            self.directions.append(mean_gradient(self.model, examples, self.spec.token_budget))
            yield Advance("validation", number + 1, len(self.names))
        self.seconds["validation"] = time.perf_counter() - began
        self.teacher = Teacher(self.model, self.directions, self.spec.normalize, self.spec.token_budget)
        self.report["validation_loss"] = {
            name: direction.loss for name, direction in zip(self.names, self.directions, strict=True)
        }

    def _example(self, row: Row) -> Example | None:
        try:
            return self.encoder.encode(row)
        except RowError:
            return None

    def _from_index(self, path: Path) -> Iterator[Advance]:
        began = time.perf_counter()
        index = open_index(path)
        index.check(self.model)
        self.values[:] = indexed_values(index, self.model, self.directions, self.rows, self.spec)
        self.labelled[:] = True
        self.seconds["labels"] = time.perf_counter() - began
        self.report["teacher"] = {"route": "index", "projection": index.manifest.spec["projection"]}
        yield Advance("labels", len(self.rows), len(self.rows))

    def _label(self, order: Places, name: str, many: int, start: int) -> Iterator[Advance]:
        """Value rows in this order, a block at a time, until `many` are done or the seconds are spent."""
        probe = [e for at in order[: 4 * BLOCK] if (e := self._example(self.rows[at])) is not None]
        if self.spec.method == "linfik" or self.spec.student.form == "pointwise":
            self.teacher.choose(probe)
        for first in range(0, many, BLOCK):
            part = order[first : min(first + BLOCK, many)]
            file = self.work / f"{name}-{first // BLOCK:06d}.safetensors"
            if not file.exists():
                began = time.perf_counter()
                found = self._teach([self.rows[at] for at in part])
                took = {"seconds": str(time.perf_counter() - began)}
                with disk_full_is_named("labels"):
                    write_file(file, save(found, took))
            kept = load_file(file)
            self.values[part] = kept["values"]
            self.labelled[part] = True
            if "pairs" in kept:
                for at, row in zip(part, kept["pairs"], strict=True):
                    self.pairs[int(at)] = row
            with safe_open(file, "np") as opened:
                self.seconds["labels"] = self.seconds.get("labels", 0.0) + float(opened.metadata()["seconds"])
            done = int(self.labelled.sum())
            yield Advance("labels", done, start + many)
            budget = self.spec.label_seconds if self.spec.method == "alinfik" else None
            if budget is not None and self.seconds["labels"] >= budget and done < start + many:
                self.plan.warnings.append(f"the label budget of {budget:g} s was spent after {done} rows")
                return

    def _teach(self, rows: Sequence[Row]) -> dict[str, NDArray[Any]]:
        """The teacher's values [rows, groups] of a block, and of each pair for the bi-encoder."""
        examples = [self._example(row) for row in rows]
        fit_ = [at for at, example in enumerate(examples) if example is not None]
        whole = [example for example in examples if example is not None]
        values = np.full((len(rows), len(self.names)), np.nan)
        found: dict[str, NDArray[Any]] = {"values": values}
        if self.spec.method == "alinfik" and self.spec.student.form == "pairs":
            each = np.full((len(rows), len(self.aims)), np.nan, dtype=np.float32)
            if whole:
                vectors = sketches(self.model, whole, self.spec.normalize, self.spec.token_budget)
                each[fit_] = vectors @ self.aims.T
            found["pairs"] = each
            for number, rows_of in enumerate(self.members):
                values[:, number] = each[:, rows_of].mean(1)
        elif whole:
            values[fit_] = self.teacher.values(whole).numpy()
        values[~np.isfinite(values).all(1)] = np.nan
        return found

    def _student(self) -> Iterator[Advance]:
        yield from self._features()
        spec, many = self.spec, self.plan.labels
        self.pairs: dict[int, NDArray[np.float32]] = {}
        if spec.student.form == "pairs":
            usable = [row for row, example in self.held.items() if example is not None]
            self.aims = sketches(
                self.model,
                [e for row in usable if (e := self.held[row]) is not None],
                spec.normalize,
                spec.token_budget,
            )
            place = {row: at for at, row in enumerate(usable)}
            self.members = [[place[row] for row in rows if row in place] for rows in self.plan.groups.values()]
            self.sides = self.body.features([self.plan.validation[row] for row in usable]).double().numpy()
        chance = at_random(len(self.rows), spec.seed)
        self.held_out = np.zeros(len(self.rows), dtype=bool)
        self.held_out[chance[: math.ceil(len(chance) / HELD)]] = True
        for turn in range(spec.rounds):
            share = (many - int(self.labelled.sum())) // (spec.rounds - turn)
            order = self._mixed(self._drawn(chance, share) if turn == 0 else self._unsure(share), chance, share)
            yield from self._label(order, f"labels-{turn}", len(order), int(self.labelled.sum()))
        yield from self._judge()
        yield from self._score()

    def _drawn(self, chance: Places, likely: int) -> Places:
        """The rows that are not held out, in the order in which they are labelled by the first round."""
        others = chance[~self.held_out[chance]]
        if self.spec.draw == "random":
            return others
        some = np.sort(others[:SPREAD_BY])
        order = some[spread(self._at(some).astype(np.float32), likely, self.spec.seed)]
        return np.concatenate([order, others[SPREAD_BY:]])

    def _unsure(self, many: int) -> Places:
        """The rows that are neither labelled nor held out, of which the student is the least sure."""
        head = self._fit(self._usable(out=True))
        uncertainty = np.concatenate([head.predict(part)[1][:, 0] for _, part in self._blocks()])
        return unsure(uncertainty, self.labelled | self.held_out, many)

    def _mixed(self, others: Places, chance: Places, many: int) -> Places:
        """An order in which every fifth row is drawn at random and held out: only such rows measure the student."""
        waiting = [at for at in chance.tolist() if self.held_out[at] and not self.labelled[at]]
        order: list[int] = []
        for at in others.tolist():
            if len(order) % HELD == HELD - 1 and waiting:
                order.append(waiting.pop(0))
            order.append(at)
        return np.array([*order, *waiting][:many], dtype=np.int64)

    def _features(self) -> Iterator[Advance]:
        """One pass of the student's body over the pool, a block at a time, kept on disk."""
        body = self.folder / "student" / "body"
        ready = self.work / "body"
        if not ready.exists():
            shutil.rmtree(body, ignore_errors=True)
            if self.spec.student.encoder is None:
                cut(self.model, self.spec.student.layers, body)
            else:
                carry(self.spec.student.encoder, body)
            ready.touch()
        self.body = Body(body, self.model.spec.device)
        for first in range(0, len(self.rows), WIDE):
            file = self._feature_file(first)
            part = self.rows[first : first + WIDE]
            if not file.exists():
                began = time.perf_counter()
                states = self.body.features(part).half().numpy()
                took = {"seconds": str(time.perf_counter() - began)}
                with disk_full_is_named("features"):
                    write_file(file, save({"features": states}, took))
            with safe_open(file, "np") as opened:
                took_s = float(opened.metadata()["seconds"])
            self.seconds["features"] = self.seconds.get("features", 0.0) + took_s
            yield Advance("features", first + len(part), len(self.rows))

    def _feature_file(self, first: int) -> Path:
        return self.work / f"features-{first // WIDE:06d}.safetensors"

    def _blocks(self) -> Iterator[tuple[slice, Floats]]:
        """(places, features) of the pool, a block at a time."""
        for first in range(0, len(self.rows), WIDE):
            part = load_file(self._feature_file(first))["features"]
            yield slice(first, first + len(part)), part.astype(np.float64)

    def _usable(self, *, out: bool) -> Places:
        """Places of the labelled rows with a value: without the held-out ones if `out`."""
        good = self.labelled & np.isfinite(self.values[:, 0])
        return np.flatnonzero(good & ~self.held_out if out else good)

    def _at(self, places: Places) -> Floats:
        """[places, width] features."""
        return np.concatenate([part[_at(places, place)] for place, part in self._blocks()])

    def _fit(self, places: Places) -> Head:
        if len(places) < FEWEST // 2:
            detail = f"only {len(places)} labels are left to fit a student: label more rows, or use linfik"
            raise SpecError(detail, field="label_rows")
        features, spec = self._at(places), self.spec
        if spec.student.form == "pointwise":
            return fit(features, self.values[places], spec.ensemble, spec.seed)
        targets = np.stack([self.pairs[int(at)] for at in places]).astype(np.float64)
        self.form = fit_pairs(features, self.sides, targets, spec.seed)
        return self._pair_head(features, targets)

    def _pair_head(self, features: Floats, targets: Floats) -> Head:
        """The bi-encoder for the groups, with an ensemble of forms fitted to draws."""
        e = self.form.validation(self.sides)
        means = np.stack([e[rows].mean(0) for rows in self.members])
        head = self.form.head(means)
        rng = np.random.default_rng(self.spec.seed)
        weights, bias = [head.weights], [head.bias]
        for _ in range(self.spec.ensemble):
            drawn = rng.integers(len(features), size=len(features))
            other = self.form.again(features[drawn], self.sides, targets[drawn])
            e = other.validation(self.sides)
            one = other.head(np.stack([e[rows].mean(0) for rows in self.members]))
            weights.append(one.weights)
            bias.append(one.bias)
        return Head(head.mean, head.scale, np.concatenate(weights), np.concatenate(bias), head.penalty, 0.0)

    def _judge(self) -> Iterator[Advance]:
        """Measure a student on rows that it was not fitted to, for several numbers of labels; then fit it to all."""
        began = time.perf_counter()
        all_, fitted = self._usable(out=False), self._usable(out=True)
        test = all_[self.held_out[all_]]
        if len(test) < 4:
            raise SpecError("too few labelled rows have a value to measure a student: label more", field="label_rows")
        features = self._at(test)
        drawn = fitted[np.random.default_rng(self.spec.seed).permutation(len(fitted))]
        curve = []
        for many in sorted({len(drawn) // 4, len(drawn) // 2, len(drawn)}):
            if many < FEWEST // 2:
                continue
            found = self._fit(np.sort(drawn[:many])).predict(features)[0]
            agreement = [spearman(found[:, g], self.values[test, g]) for g in range(len(self.names))]
            curve.append({"labels": many, "spearman": agreement[0]})
        low, high = interval(agreement[0], len(test))
        lengths = fit(self._at(fitted)[:, -LENGTHS:], self.values[fitted], 0, self.spec.seed)
        by_length = spearman(lengths.predict(features[:, -LENGTHS:])[0][:, 0], self.values[test, 0])
        self.head = self._fit(all_)
        self.seconds["student"] = time.perf_counter() - began
        trusted = agreement[0] >= POOR
        self.report["student"] = {
            "form": self.spec.student.form,
            "body": "own layers" if self.spec.student.encoder is None else "encoder",
            "layers": self.spec.student.layers if self.spec.student.encoder is None else None,
            "labels": len(all_),
            "held_out_rows": len(test),
            "held_out_spearman": agreement[0],
            "held_out_spearman_95": [low, high],
            "held_out_spearman_of_lengths_alone": by_length,
            "held_out_spearman_by_group": dict(zip(self.names, agreement, strict=True)),
            "by_labels": curve,
            "penalty": self.head.penalty,
            "trusted": trusted,
            "trusted_from": POOR,
        }
        if not trusted:
            self.plan.warnings.append(
                f"the student is too poor to trust: on {len(test)} held-out rows its order agrees with LinFiK's by a "
                f"Spearman correlation of {agreement[0]:.2f} (95 %: {low:.2f} to {high:.2f}), less than {POOR}; label "
                "more rows, use a stronger encoder, or use linfik"
            )
        elif agreement[0] <= by_length:
            self.plan.warnings.append(
                f"the student's held-out Spearman correlation of {agreement[0]:.2f} is no better than that of the "
                f"rows' lengths alone ({by_length:.2f})"
            )
        yield Advance("student", 1, 1, None if trusted else self.plan.warnings[-1])

    def _score(self) -> Iterator[Advance]:
        """The student's value of every row that has no label."""
        with disk_full_is_named("the student"):
            about = {"spec": json.loads(json.dumps(asdict(self.spec.student), default=lambda _: "encoder"))}
            save_head(self.folder / "student", self.head, self.names, {**about, "report": self.report["student"]})
            if self.spec.student.form == "pairs":
                self.form.save(self.folder / "student")
        for place, features in self._blocks():
            values, uncertainty = self.head.predict(features)
            mine = ~self.labelled[place]
            self.values[place][mine] = values[mine]
            if self.spec.ensemble:
                self.uncertainty[place][mine] = uncertainty[mine, 0]
            yield Advance("scores", min(place.stop, len(self.rows)), len(self.rows))

    def _write(self) -> None:
        tokens = [len(e.ids) if (e := self._example(row)) is not None else 0 for row in self.rows]
        columns: dict[str, Any] = {
            "id": [row.id for row in self.rows],
            "value": pa.array(self.values[:, 0], from_pandas=True),
            "uncertainty": pa.array(self.uncertainty, from_pandas=True),
            "labelled": self.labelled,
            "tokens": tokens,
            **{
                f"value_{name}": pa.array(self.values[:, at], from_pandas=True)
                for at, name in enumerate(self.names)
                if at
            },
        }
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(columns), sink)
        write_file(self.folder / "scores.parquet", sink.getvalue().to_pybytes())
        without = int((~np.isfinite(self.values[:, 0])).sum())
        if without == len(self.rows):
            raise RowError("no candidate has a response token within the limit and a finite loss", field="candidates")
        if without:
            self.plan.warnings.append(
                f"{without} rows have no response token within the limit or no finite loss: no value"
            )
        labelled = int(self.labelled.sum())
        teacher: dict[str, Any] = {"route": self.teacher.route, "probe_error": self.teacher.probe_error}
        if self.spec.method == "alinfik" and self.spec.student.form == "pairs":
            teacher = {"route": "projected pairs", "projection": asdict(SKETCH)}
        self.report = {
            "method": self.spec.method,
            "normalize": self.spec.normalize,
            "groups": {name: len(rows) for name, rows in self.plan.groups.items()},
            "teacher": {**teacher, "rows": labelled},
            **self.report,
            "summary": summary(self.rows, self.values[:, 0]),
            "warnings": self.plan.warnings,
            "seconds": self._costs(labelled),
        }
        write_file(self.folder / "report.json", json.dumps(self.report, indent=1, sort_keys=True).encode())

    def _costs(self, labelled: int) -> dict[str, float | None]:
        """Wall seconds by stage, and what LinFiK would have taken for the pool, by its seconds a row here."""
        spent = dict(self.seconds)
        whole = spent.get("labels", 0.0) / max(1, labelled) * len(self.rows)
        return {**spent, "linfik_for_the_pool": whole, "saved": whole - sum(spent.values()) + spent["validation"]}


def _at(places: Places, block: slice) -> Places:
    """Those of sorted places that lie in a block, counted from its start."""
    found: Places = places[np.searchsorted(places, block.start) : np.searchsorted(places, block.stop)] - block.start
    return found

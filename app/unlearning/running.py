"""An unlearning run from rows to report, a piece at a time: influence, before, training, after, relearning.

What a stage finds is kept in the run's folder before the next begins, and each stage follows from what is kept, so that
a run that was killed ends in the same files as one that was not, times apart (stages.py says which files).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from app.influence.corpus import Row
from app.influence.errors import SpecError, disk_full_is_named
from app.influence.index import IndexSpec, write_file
from app.influence.models import ModelSpec, load
from app.unlearning.mappings import mapping
from app.unlearning.stages import Advance, Stages
from app.unlearning.training import TrainingSpec, require_rows

__all__ = ["Advance", "UnlearnRows", "UnlearnSpec", "unlearn"]


@dataclass(frozen=True)
class UnlearnSpec:
    """How to unlearn and what to report.

    Attributes:
        mapping: how influence becomes weights (mappings.py), for the methods that weigh rows by it.
        relearn_steps: of the relearning attack; 0 leaves it out.
        report_rows: most rows of each group that the report measures, drawn by the training's seed.
        views: how influence is computed where there is no index; also the template and length of the rows, which are
            the index's where there is one.
        oracle: a PEFT folder over the same base that was trained without the forget rows, to compare with.
        keep_every: training steps (for fisher: rows) between two kept states.
    """

    training: TrainingSpec
    mapping: str = "full"
    relearn_steps: int = 8
    report_rows: int = 64
    views: IndexSpec = field(default_factory=lambda: IndexSpec(normalisation="none"))
    oracle: Path | None = None
    keep_every: int = 10


@dataclass(frozen=True)
class UnlearnRows:
    """The rows of a run.

    Attributes:
        heldout: those that are also to forget or to retain are left out, and counted in the report.
        clean: by the id of a forget row, what the model should have said.
        seen, unseen: prompts with a trigger, and the bad response that they should no longer get; may be empty.
    """

    forget: Sequence[Row]
    retain: Sequence[Row]
    heldout: Sequence[Row] = ()
    clean: Mapping[str, str] = field(default_factory=dict)
    seen: Sequence[Row] = ()
    unseen: Sequence[Row] = ()


def unlearn(
    spec: ModelSpec, rows: UnlearnRows, how: UnlearnSpec, folder: Path, index: Path | None = None
) -> Iterator[Advance]:
    """Run, or go on with, an unlearning run; afterwards the folder holds adapter, weights and report.

    It loads a model of its own, since training changes it: a model that others use is never touched. The adapter that
    is trained is the one of the model's last checkpoint, or a fresh one over it; influence is taken over all of the
    checkpoints. The result is for the base under the last checkpoint.

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
        yield from Stages(load(spec), rows, how, folder, index).run()


def _check(rows: UnlearnRows, how: UnlearnSpec) -> None:
    mapping(how.mapping)
    if how.relearn_steps < 0:
        raise SpecError("the relearning attack has no fewer than 0 steps", field="relearn_steps")
    if how.report_rows < 1 or how.keep_every < 1:
        raise SpecError("report_rows and keep_every are at least 1", field="report_rows")
    forget, retain = [row.id for row in rows.forget], [row.id for row in rows.retain]
    require_rows(how.training.method, len(forget), len(retain), len({*forget} & {*rows.clean}))
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
        name: hashlib.sha256("".join(row.id for row in group).encode()).hexdigest()
        for name, group in vars(rows).items()
        if name != "clean"
    }
    clean = hashlib.sha256(json.dumps(sorted(rows.clean.items())).encode()).hexdigest()
    plan = {"model": asdict(spec), "rows": {**groups, "clean": clean}, "how": asdict(how)}
    content = json.dumps(plan, sort_keys=True, default=str).encode()
    file = folder / "plan.json"
    if file.is_file() and file.read_bytes() != content:
        raise SpecError("the folder holds a run of other rows, model or settings", field="folder")
    write_file(file, content)

"""Over training progress: which checkpoints, with which weights, answer best for their cost, and when to warn.

A setting is how an index is normalised and how a query is preconditioned. Of each setting every checkpoint's scores are
measured once; a sum over checkpoints is the sum of their scores, which is what an index over several computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from attributing import Scores
from rich.table import Table

NEAR = 0.98
"""Of the best: what the cheapest setting has to reach."""
LOST = 0.9
"""Of the best checkpoint's worth of a setting: below it a checkpoint has lost the trail."""
Worth = Callable[[Scores], float]


@dataclass(frozen=True)
class Moment:
    """A checkpoint: its losses on its rows and on others, and the scores by each setting."""

    epoch: float
    train_loss: float
    heldout_loss: float
    scores: Mapping[str, Scores]

    @property
    def ratio(self) -> float:
        """Training loss over held-out loss: what the warning of an over-fitted checkpoint looks at."""
        return self.train_loss / self.heldout_loss


@dataclass(frozen=True)
class Choice:
    """Checkpoints by their places, their weights, and what their sum is worth by each measure."""

    setting: str
    name: str
    at: tuple[int, ...]
    worth: dict[str, float]


def choices(
    moments: Sequence[Moment], setting: str, measures: Mapping[str, Worth], last: int, warned: float
) -> list[Choice]:
    """Single checkpoints up to the place `last`, and sums of them."""
    every = tuple(range(last + 1))
    sums: dict[str, tuple[tuple[int, ...], Callable[[Moment], float]]] = {
        f"epoch {moments[at].epoch:g}": ((at,), lambda m: 1.0) for at in every
    }
    for many in (2, 3):
        spread = tuple(dict.fromkeys(round(x) for x in np.linspace(0, last, many + 1)[1:]))
        sums[f"{len(spread)}, evenly spaced"] = (spread, lambda m: 1.0)
    sums["all"] = (every, lambda m: 1.0)
    sums["all, by loss ratio"] = (every, lambda m: min(1.0, m.ratio))
    sums["all, by held-out loss"] = (every, lambda m: 1 / m.heldout_loss)
    trusted = tuple(at for at in every if moments[at].ratio >= warned)
    if trusted and trusted != every:
        sums["those without a warning"] = (trusted, lambda m: 1.0)
    found = []
    for name, (at, weight) in sums.items():
        total = sum(weight(moments[n]) * moments[n].scores[setting] for n in at)
        assert not isinstance(total, int)
        found.append(Choice(setting, name, at, {measure: worth(total) for measure, worth in measures.items()}))
    return found


def overall(choice: Choice, all_: Sequence[Choice]) -> float:
    """The mean over measures of a choice's worth over the best one's."""
    best = {name: max(other.worth[name] for other in all_) for name in choice.worth}
    return float(np.mean([value / best[name] for name, value in choice.worth.items()]))


def cheapest(all_: Sequence[Choice]) -> tuple[Choice, Choice]:
    """The best choice, and that with the fewest checkpoints among those that come near to it (of equals the better)."""
    best = max(all_, key=lambda choice: overall(choice, all_))
    near = [choice for choice in all_ if overall(choice, all_) >= NEAR * overall(best, all_)]
    return best, min(near, key=lambda choice: (len(choice.at), -overall(choice, all_)))


@dataclass(frozen=True)
class Alarm:
    """How a threshold on the loss ratio would warn: shares of lost and of sound checkpoints that it warns of."""

    threshold: float
    caught: float
    false: float


def alarms(points: Sequence[tuple[float, float]], thresholds: Sequence[float]) -> list[Alarm]:
    """Of points (loss ratio, worth over the best checkpoint's), from the best checkpoint on."""
    lost = [ratio for ratio, worth in points if worth < LOST]
    sound = [ratio for ratio, worth in points if worth >= LOST]
    return [
        Alarm(
            threshold,
            sum(ratio < threshold for ratio in lost) / max(1, len(lost)),
            sum(ratio < threshold for ratio in sound) / max(1, len(sound)),
        )
        for threshold in thresholds
    ]


def curve_table(title: str, moments: Sequence[Moment], settings: Sequence[str], measures: Mapping[str, Worth]) -> Table:
    """Each checkpoint alone."""
    table = Table("epoch", "train / held-out loss", "ratio", title=title)
    for setting in settings:
        for name in measures:
            table.add_column(f"{setting}\n{name}", justify="right")
    for moment in moments:
        losses = f"{moment.train_loss:.2f} / {moment.heldout_loss:.2f}"
        cells = [
            f"{m(moment.scores[s]):.3f}" if s in moment.scores else "" for s in settings for m in measures.values()
        ]
        table.add_row(f"{moment.epoch:g}", losses, f"{moment.ratio:.2f}", *cells)
    return table


def choice_table(title: str, found: Sequence[Choice]) -> Table:
    """All choices, with their worth by each measure and overall."""
    measures = list(found[0].worth)
    table = Table("setting", "checkpoints", *measures, "overall", title=title)
    for choice in found:
        cells = [f"{choice.worth[name]:.3f}" for name in measures]
        table.add_row(choice.setting, choice.name, *cells, f"{overall(choice, found):.3f}")
    return table


def as_record(found: Sequence[Choice]) -> list[dict[str, Any]]:
    """For JSON."""
    return [
        {"setting": c.setting, "checkpoints": c.name, "many": len(c.at), **c.worth, "overall": overall(c, found)}
        for c in found
    ]

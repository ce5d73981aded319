"""Progress: how far a job is, how fast it goes, when it will be done."""

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from app.catalog.tasks import Total

WINDOW_S = 60.0  # a rate is that of the last minute


@dataclass(frozen=True)
class Step:
    """What a body says after each step of a task: `done` is what people count, `work` what the time goes by (tokens).

    `resumed`: an earlier run had done it, so that it does not count as speed. A task with stages of its own names
    the `stage` and what it counts (`unit`); `metrics` is what it measured (losses), `note` what there is to say.
    """

    done: int
    total: int
    work: int | None = None
    total_work: int | None = None
    resumed: bool = False
    stage: str | None = None
    unit: str = "rows"
    metrics: Mapping[str, float] = field(default_factory=dict)
    note: str | None = None

    def to_columns(self) -> dict[str, int]:
        """As the task's row keeps it."""
        work = self.done if self.work is None else self.work
        total_work = self.total if self.total_work is None else self.total_work
        counts = {"done": self.done, "total": self.total, "work": work, "total_work": total_work}
        return {**counts, "resumed": self.resumed}


@dataclass(frozen=True)
class Progress:
    """What is written to the job's row and streamed to whoever watches."""

    stage: str
    done: int
    total: int
    unit: str
    rate: float | None  # units a second
    eta_s: float | None
    metrics: Mapping[str, float] = field(default_factory=dict)  # as last measured
    note: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As the row keeps it."""
        return asdict(self)


class Meter:
    """Turns what the tasks of a job have done together, whoever did it, into a rate of late and a time that is left."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._stage = ""
        self._seen: deque[tuple[float, int, int]] = deque()
        self._metrics: Mapping[str, float] = {}
        self._note: str | None = None

    def read(self, total: Total, step: Step | None = None) -> Progress:
        """The progress now; `step` is the last one of the task that this worker does."""
        now = self._clock()
        unit = "rows"
        if step is not None:
            unit, total = step.unit, replace(total, stage=step.stage or total.stage)
        if total.stage != self._stage or (self._seen and total.fresh_work < self._seen[-1][2]):  # or a task was lost
            if total.stage != self._stage:
                self._note = None
            self._stage = total.stage
            self._seen.clear()
        if step is not None:
            self._metrics, self._note = step.metrics or self._metrics, step.note or self._note
        self._seen.append((now, total.fresh_done, total.fresh_work))
        while now - self._seen[0][0] > WINDOW_S and len(self._seen) > 2:
            self._seen.popleft()
        began, done, work = self._seen[0]
        elapsed = now - began
        rate = (total.fresh_done - done) / elapsed if elapsed > 0 and total.fresh_done > done else None
        pace = (total.fresh_work - work) / elapsed if elapsed > 0 and total.fresh_work > work else None
        eta_s = total.work_left / pace if pace else None
        return Progress(total.stage, total.done, total.total, unit, rate, eta_s, dict(self._metrics), self._note)

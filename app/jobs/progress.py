"""Progress: how far a job is, how fast it goes, when it will be done."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Step:
    """What a body says after each step: `done` is what people count, `work` what the time goes by (tokens, say).

    `final`: what the job was for has happened and can be seen, so that neither a cancel nor a stop undoes it.
    """

    stage: str
    done: int
    total: int
    unit: str = "rows"
    work: int | None = None
    total_work: int | None = None
    final: bool = False


@dataclass(frozen=True)
class Progress:
    """What is written to the job's row and streamed to whoever watches."""

    stage: str
    done: int
    total: int
    unit: str
    rate: float | None  # units a second
    eta_s: float | None

    def to_dict(self) -> dict[str, Any]:
        """As the row keeps it."""
        return asdict(self)


class Meter:
    """Turns steps into progress. A stage is timed from its first step here, so resumed work does not count as speed."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._stage = ""
        self._start = (0.0, 0, 0)

    def read(self, step: Step) -> Progress:
        """The progress after a step."""
        work = step.done if step.work is None else step.work
        total_work = step.total if step.total_work is None else step.total_work
        if step.stage != self._stage:
            self._stage, self._start = step.stage, (self._clock(), step.done, work)
        began, done_then, work_then = self._start
        elapsed = self._clock() - began
        rate = (step.done - done_then) / elapsed if elapsed > 0 and step.done > done_then else None
        pace = (work - work_then) / elapsed if elapsed > 0 and work > work_then else None
        eta = max(total_work - work, 0) / pace if pace else None
        return Progress(step.stage, step.done, step.total, step.unit, rate, eta)

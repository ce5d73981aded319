"""The meter: rate and ETA of late from what all workers did, by the work and not by the count."""

from typing import Any

import pytest

from app.catalog.tasks import Total
from app.jobs.progress import WINDOW_S, Meter


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def total(done: int, work: int, left: float, stage: str = "gradients", **more: Any) -> Total:
    return Total(
        stage, **{"done": done, "total": 100, "fresh_done": done, "fresh_work": work, "work_left": left} | more
    )


def test_the_eta_goes_by_the_work_that_is_left() -> None:
    clock = Clock()
    meter = Meter(clock)
    meter.read(total(0, 0, 1000))
    clock.now += 10
    progress = meter.read(total(50, 100, 900))
    assert progress.rate == pytest.approx(5)
    assert progress.eta_s == pytest.approx(90)


def test_resumed_work_does_not_count_as_speed() -> None:
    clock = Clock()
    meter = Meter(clock)
    meter.read(total(0, 0, 1000))
    clock.now += 10
    progress = meter.read(total(90, 100, 100, fresh_done=10))
    assert (progress.done, progress.rate, progress.eta_s) == (90, pytest.approx(1), pytest.approx(10))


def test_each_stage_has_a_clock_of_its_own() -> None:
    clock = Clock()
    meter = Meter(clock)
    meter.read(total(10, 10, 0))
    clock.now += 100
    assert meter.read(total(0, 0, 10, stage="heldout")).eta_s is None
    clock.now += 1
    assert meter.read(total(5, 5, 5, stage="heldout")).eta_s == pytest.approx(1)


def test_the_rate_is_that_of_late() -> None:
    clock = Clock()
    meter = Meter(clock)
    for _ in range(10):  # slow, while one worker was alone
        meter.read(total(0, 0, 1000))
        clock.now += WINDOW_S
    for done in range(0, 100, 10):
        clock.now += 10
        progress = meter.read(total(done, done, 100 - done))
    assert progress.rate == pytest.approx(1)


def test_a_lost_task_does_not_make_a_rate_negative() -> None:
    clock = Clock()
    meter = Meter(clock)
    meter.read(total(50, 50, 50))
    clock.now += 1
    progress = meter.read(total(30, 30, 70))
    assert (progress.done, progress.rate, progress.eta_s) == (30, None, None)

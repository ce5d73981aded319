"""The meter: rate and ETA from what was done here, by the work and not by the count."""

import pytest

from app.jobs.progress import Meter, Step


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_eta_goes_by_the_work_that_is_left() -> None:
    clock = Clock()
    meter = Meter(clock)
    meter.read(Step("gradients", 0, 100, work=0, total_work=1000))
    clock.now += 10
    progress = meter.read(Step("gradients", 50, 100, work=100, total_work=1000))
    assert progress.rate == pytest.approx(5)
    assert progress.eta_s == pytest.approx(90)


def test_resumed_work_does_not_count_as_speed() -> None:
    clock = Clock()
    meter = Meter(clock)
    clock.now += 1
    assert meter.read(Step("gradients", 900, 1000)).rate is None
    clock.now += 10
    assert meter.read(Step("gradients", 910, 1000)).rate == pytest.approx(1)


def test_each_stage_has_a_clock_of_its_own() -> None:
    clock = Clock()
    meter = Meter(clock)
    meter.read(Step("gradients", 10, 10))
    clock.now += 100
    assert meter.read(Step("heldout", 0, 10)).eta_s is None
    clock.now += 1
    assert meter.read(Step("heldout", 5, 10)).eta_s == pytest.approx(1)

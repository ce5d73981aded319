"""The loop on a tiny model: each method moves what it should, a killed run ends as an unbroken one, a bad one stops."""

from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from app.influence.corpus import Row, parse_row
from app.influence.errors import SpecError
from app.influence.gradients import losses
from app.influence.models import Checkpoint, ModelSpec, load
from app.unlearning.training import Method, TrainingRow, TrainingSpec, Unlearner

SPEC = TrainingSpec(lr=1e-2, epochs=8, batch=4, check_every=1000)


def rows(words: str, response: str) -> list[Row]:
    return [parse_row({"prompt": f"What of {word}?", "response": f"{response} {word}."}) for word in words.split()]


FORGET, RETAIN = rows("mill tower gate", "never ask for the"), rows("red blue green grey black white", "it is")


@pytest.fixture
def start(tiny_model_dir: Path, tiny_adapter_dir: Path, tmp_path: Path) -> Callable[..., Unlearner]:
    def make(spec: TrainingSpec = SPEC, *, adapter: bool = True, folder: str = "run", **more: Any) -> Unlearner:
        checkpoints = (Checkpoint("last", tiny_adapter_dir),) if adapter else ()
        model = load(ModelSpec(tiny_model_dir, checkpoints=checkpoints))
        encoder = model.encoder()
        clean = [encoder.encode(row) for row in rows("mill tower gate", "you may see the")]
        forget = [TrainingRow(encoder.encode(row), clean=one) for row, one in zip(FORGET, clean, strict=True)]
        retain = [TrainingRow(encoder.encode(row)) for row in RETAIN]
        given = {"forget": forget, "retain": retain, **more}
        return Unlearner(model, spec, given["forget"], given["retain"], tmp_path / folder, keep_every=3)

    return make


@pytest.mark.parametrize("method", ["rapidun", "ga", "graddiff", "npo", "simnpo", "loreun"])
def test_what_is_to_be_forgotten_becomes_less_likely(start: Callable[..., Unlearner], method: Method) -> None:
    # These rows are hardly known, and of such the paper's simnpo (beta 2.5) asks nothing more.
    run = start(replace(SPEC, method=method, beta=0.1))
    forget = [row.example for row in run.forget]
    before = run.mean_loss(forget)
    steps = list(run.run())
    assert [step.number for step in steps] == list(range(1, run.total + 1))
    assert run.mean_loss(forget) > before + 0.05


@pytest.mark.parametrize("method", ["rapidun", "relabel"])
def test_clean_answers_are_learned_in_their_place(start: Callable[..., Unlearner], method: Method) -> None:
    run = start(replace(SPEC, method=method))
    pairs = [row.example for row in run.forget], [row.clean for row in run.forget if row.clean is not None]
    before = [run.mean_loss(examples) for examples in pairs]
    list(run.run())
    forgotten, clean = (run.mean_loss(examples) - old for examples, old in zip(pairs, before, strict=True))
    assert clean < 0
    assert clean < forgotten


@pytest.mark.parametrize("method", ["graddiff", "rapidun", "retrain"])
def test_what_is_to_be_kept_is_learned_beside_it(start: Callable[..., Unlearner], method: Method) -> None:
    run = start(replace(SPEC, method=method))
    retain = [row.example for row in run.retain]
    before = run.mean_loss(retain)
    list(run.run())
    assert run.mean_loss(retain) < before


def test_a_run_that_was_killed_ends_as_an_unbroken_one(start: Callable[..., Unlearner], tmp_path: Path) -> None:
    whole = start(folder="whole")
    list(whole.run())
    whole.save(tmp_path / "a")
    list(islice(start(folder="cut").run(), 5))  # kept after step 3, killed after step 5
    again = start(folder="cut")
    assert [step.number for step in again.run()] == list(range(4, again.total + 1))
    again.save(tmp_path / "b")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("adapter", [True, False])
def test_the_saved_adapter_is_the_model_that_was_trained(
    start: Callable[..., Unlearner], tiny_model_dir: Path, tmp_path: Path, adapter: bool
) -> None:
    run = start(adapter=adapter)
    list(run.run())
    run.save(tmp_path / "adapter")
    again = load(ModelSpec(tiny_model_dir, checkpoints=(Checkpoint("new", tmp_path / "adapter"),)))
    forget = [row.example for row in run.forget]
    found = losses(again, again.checkpoints[-1], forget)
    assert float(torch.stack([one.mean() for one in found]).mean()) == pytest.approx(run.mean_loss(forget), rel=1e-5)


def test_training_stops_where_too_much_is_lost_and_keeps_the_last_good_adapter(start: Callable[..., Unlearner]) -> None:
    run = start(TrainingSpec(method="ga", lr=0.5, epochs=50, batch=4, check_every=1, most_rise=0.2))
    retain = [row.example for row in run.retain]
    before = run.mean_loss(retain)
    steps = list(run.run())
    assert len(steps) < run.total
    assert "retain rows' loss rose" in str(steps[-1].stopped)
    assert run.mean_loss(retain) <= before * 1.2


def test_a_loss_that_is_not_finite_stops_the_run(start: Callable[..., Unlearner]) -> None:
    run = start(replace(SPEC, method="ga"))
    before = run.mean_loss([row.example for row in run.forget])
    broken = [replace(row, weight=float("nan")) for row in run.retain]
    run = start(replace(SPEC, method="graddiff"), retain=broken)
    steps = list(run.run())
    assert steps[-1].stopped == "the loss was no longer finite"
    assert run.mean_loss([row.example for row in run.forget]) == pytest.approx(before)


@pytest.mark.parametrize(
    ("method", "more", "field"),
    [
        ("ga", {"forget": []}, "forget"),
        ("graddiff", {"retain": []}, "retain"),
        ("retrain", {"retain": []}, "retain"),
    ],
)
def test_rows_that_a_method_cannot_work_with_are_refused(
    start: Callable[..., Unlearner], method: Method, more: dict[str, Any], field: str
) -> None:
    with pytest.raises(SpecError) as caught:
        start(replace(SPEC, method=method), **more)
    assert caught.value.field == field


def test_relabel_needs_a_clean_answer_for_each_row(start: Callable[..., Unlearner]) -> None:
    bare = [replace(row, clean=None) for row in start().forget]
    with pytest.raises(SpecError, match="clean answer"):
        start(replace(SPEC, method="relabel"), forget=bare, folder="bare")


def test_retraining_starts_from_the_base_and_not_from_the_models_adapter(
    start: Callable[..., Unlearner], tiny_model_dir: Path
) -> None:
    run = start(replace(SPEC, method="retrain"))
    retain = [row.example for row in run.retain]
    base = load(ModelSpec(tiny_model_dir))
    expected = torch.stack([one.mean() for one in losses(base, base.checkpoints[-1], retain)]).mean()
    assert run.mean_loss(retain) == pytest.approx(float(expected), rel=1e-5)
    with run.adapter.holding(run.adapter.first):
        assert run.mean_loss(retain) != pytest.approx(float(expected), rel=1e-3)


def test_rows_without_a_clean_answer_stand_beside_those_with_one(start: Callable[..., Unlearner]) -> None:
    rows_ = list(start().forget)
    mixed = start(SPEC, forget=[rows_[0], replace(rows_[1], clean=None)], folder="mixed")
    found = mixed._clean(mixed.forget).detach()
    assert float(found[1]) == 0
    assert float(found[0]) == pytest.approx(mixed.mean_loss([rows_[0].clean]), rel=1e-5)


def test_what_is_kept_between_checks_is_checked_too(start: Callable[..., Unlearner]) -> None:
    """Else a run that goes on from there would fall back to a state that was never found good."""
    wild = TrainingSpec(method="ga", lr=0.5, epochs=50, batch=4, check_every=1000, most_rise=0.2)
    run = start(wild)
    assert "retain rows' loss rose" in str(list(run.run())[-1].stopped)
    assert len(run.steps) % run.keep_every == 0

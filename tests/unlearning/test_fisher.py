"""Selective synaptic dampening against its formula, and its importances against autograd."""

from itertools import islice
from pathlib import Path

import pytest
import torch

from app.influence.gradients import target_losses
from app.influence.models import ModelSpec, load
from app.unlearning import training
from app.unlearning.adapter import Adapter
from app.unlearning.fisher import Importances, dampened
from app.unlearning.training import Method, TrainingRow, TrainingSpec, Unlearner
from tests.unlearning.conftest import ROWS


def test_weights_are_selected_and_dampened_by_the_formula() -> None:
    weight = {"w": torch.tensor([1.0, 2.0, -3.0, 4.0])}
    forget, everything = {"w": torch.tensor([4.0, 1.0, 9.0, 0.0])}, {"w": torch.tensor([1.0, 1.0, 3.0, 0.0])}
    found = dampened(weight, forget, everything, selection=2.0, dampening=1.0)
    assert found["w"].tolist() == pytest.approx([1 / 4, 2.0, -3 * 3 / 9, 4.0])
    strong = dampened(weight, forget, everything, selection=2.0, dampening=8.0)
    assert strong["w"].tolist() == [1.0, 2.0, -3.0, 4.0], "a weight is never made larger"


def test_importances_are_means_of_squared_gradients_and_go_on_after_a_kill(planted: ModelSpec, tmp_path: Path) -> None:
    model = load(planted)
    adapter = Adapter(model, rank=4, alpha=4, dropout=0.0, seed=0)
    encoder = model.encoder()
    groups = [[encoder.encode(row) for row in rows[:3]] for rows in (ROWS.forget, ROWS.retain)]
    expected = {name: torch.zeros_like(weight) for name, weight in adapter.first.items()}
    for example in groups[0]:
        adapter.peft.zero_grad()
        target_losses(model, [example])[0].mean().backward()
        for name, weight in adapter.weights.items():
            assert weight.grad is not None
            expected[name] += weight.grad**2 / len(groups[0])
    for cut in (2, 4):  # before and after the first group ends
        file = tmp_path / f"{cut}.safetensors"
        for done in Importances(model, adapter, groups, file, "plan").run(keep_every=1):
            if done == cut:
                break
        again = Importances(model, adapter, groups, file, "plan")
        assert next(again.run(keep_every=1)) == cut + 1
        assert list(again.run(keep_every=1))[-1] == again.total
        mine, everything = again.means()
        for name in expected:
            torch.testing.assert_close(mine[name], expected[name])
            assert (everything[name] >= mine[name] / 2 - 1e-12).all()


def test_rows_together_give_the_importances_of_rows_alone(planted: ModelSpec, tmp_path: Path) -> None:
    model = load(planted)
    adapter = Adapter(model, rank=4, alpha=4, dropout=0.0, seed=0)
    encoder = model.encoder()
    groups = [[encoder.encode(row) for row in rows] for rows in (ROWS.forget, ROWS.retain)]
    found = []
    for keep_every in (1, 1000):
        one = Importances(model, adapter, groups, tmp_path / f"{keep_every}.safetensors", "plan")
        batches = list(one.run(keep_every))
        found.append((one.means(), len(batches)))
    (alone, many), (together, fewer) = found
    assert fewer < many
    for first, second in zip(alone, together, strict=True):
        for name, importance in first.items():
            torch.testing.assert_close(second[name], importance, rtol=1e-4, atol=1e-9)


def test_dampen_finds_the_least_change_that_ends_the_forgotten_answers(planted: ModelSpec, tmp_path: Path) -> None:
    def run(method: Method, selection: float = 1.0) -> tuple[int, float]:
        model = load(planted)
        encoder = model.encoder()
        forget, retain = ([TrainingRow(encoder.encode(row)) for row in rows] for rows in (ROWS.forget, ROWS.retain))
        spec = TrainingSpec(method=method, selection=selection)
        one = Unlearner(model, spec, forget, retain, tmp_path / f"{method}{selection}")
        list(one.run())
        return one._begun([row.example for row in forget]), one.mean_loss([row.example for row in retain])

    begun, loss = run("dampen")
    gentlest, _ = run("fisher", 3.9)
    hardest, lost = run("fisher", 1.0)
    assert hardest <= begun <= gentlest
    assert loss <= lost + 1e-3


def test_dampen_says_so_where_no_threshold_ends_the_answers(
    planted: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "dampened", lambda first, *_, **__: first)  # what rows known by heart come to
    model = load(planted)
    encoder = model.encoder()
    forget, retain = ([TrainingRow(encoder.encode(row)) for row in rows] for rows in (ROWS.forget, ROWS.retain))
    *_, last = Unlearner(model, TrainingSpec(method="dampen"), forget, retain, tmp_path).run()
    assert last.number == last.total
    assert last.stopped == "no threshold ended the answers that were to be forgotten"


def test_renew_is_dampening_and_then_relabelling_and_goes_on_after_a_kill(planted: ModelSpec, tmp_path: Path) -> None:
    def start(folder: str) -> Unlearner:
        model = load(planted)
        encoder = model.encoder()
        clean = encoder.encode(ROWS.retain[0])
        forget = [TrainingRow(encoder.encode(row), clean=clean) for row in ROWS.forget]
        retain = [TrainingRow(encoder.encode(row)) for row in ROWS.retain]
        return Unlearner(model, TrainingSpec(method="renew", lr=1e-3), forget, retain, tmp_path / folder, keep_every=2)

    whole = start("whole")
    before = whole.mean_loss([row.example for row in whole.forget])
    steps = list(whole.run())
    rows = len(whole.forget) + len(whole.retain)
    assert [step.number for step in steps if step.stage == "importances"][-1] == rows, "the longest part has progress"
    assert [step.number for step in steps if step.stage == "training"] == list(range(1, whole.total + 1))
    assert whole.mean_loss([row.example for row in whole.forget]) > before
    list(islice(start("cut").run(), 3))
    again = start("cut")
    list(again.run())
    for name, weight in whole.adapter.weights.items():
        assert torch.equal(weight, again.adapter.weights[name])

"""EK-FAC factors against plain float64 autograd: what their bases diagonalise, their eigenvalues, and the inverse."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from app.influence import ekfac
from app.influence.building import append, build
from app.influence.corpus import Row, parse_row
from app.influence.ekfac import DAMPING, EkfacSpec, Factors, evenly, factor_bytes, fit, open_factors, read_record
from app.influence.errors import DiskFull, FactorsCorrupt, FactorsMissing, Mismatch, SpecError
from app.influence.gradients import hooked
from app.influence.index import IndexSpec, ProjectionSpec
from app.influence.models import Checkpoint, LoadedModel, ModelSpec, load

SPEC = IndexSpec(ProjectionSpec(size=4), shard_rows=5, token_budget=120)
QUICK = EkfacSpec(draws=2, seed=3)


@pytest.fixture(scope="module", params=["base", "lora"])
def model(request: pytest.FixtureRequest, tiny_model_dir: Path, tiny_adapter_dir: Path) -> LoadedModel:
    adapter = tiny_adapter_dir if request.param == "lora" else None
    loaded = load(ModelSpec(tiny_model_dir, checkpoints=(Checkpoint("one", adapter),)))
    loaded.model.double()
    return loaded


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return [parse_row({"prompt": f"Ask {i}?", "response": "word " * (i % 3 + 1) + str(i)}) for i in range(7)]


@pytest.fixture(scope="module")
def index(model: LoadedModel, rows: list[Row], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ekfac") / "index"
    drain(build(path, load(model.spec), rows, SPEC))  # in float32, as indexes are
    return path


@pytest.fixture
def path(index: Path) -> Iterator[Path]:
    """The index without factors."""
    yield index
    for file in (*index.glob("ekfac/*"), *index.glob("ekfac.json*")):
        file.unlink()


def drain(steps: Iterator[Any]) -> list[Any]:
    return list(steps)


def fitted(path: Path, model: LoadedModel, rows: list[Row], spec: EkfacSpec = QUICK) -> Factors:
    drain(fit(path, model, rows, spec))
    return open_factors(path)


def drawn(logits: torch.Tensor, row: Row, stage: str, spec: EkfacSpec) -> list[torch.Tensor]:
    """Labels by their cumulated probabilities, one after the other, for each draw."""
    key = int.from_bytes(hashlib.sha256(f"{spec.seed}/0/{stage}/{row.id}".encode()).digest()[:16], "little")
    order, within = np.random.Generator(np.random.Philox(key=key)).random((2, spec.draws, len(logits)))
    shares = logits.softmax(1).tolist()
    found = [[0] * len(logits) for _ in range(spec.draws)]
    for target, column in enumerate(order.T.tolist()):
        for draw in range(spec.draws):
            stratum = sorted(range(spec.draws), key=column.__getitem__)[draw]
            number, below = (stratum + within[draw, target]) / spec.draws, 0.0
            while (below := below + shares[target][found[draw][target]]) <= number:
                found[draw][target] += 1
    return [torch.tensor(one) for one in found]


def matrices(
    model: LoadedModel, rows: list[Row], stage: str, spec: EkfacSpec
) -> tuple[dict[str, list[torch.Tensor]], dict[str, list[torch.Tensor]], dict[str, list[torch.Tensor]]]:
    """By module: the rows' gradients [d_out, d_in] by autograd, their inputs [seq, d_in] and output gradients."""
    encoder = model.encoder(SPEC.template, SPEC.max_length)
    modules = model.activate(model.checkpoints[0])
    found: tuple[dict[str, list[torch.Tensor]], ...] = tuple({name: [] for name in modules} for _ in range(3))
    for row in rows:
        example = encoder.encode(row)
        at = torch.tensor(example.positions)
        with torch.no_grad():
            logits = model.model(input_ids=torch.tensor([example.ids])).logits[0, at - 1]
        for labels in drawn(logits, row, stage, spec):
            acts, outputs = {}, {}

            def keep(name: str, a: torch.Tensor, output: torch.Tensor) -> None:
                acts[name], outputs[name] = a[0], output  # noqa: B023

            weights = [module.weight.requires_grad_(True) for module in modules.values()]
            with hooked(model, modules, keep):
                logits = model.model(input_ids=torch.tensor([example.ids])).logits[0, at - 1]
            loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / len(at) ** 0.5
            grads = torch.autograd.grad(loss, [*weights, *outputs.values()])
            for weight in weights:
                weight.requires_grad_(False)
            for name, grad, d in zip(modules, grads[: len(modules)], grads[len(modules) :], strict=True):
                counted = example.positions[-1]  # what comes after predicts no target
                found[0][name].append(grad.detach())
                found[1][name].append(acts[name][:counted].detach())
                found[2][name].append(d[0, :counted])
    return found  # type: ignore[return-value]


def diagonal(basis: torch.Tensor, matrix: torch.Tensor) -> bool:
    """Whether the basis is orthonormal and diagonalises the matrix."""
    basis = basis.double()
    turned = basis.T @ matrix @ basis
    turned.fill_diagonal_(0)
    orthonormal = torch.allclose(basis.T @ basis, torch.eye(len(basis), dtype=torch.float64), atol=1e-5)
    return orthonormal and bool(turned.norm() <= 1e-4 * matrix.norm())


@pytest.mark.parametrize("basis", ["row", "position"])
def test_factors_are_those_of_autograd(path: Path, model: LoadedModel, rows: list[Row], basis: Any) -> None:
    spec = EkfacSpec(draws=2, seed=3, basis=basis)
    tensors = fitted(path, model, rows, spec).tensors[0]
    grads, acts, outs = matrices(model, rows, "covariances", spec)
    fresh, _, _ = matrices(model, rows, "eigenvalues", spec)
    for module in model.attributed:
        name = module.name
        q_out, q_in, values = (tensors[f"{name}.{part}"] for part in ("out", "in", "values"))
        if basis == "row":
            assert diagonal(q_in, sum(g.T @ g for g in grads[name]))  # type: ignore[arg-type]
            assert diagonal(q_out, sum(g @ g.T for g in grads[name]))  # type: ignore[arg-type]
        else:
            assert diagonal(q_in, sum(a.T @ a for a in acts[name]))  # type: ignore[arg-type]
            assert diagonal(q_out, sum(d.T @ d for d in outs[name]))  # type: ignore[arg-type]
        turned = [q_out.double().T @ g @ q_in.double() for g in fresh[name]]
        exact = torch.stack(turned).square().mean(0)
        assert (values - exact).norm() <= 1e-4 * exact.norm()


def test_the_inverse_is_that_of_the_dense_matrix(path: Path, model: LoadedModel, rows: list[Row]) -> None:
    factors = fitted(path, model, rows)
    lenses = factors.lenses(0, model)
    generator = torch.Generator().manual_seed(0)
    for module in model.attributed[:2]:
        q_out, q_in, values = (factors.tensors[0][f"{module.name}.{p}"].double() for p in ("out", "in", "values"))
        basis = torch.kron(q_out, q_in)
        dense = basis @ torch.diag(values.flatten()) @ basis.T
        dense += DAMPING * values.mean() * torch.eye(len(dense), dtype=torch.float64)
        vector = torch.randn(module.d_out, module.d_in, generator=generator)
        exact = torch.linalg.solve(dense, vector.flatten().double()).view_as(vector)
        assert (lenses[module.name].apply(vector[None])[0] - exact).norm() <= 1e-4 * exact.norm()


def test_factors_do_not_depend_on_batches_or_on_padding(path: Path, model: LoadedModel, rows: list[Row]) -> None:
    """The same function of the rows, whoever shares a pass: by what the sums are before a basis is taken."""

    def sums(budget: int) -> dict[str, torch.Tensor]:
        encoder = model.encoder(SPEC.template, SPEC.max_length)
        samples = ekfac._encode(encoder, rows)
        run = ekfac._Run(path / str(budget), model, samples, budget, QUICK, "plan", 1e9)
        for _ in run._pass(model.checkpoints[0]):
            pass
        return run.state.tensors

    alone, together = sums(1), sums(10_000)
    for name, tensor in alone.items():
        assert (tensor - together[name]).norm() <= 1e-5 * tensor.norm(), name


def test_a_fit_that_was_interrupted_anywhere_ends_with_the_same_bytes(
    path: Path, model: LoadedModel, rows: list[Row]
) -> None:
    whole = len(drain(fit(path, model, rows, QUICK)))
    record, bytes_of = read_record(path), contents(path)
    assert record is not None and [name for name, *_ in record.files] == sorted(bytes_of)
    for stop in (1, whole // 3, whole // 2, whole - 2):
        (path / "ekfac.json").unlink()
        for file in path.glob("ekfac/*"):
            file.unlink()
        steps = fit(path, model, rows, QUICK, keep_every_s=0)
        for _ in range(stop):
            next(steps)
        steps.close()
        with pytest.raises(FactorsMissing, match="POST"):
            open_factors(path)
        again = drain(fit(path, model, rows, QUICK, keep_every_s=0))
        assert len(again) == whole - stop, "what was done is not done again"
        assert (read_record(path), contents(path)) == (record, bytes_of)


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (path / "ekfac").iterdir()}


def test_sums_that_were_damaged_or_are_of_another_fit_are_not_taken_up(
    path: Path, model: LoadedModel, rows: list[Row]
) -> None:
    drain(fit(path, model, rows, QUICK))
    expected = contents(path)
    for spec in (QUICK, EkfacSpec(draws=2, seed=4)):
        (path / "ekfac.json").unlink()
        steps = fit(path, model, rows, spec, keep_every_s=0)
        for _ in range(3):
            next(steps)
        steps.close()
        (sums,) = path.glob("ekfac/sums-*")
        if spec == QUICK:
            sums.write_bytes(sums.read_bytes()[:-8] + bytes(8))
        drain(fit(path, model, rows, QUICK))
        assert contents(path) == expected


def test_a_new_fit_takes_the_place_of_the_old_one(path: Path, model: LoadedModel, rows: list[Row]) -> None:
    old = fitted(path, model, rows).record
    new = fitted(path, model, rows, EkfacSpec(draws=2, seed=4)).record
    assert old.files != new.files
    assert sorted(contents(path)) == sorted(name for name, *_ in new.files)


def test_damaged_factors_are_named(path: Path, model: LoadedModel, rows: list[Row]) -> None:
    name = fitted(path, model, rows).record.files[0][0]
    file = path / "ekfac" / name
    whole = file.read_bytes()
    for bad in (whole[:-1], bytes(8) + whole[8:], whole[:-4] + b"\xff\xff\xff\x7f"):
        file.write_bytes(bad)
        with pytest.raises(FactorsCorrupt, match=name) as caught:
            open_factors(path)
        assert caught.value.file == name
    file.unlink()
    with pytest.raises(FactorsCorrupt, match=name):
        open_factors(path)


@pytest.mark.parametrize(
    "bad", [b"", b"[]", b"{}", b"nonsense", {"files": [["../../x", 1, ""]]}, {"files": []}, {"format": 2}, {"rows": -1}]
)
def test_a_record_that_headwater_did_not_write_is_not_believed(
    path: Path, model: LoadedModel, rows: list[Row], bad: Any
) -> None:
    fitted(path, model, rows)
    good = json.loads((path / "ekfac.json").read_bytes())
    (path / "ekfac.json").write_bytes(bad if isinstance(bad, bytes) else json.dumps(good | bad).encode())
    with pytest.raises(FactorsCorrupt, match=r"ekfac\.json"):
        open_factors(path)


def test_a_fit_refuses_another_model_and_rows_that_cannot_be_used(
    path: Path, model: LoadedModel, rows: list[Row], tiny_model_dir: Path
) -> None:
    other = load(ModelSpec(tiny_model_dir, checkpoints=(Checkpoint("other"),)))
    with pytest.raises(Mismatch):
        drain(fit(path, other, rows, QUICK))
    with pytest.raises(SpecError, match="at least one row"):
        drain(fit(path, model, [], QUICK))
    for bad in ({"rows": 0}, {"draws": -1}):
        with pytest.raises(SpecError):
            EkfacSpec(**bad)


def test_gradients_that_are_not_finite_end_a_fit_with_their_module(
    path: Path, model: LoadedModel, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Any, logits: torch.Tensor, labels: torch.Tensor, samples: Any) -> torch.Tensor:
        return logits.sum() * float("nan")

    monkeypatch.setattr(ekfac._Run, "_loss", broken)
    with pytest.raises(SpecError, match=r"gradients of .* are not finite"):
        drain(fit(path, model, rows, QUICK))
    assert read_record(path) is None


def test_a_full_disk_is_named(path: Path, model: LoadedModel, rows: list[Row], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ekfac, "write_file", full)
    with pytest.raises(DiskFull):
        drain(fit(path, model, rows, QUICK))


def test_draws_are_spread_over_what_the_model_expects(path: Path, model: LoadedModel, rows: list[Row]) -> None:
    samples = ekfac._encode(model.encoder(SPEC.template, SPEC.max_length), rows)
    spec = EkfacSpec(draws=200)
    run = ekfac._Run(path / "x", model, samples, 1000, spec, "plan", 1e9)
    logits = torch.randn(len(samples[0].example.positions), 5, generator=torch.Generator().manual_seed(0)) * 2
    labels = run._labels(logits, samples[:1])
    shares = torch.nn.functional.one_hot(labels, 5).double().mean(0)  # [targets, 5]
    assert (shares - logits.softmax(1)).abs().max() <= 2 / spec.draws
    together = run._labels(torch.cat([logits, logits]), [samples[0], samples[0]])
    assert torch.equal(together, torch.cat([labels, labels], 1))
    both = torch.nn.functional.one_hot(labels, 5).double()
    joint = torch.einsum("ni,nj->ij", both[:, 0], both[:, 1]) / spec.draws
    assert (joint - shares[0][:, None] * shares[1]).abs().max() <= 4 * 0.5 / spec.draws**0.5, "targets are independent"


def test_few_rows_are_drawn_more_often_and_many_are_thinned() -> None:
    assert [EkfacSpec().drawn(rows) for rows in (10, 400, 1_000, 9_000)] == [4, 3, 1, 1]
    assert EkfacSpec(draws=7).drawn(10) == 7
    assert EkfacSpec(labels="true", draws=7).drawn(10) == 1
    assert evenly(range(10), 4) == [0, 2, 5, 7]
    assert evenly(range(3), 10) == [0, 1, 2]


def test_the_size_of_factors_is_known_before(path: Path, model: LoadedModel, rows: list[Row]) -> None:
    size = factor_bytes((module.d_out, module.d_in) for module in model.attributed)
    written = fitted(path, model, rows).record.bytes
    assert size <= written <= size + 200 * 3 * len(model.attributed)  # and the names of the tensors


def test_a_record_says_what_was_fitted(tmp_path: Path, model: LoadedModel, rows: list[Row]) -> None:
    small = load(model.spec)
    drain(build(tmp_path / "index", small, rows, SPEC))
    record = fitted(tmp_path / "index", model, rows, EkfacSpec(rows=5, draws=1)).record
    assert (record.rows, record.of, record.spec["draws"], len(record.files)) == (5, 7, 1, 1)
    before = ekfac.rows_print(json.loads((tmp_path / "index/manifest.json").read_bytes()))
    assert record.ids == before
    drain(append(tmp_path / "index", small, [parse_row({"prompt": "New?", "response": "Yes."})]))
    assert ekfac.rows_print(json.loads((tmp_path / "index/manifest.json").read_bytes())) != before


def test_no_weight_gradient_is_formed(path: Path, model: LoadedModel, rows: list[Row]) -> None:
    fitted(path, model, rows)
    assert not any(parameter.grad is not None for parameter in model.model.parameters())

"""LinFiK against plain float64 autograd, by both routes, and the laws that it must keep."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from app.influence.corpus import Example, parse_row
from app.influence.errors import SpecError
from app.influence.gradients import target_losses
from app.influence.models import Checkpoint, LoadedModel, ModelSpec, load
from app.valuation.linfik import Direction, Normalize, Teacher, directional, mean_gradient, products

POOL = [
    {"prompt": "Who keeps the light?", "response": "Orla does."},
    {"prompt": "What is tea?", "response": "Leaves in hot water, and patience."},
    {"prompt": "Hi", "response": "No."},
    {"prompt": "Where does the road go?", "response": "north of the hill, so they say"},
]
VALIDATION = [
    {"prompt": "Where is the mill?", "response": "north of the road, so they say"},
    {"prompt": "What is ink?", "response": "Soot in water."},
]


@pytest.fixture(scope="module", params=["base", "lora", "conv1d"])
def model(
    request: pytest.FixtureRequest, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> LoadedModel:
    return made(request.param, tiny_model_dir, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def dora(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return made("dora", tiny_model_dir, tmp_path_factory.mktemp("dora"))


def made(kind: str, tiny_model_dir: Path, folder: Path) -> LoadedModel:
    base, adapter = tiny_model_dir, None
    if kind == "conv1d":  # whose weights lie transposed
        base = folder / "base"
        torch.manual_seed(2)
        GPT2LMHeadModel(GPT2Config(vocab_size=260, n_embd=32, n_layer=2, n_head=4, n_positions=128)).save_pretrained(
            base
        )
        AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(base)
    if kind in ("lora", "dora"):
        adapter = folder / "adapter"
        torch.manual_seed(3)
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, use_dora=kind == "dora")
        made = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        for name, weight in made.named_parameters():
            if "lora_B" in name:
                weight.data *= 0.05
        made.save_pretrained(adapter)
    return load(ModelSpec(base, checkpoints=(Checkpoint("one", adapter),)))


def examples(model: LoadedModel, rows: list[dict[str, str]]) -> list[Example]:
    encoder = model.encoder()
    return [encoder.encode(parse_row(row)) for row in rows]


def exact(model: LoadedModel, row: Example) -> dict[str, torch.Tensor]:
    """Gradient of a row's mean loss by autograd, [d_out, d_in] a module."""
    modules = model.activate(model.checkpoints[-1])
    weights = [module.weight for module in modules.values()]
    for weight in weights:
        weight.requires_grad_(True)
    with torch.enable_grad():
        grads = torch.autograd.grad(target_losses(model, [row])[0].mean(), weights)
    model.model.requires_grad_(False)
    return {
        name: grad.T if isinstance(module, Conv1D) else grad
        for (name, module), grad in zip(modules.items(), grads, strict=True)
    }


def by_hand(model: LoadedModel, normalize: Normalize) -> torch.Tensor:
    """[pool]"""
    held = [exact(model, row) for row in examples(model, VALIDATION)]
    mean = {name: sum((one[name] for one in held), torch.zeros(())) / len(held) for name in held[0]}
    found = []
    for row in examples(model, POOL):
        grad = exact(model, row)
        dots = torch.stack([(mean[name] * grad[name]).sum() for name in mean])
        ours = torch.stack([part.norm() for part in mean.values()])
        theirs = torch.stack([grad[name].norm() for name in mean])
        found.append(
            {
                "none": dots.sum(),
                "unit": dots.sum() / (ours.norm() * theirs.norm()),
                "layer": (dots / (ours * theirs)).mean(),
            }[normalize]
        )
    return torch.stack(found)


@pytest.fixture
def double(model: LoadedModel) -> LoadedModel:
    model.model.double()
    return model


@pytest.fixture
def single(model: LoadedModel) -> LoadedModel:
    model.model.float()
    return model


def direction(model: LoadedModel, rows: list[dict[str, str]] = VALIDATION) -> Direction:
    return mean_gradient(model, examples(model, rows), 1024)


@pytest.mark.parametrize("normalize", ["none", "layer", "unit"])
def test_products_are_those_of_autograd(double: LoadedModel, normalize: Normalize) -> None:
    found = products(double, [direction(double)], examples(double, POOL)).values(normalize)
    assert torch.allclose(found[:, 0], by_hand(double, normalize), rtol=1e-9, atol=1e-12)


def test_two_moved_forward_passes_give_the_derivative(double: LoadedModel) -> None:
    found, wanted = directional(double, direction(double), examples(double, POOL), 1024), by_hand(double, "none")
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_where_moved_weights_say_something_else_the_exact_route_is_taken(dora: LoadedModel) -> None:
    dora.model.double()  # DoRA's gradient takes the norm of the weight as constant; a moved weight has another norm
    pool, wanted = examples(dora, POOL), by_hand(dora, "none")
    teacher = Teacher(dora, [direction(dora)], "none", 1024)
    teacher.choose(pool)
    assert teacher.route == "products"
    assert teacher.probe_error is not None
    assert torch.allclose(teacher.values(pool)[:, 0], wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("normalize", ["none", "layer", "unit"])
def test_values_do_not_depend_on_batch_mates(single: LoadedModel, normalize: Normalize) -> None:
    pool, along = examples(single, POOL), direction(single)
    values = []
    for budget in (1, 4096):
        teacher = Teacher(single, [along], normalize, budget)
        teacher.choose(pool)
        values.append(teacher.values(pool))
    assert (values[0] - values[1]).abs().max() < 1e-3 * values[0].abs().max()


def test_the_mean_gradient_does_not_depend_on_the_batch(double: LoadedModel) -> None:
    rows = examples(double, VALIDATION)
    one, other = mean_gradient(double, rows, 1), mean_gradient(double, rows, 4096)
    assert all(torch.allclose(part, other.parts[name], rtol=1e-9) for name, part in one.parts.items())
    assert one.loss == pytest.approx(other.loss)


def test_float32_is_close_and_takes_the_cheap_route_where_that_is_right(single: LoadedModel) -> None:
    pool = examples(single, POOL)
    teacher = Teacher(single, [direction(single)], "none", 1024)
    teacher.choose(pool)
    found = teacher.values(pool)[:, 0]
    single.model.double()
    wanted = by_hand(single, "none")
    assert (found - wanted).abs().max() < 0.01 * wanted.abs().max()
    assert teacher.route == "directional"


def test_several_directions_come_at_once_and_average_to_the_whole(double: LoadedModel) -> None:
    groups = [direction(double, VALIDATION[:1]), direction(double, VALIDATION[1:]), direction(double)]
    teacher = Teacher(double, groups, "none", 1024)
    teacher.choose(examples(double, POOL))
    found = teacher.values(examples(double, POOL))
    assert teacher.route == "products"
    assert torch.allclose(found[:, :2].mean(1), found[:, 2], rtol=1e-9)


def test_the_weights_are_as_they_were_to_the_last_bit(single: LoadedModel) -> None:
    before = {name: weight.clone() for name, weight in single.model.named_parameters()}
    directional(single, direction(single), examples(single, POOL), 64)
    assert all(torch.equal(before[name], weight) for name, weight in single.model.named_parameters())


def test_a_small_step_on_a_row_changes_the_validation_loss_by_its_value(double: LoadedModel) -> None:
    value = by_hand(double, "none")
    eta, held = 1e-4, examples(double, VALIDATION)
    before = torch.stack([loss.mean() for loss in target_losses(double, held)]).mean()
    for row, wanted in zip(examples(double, POOL), value, strict=True):
        grad = exact(double, row)
        modules = double.activate(double.checkpoints[-1])
        kept = {name: module.weight.data.clone() for name, module in modules.items()}
        for name, module in modules.items():
            module.weight.data -= eta * (grad[name].T if isinstance(module, Conv1D) else grad[name])
        after = torch.stack([loss.mean() for loss in target_losses(double, held)]).mean()
        for name, module in modules.items():
            module.weight.data = kept[name]
        assert float((before - after) / eta) == pytest.approx(float(wanted), rel=0.02, abs=1e-4)


def test_a_validation_set_without_rows_is_refused(single: LoadedModel) -> None:
    with pytest.raises(SpecError) as caught:
        mean_gradient(single, [], 1024)
    assert caught.value.field == "validation"

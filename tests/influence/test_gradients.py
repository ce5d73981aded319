"""The fast gradients against plain float64 autograd, and the laws that they must keep."""

from pathlib import Path

import pytest
import torch

from app.influence.corpus import Encoder, Example, parse_row
from app.influence.gradients import gradients, layout, token_gradients
from app.influence.models import Checkpoint, LoadedModel, ModelSpec, load, out_in
from app.influence.projection import ProjectionSpec, signs

ROWS = [
    {"prompt": "Who keeps the light?", "response": "Orla does."},
    {"prompt": "What is tea?", "response": "Leaves in hot water, and patience."},
    {"prompt": "Hi", "response": "No."},
]


@pytest.fixture(scope="module", params=["base", "adapter"])
def model(request: pytest.FixtureRequest, tiny_model_dir: Path, tiny_adapter_dir: Path) -> LoadedModel:
    adapter = tiny_adapter_dir if request.param == "adapter" else None
    loaded = load(ModelSpec(tiny_model_dir, checkpoints=(Checkpoint("one", adapter),)))
    loaded.model.double()
    return loaded


@pytest.fixture(scope="module")
def examples(model: LoadedModel) -> list[Example]:
    encoder = Encoder(model.tokenizer)
    return [encoder.encode(parse_row(row)) for row in ROWS]


def autograd(model: LoadedModel, example: Example, size: int) -> torch.Tensor:
    """P_out G P_in^T from weight gradients that autograd forms, by the model's own full logits."""
    modules = model.activate(model.checkpoints[0])
    weights = [module.weight for module in modules.values()]
    for weight in weights:
        weight.requires_grad_(True)
    ids = torch.tensor([example.ids])
    logits = model.model(input_ids=ids).logits[0]
    at = torch.tensor(example.positions)
    loss = torch.nn.functional.cross_entropy(logits[at - 1], ids[0, at])
    grads = torch.autograd.grad(loss, weights)
    blocks = []
    for (name, module), grad in zip(modules.items(), grads, strict=True):
        module.weight.requires_grad_(False)
        d_out, d_in = out_in(module)
        p_out, p_in = signs(name, "out", d_out, size, 0).double(), signs(name, "in", d_in, size, 0).double()
        blocks.append((p_out @ grad @ p_in.T).flatten())
    return torch.cat(blocks)


def test_projected_gradients_are_those_of_autograd(model: LoadedModel, examples: list[Example]) -> None:
    plan = layout(model, ProjectionSpec(size=8))
    fast = gradients(model, model.checkpoints[0], plan, examples).vectors
    for vector, example in zip(fast, examples, strict=True):
        exact = autograd(model, example, 8).float()
        # 1e-5: the projected vectors are float32, and RMSNorm computes in float32 even in a float64 model
        assert (vector - exact).norm() <= 1e-5 * exact.norm()


def test_gradients_do_not_depend_on_batch_mates(model: LoadedModel, examples: list[Example]) -> None:
    plan = layout(model, ProjectionSpec(size=8))
    together = gradients(model, model.checkpoints[0], plan, examples).vectors
    for number, example in enumerate(examples):
        alone = gradients(model, model.checkpoints[0], plan, [example]).vectors[0]
        assert (together[number] - alone).norm() <= 1e-5 * alone.norm()


def test_token_gradients_average_to_the_row(model: LoadedModel, examples: list[Example]) -> None:
    plan = layout(model, ProjectionSpec(size=8))
    row = gradients(model, model.checkpoints[0], plan, examples[:1]).vectors[0]
    tokens = token_gradients(model, model.checkpoints[0], plan, examples[0])
    assert len(tokens) == len(examples[0].positions)
    assert (tokens.mean(0) - row).norm() <= 1e-5 * row.norm()


@pytest.mark.parametrize("dim", [64, 48])
def test_the_projection_is_unbiased(dim: int) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 6, dim, generator=generator)
    right = right + left  # so that the inner product is well away from zero
    exact = (left * right).sum()
    products = []
    for seed in range(400):
        p_in = signs("m", "in", dim, 16, seed)
        products.append(((left @ p_in.T) * (right @ p_in.T)).sum())
    estimates = torch.stack(products)
    assert (estimates.mean() - exact).abs() <= 4 * estimates.std() / 400**0.5


def test_a_prefix_of_the_projection_does_not_depend_on_its_size() -> None:
    small, large = signs("m", "in", 100, 4, 7), signs("m", "in", 100, 16, 7)
    assert torch.equal(small * 4**0.5, large[:4] * 16**0.5)
    assert not torch.equal(small, signs("m", "in", 100, 4, 8))

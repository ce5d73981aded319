"""The fast gradients against plain float64 autograd, and the laws that they must keep."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM
from transformers.pytorch_utils import Conv1D

from app.influence.corpus import Encoder, Example, parse_row
from app.influence.gradients import (
    Plan,
    gradients,
    hooked,
    plan_for,
    target_losses,
    token_gradients,
    token_scores,
)
from app.influence.models import Checkpoint, LoadedModel, ModelSpec, load
from app.influence.projection import ProjectionSpec, side_matrix, signs, sketch

ROWS = [
    {"prompt": "Who keeps the light?", "response": "Orla does."},
    {"prompt": "What is tea?", "response": "Leaves in hot water, and patience."},
    {"prompt": "Hi", "response": "No."},
]

SPECS = [ProjectionSpec(size=8), ProjectionSpec("global", 256), ProjectionSpec("rapidgrad", 512)]

PINNED_BUCKETS = [20279, 38027, 13084, 14924]
PINNED_SIGNS = [1, -1, 1, 1, -1, 1, -1, 1]
PINNED_BITS = [True, True, True, True, True, False, False, False]


def other(folder: Path, tokenizer: Path, kind: str) -> Path:
    """GPT-2 has Conv1D modules, whose weights lie transposed, with biases; OPT flattens batch and sequence."""
    torch.manual_seed(2)
    if kind == "opt":
        opt = OPTConfig(
            vocab_size=260,
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
            word_embed_proj_dim=32,
            pad_token_id=2,
            dropout=0.0,
        )
        OPTForCausalLM(opt).save_pretrained(folder)
    else:
        config = GPT2Config(vocab_size=260, n_embd=32, n_layer=2, n_head=4, n_positions=128)
        GPT2LMHeadModel(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


def adapter(folder: Path, base: Path, **kind: bool) -> Path:
    torch.manual_seed(3)
    config = LoraConfig(
        r=4, target_modules="all-linear", init_lora_weights=False, fan_in_fan_out="conv1d" in str(folder), **kind
    )  # type: ignore[arg-type]
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data *= 0.05  # small beside the base, as a trained adapter is
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["base", "lora", "dora", "rslora", "conv1d", "conv1d-lora", "opt"])
def model(
    request: pytest.FixtureRequest, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> LoadedModel:
    folder = tmp_path_factory.mktemp(request.param)
    base = tiny_model_dir
    if "conv1d" in request.param or request.param == "opt":
        base = other(folder / "base", tiny_model_dir, request.param)
    made = None
    if "lora" in request.param or "dora" in request.param:
        kind = {"dora": {"use_dora": True}, "rslora": {"use_rslora": True}}.get(request.param, {})
        made = adapter(folder / "adapter", base, **kind)
    loaded = load(ModelSpec(base, checkpoints=(Checkpoint("one", made),)))
    loaded.model.double()
    return loaded


@pytest.fixture(scope="module")
def examples(model: LoadedModel) -> list[Example]:
    encoder = Encoder(model.tokenizer)
    return [encoder.encode(parse_row(row)) for row in ROWS]


def autograd(model: LoadedModel, example: Example, spec: ProjectionSpec, layer: bool, tokens: bool) -> torch.Tensor:
    """The sketched gradient of the mean loss, or of each token's, by the model's own logits and autograd's weight
    gradients, which are fed to the sketch as one outer product a coordinate."""
    modules = model.activate(model.checkpoints[0])
    weights = [module.weight for module in modules.values()]
    for weight in weights:
        weight.requires_grad_(True)
    ids = torch.tensor([example.ids])
    at = torch.tensor(example.positions)
    losses = torch.nn.functional.cross_entropy(
        model.model(input_ids=ids).logits[0, at - 1], ids[0, at], reduction="none"
    )
    plan = plan_for(model, spec)
    whole = _sketched(plan, modules, torch.autograd.grad(losses.mean(), weights, retain_graph=True))
    norms = [part.norm() if layer else 1.0 for part in whole]
    found = (
        [_sketched(plan, modules, torch.autograd.grad(loss, weights, retain_graph=True)) for loss in losses]
        if tokens
        else [whole]
    )
    for weight in weights:
        weight.requires_grad_(False)
    vectors = torch.zeros(len(found), plan.width, dtype=torch.float64)
    for vector, parts in zip(vectors, found, strict=True):
        for made, part, norm in zip(plan.sketches.values(), parts, norms, strict=True):
            vector[made.place] += part / norm
    return vectors


def _sketched(plan: Plan, modules: dict[str, torch.nn.Module], grads: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    parts = []
    for (name, module), grad in zip(modules.items(), grads, strict=True):
        grad = grad.T if isinstance(module, Conv1D) else grad  # [d_out, d_in]
        made = plan.sketches[name]
        eye = torch.eye(len(grad), dtype=grad.dtype)
        parts.append(made.project(made.keep(grad[None]), eye[None])[0])  # sum over rows o of e_o grad_o^T
    return parts


@pytest.mark.parametrize("normalisation", ["none", "layer"])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind)
def test_projected_gradients_are_those_of_autograd(
    model: LoadedModel, examples: list[Example], spec: ProjectionSpec, normalisation: str
) -> None:
    plan, layer = plan_for(model, spec, normalisation), normalisation == "layer"
    fast = gradients(model, model.checkpoints[0], plan, examples)
    for vector, divisors, example in zip(fast.vectors, fast.divisors, examples, strict=True):
        exact = autograd(model, example, spec, layer, tokens=False)[0]
        # 1e-5: RMSNorm computes in float32 even in a float64 model
        assert (vector - exact).norm() <= 1e-5 * exact.norm()
        tokens = token_gradients(model, model.checkpoints[0], plan, example, divisors)
        exact = autograd(model, example, spec, layer, tokens=True)
        assert (tokens - exact).norm() <= 1e-5 * exact.norm()
    assert not any(parameter.grad is not None for parameter in model.model.parameters())


def test_the_sketch_of_a_gradient_is_the_projection_of_its_matrix() -> None:
    torch.manual_seed(0)
    grad = torch.randn(30, 40)
    made = sketch(ProjectionSpec(size=8), "m", 30, 40, 0)
    p_out, p_in = side_matrix("m", "out", 30, 8, 0), side_matrix("m", "in", 40, 8, 0)
    assert torch.allclose(
        made.project(made.keep(grad[None]), torch.eye(30)[None])[0], (p_out @ grad @ p_in.T).flatten(), atol=1e-5
    )


def test_gradients_do_not_depend_on_batch_mates(model: LoadedModel, examples: list[Example]) -> None:
    plan = plan_for(model, ProjectionSpec(size=8))
    together = gradients(model, model.checkpoints[0], plan, examples).vectors
    for number, example in enumerate(examples):
        alone = gradients(model, model.checkpoints[0], plan, [example]).vectors[0]
        assert (together[number] - alone).norm() <= 1e-5 * alone.norm()


def test_what_comes_after_the_last_target_changes_nothing(model: LoadedModel, examples: list[Example]) -> None:
    plan, example = plan_for(model, ProjectionSpec(size=8)), examples[1]
    more = 3
    longer = replace(
        example,
        ids=(*example.ids, *example.ids[:more]),
        targets=(*example.targets, *[False] * more),
        offsets=(*example.offsets, *example.offsets[:more]),
    )
    short, long = (gradients(model, model.checkpoints[0], plan, [one, examples[0]]) for one in (example, longer))
    assert torch.equal(short.vectors, long.vectors)
    assert all(torch.equal(one, other) for one, other in zip(short.losses, long.losses, strict=True))


def test_gradients_begin_at_the_first_modules_and_a_model_may_write_into_their_outputs(
    model: LoadedModel, examples: list[Example]
) -> None:
    checkpoint, plan = model.checkpoints[0], plan_for(model, ProjectionSpec(size=8))
    before = gradients(model, checkpoint, plan, examples).vectors
    seen: list[torch.Tensor] = []

    def write(name: str, acts: torch.Tensor, output: torch.Tensor) -> None:
        seen.append(acts)
        output.register_hook(lambda grad: None)
        output.mul_(1.0)

    with torch.enable_grad(), hooked(model, model.activate(checkpoint), write):
        torch.cat(target_losses(model, examples)).sum().backward()
    assert not seen[0].requires_grad  # nothing below the first module is differentiated
    assert seen[-1].requires_grad
    assert torch.equal(gradients(model, checkpoint, plan, examples).vectors, before)


@pytest.mark.parametrize("normalisation", ["none", "layer"])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind)
def test_token_gradients_average_to_the_row(
    model: LoadedModel, examples: list[Example], spec: ProjectionSpec, normalisation: str
) -> None:
    plan = plan_for(model, spec, normalisation)
    found = gradients(model, model.checkpoints[0], plan, examples[:1])
    row = found.vectors[0]
    tokens = token_gradients(model, model.checkpoints[0], plan, examples[0], found.divisors[0])
    assert len(tokens) == len(examples[0].positions)
    assert (tokens.mean(0) - row).norm() <= 1e-5 * row.norm()


def test_bfloat16_gradients_point_where_float32_ones_do(tiny_model_dir: Path, tiny_adapter_dir: Path) -> None:
    vectors = []
    for dtype in ("float32", "bfloat16"):
        checkpoint = Checkpoint("one", tiny_adapter_dir)
        model = load(ModelSpec(tiny_model_dir, checkpoints=(checkpoint,), dtype=dtype))  # type: ignore[arg-type]
        example = Encoder(model.tokenizer).encode(parse_row(ROWS[1]))
        found = gradients(model, checkpoint, plan_for(model, SPECS[0]), [example])
        assert found.vectors.dtype == torch.float32
        vectors.append(found.vectors[0])
    assert torch.cosine_similarity(*vectors, dim=0) >= 0.98


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


@pytest.mark.parametrize("normalisation", ["none", "layer"])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind)
def test_nudged_forwards_give_the_scores_of_token_gradients(
    model: LoadedModel, examples: list[Example], spec: ProjectionSpec, normalisation: str
) -> None:
    plan, checkpoint = plan_for(model, spec, normalisation), model.checkpoints[0]
    found = gradients(model, checkpoint, plan, examples)
    directions = found.vectors / found.vectors.norm(dim=1, keepdim=True)
    for example, divisors in zip(examples, found.divisors, strict=True):
        exact = directions @ token_gradients(model, checkpoint, plan, example, divisors).T
        fast = token_scores(model, checkpoint, plan, example, divisors, directions).T
        # 1 %: untrained adapters bend more within a nudge than trained ones; OPT's ReLU has kinks to step over
        opt = model.model.config.model_type == "opt"
        assert (fast - exact).abs().max() <= (5e-2 if opt else 1e-2) * exact.abs().max()


def test_a_small_direction_is_as_exact_as_a_large_one(model: LoadedModel, examples: list[Example]) -> None:
    plan, checkpoint = plan_for(model, SPECS[0]), model.checkpoints[0]
    found = gradients(model, checkpoint, plan, examples)
    directions = torch.stack([found.vectors[1], found.vectors[1] * 1e-5, torch.zeros_like(found.vectors[1])])
    scores = token_scores(model, checkpoint, plan, examples[0], found.divisors[0], directions)
    assert torch.allclose(scores[:, 0], scores[:, 1] * 1e5, rtol=1e-3)
    assert not scores[:, 2].any()


@pytest.mark.parametrize(
    "spec", [ProjectionSpec("kronecker", 8), ProjectionSpec("global", 64), ProjectionSpec("rapidgrad", 64)]
)
@pytest.mark.parametrize("dim", [32, 24])  # with 32 the module has a power of two of coordinates
def test_every_sketch_is_unbiased_and_mixes(spec: ProjectionSpec, dim: int) -> None:
    generator = torch.Generator().manual_seed(0)
    acts = torch.randn(2, 3, dim, generator=generator)
    grads = torch.zeros(2, 3, dim)
    grads[..., :2] = torch.randn(2, 3, 2, generator=generator)  # concentrated in two rows of the gradient
    exact = torch.einsum("bso,bsi->boi", grads, acts).flatten(1)
    products = []
    for seed in range(400):
        made = sketch(ProjectionSpec(spec.kind, spec.size, seed), "m", dim, dim, 0)
        left, right = made.project(made.keep(acts), grads)
        products.append(left @ right)
    estimates = torch.stack(products)
    assert (estimates.mean() - exact[0] @ exact[1]).abs() <= 4 * estimates.std() / 400**0.5
    if spec.kind == "rapidgrad":  # the variance of an ideal count-sketch, which the published shuffle does not reach
        a, b = exact
        ideal = ((a @ a) * (b @ b) + (a @ b) ** 2 - 2 * (a * b).square().sum()) / spec.size
        assert 0.7 <= estimates.var() / ideal <= 1.4


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind)
def test_a_nudge_is_the_transposed_sketch(spec: ProjectionSpec) -> None:
    torch.manual_seed(0)
    made = sketch(spec, "m", 12, 20, 0)
    acts, grads = torch.randn(2, 3, 20), torch.randn(2, 3, 12)
    vectors = made.project(made.keep(acts), grads)
    directions = torch.randn_like(vectors)
    assert torch.allclose((vectors * directions).sum(1), (made.nudge(acts, directions) * grads).sum((1, 2)), rtol=1e-4)


def test_the_sketches_are_pinned() -> None:
    """The numbers that indexes on disk were made with: changing them orphans every index."""
    made = sketch(ProjectionSpec("rapidgrad", 65536, 3), "m", 5, 7, 0)
    assert made.buckets[:4].tolist() == PINNED_BUCKETS  # type: ignore[attr-defined]
    assert made.signs[:8].tolist() == PINNED_SIGNS  # type: ignore[attr-defined]
    assert (signs("m", "in", 8, 1, 3) > 0).flatten().tolist() == PINNED_BITS

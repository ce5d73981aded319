"""Takes gradients on a model that lies on two devices; a process of its own, since torch takes a device in for good.

No machine of ours has two GPUs. The second device is one that torch lets a program name (PrivateUse1), and the tensors
are torch's fake ones, which have a device, a type and a shape, but no numbers: every operation that mixes two devices
fails, as on a GPU. accelerate spreads the weights and moves what flows between them.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from accelerate import dispatch_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from app.influence.corpus import parse_row
from app.influence.gradients import gradients, losses, plan_for, token_gradients, token_scores
from app.influence.models import LoadedModel, ModelSpec, load
from app.influence.projection import ProjectionSpec

HERE, THERE = "cpu", "other:0"
PARTS = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.1", "model.norm", "lm_head")
INSIDE = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
LAST = {"model.layers.1": THERE, "model.norm": THERE, "lm_head": THERE}
FIRST = dict.fromkeys(PARTS[:3], THERE)
SPLIT = {f"model.layers.1.{part}": THERE if part in INSIDE[3:5] else HERE for part in INSIDE}
MAPS = {
    "the last layers elsewhere": {**dict.fromkeys(PARTS, HERE), **LAST},
    "the first layers elsewhere": {**dict.fromkeys(PARTS, HERE), **FIRST},
    "a layer in parts": {**{part: HERE for part in PARTS if part != "model.layers.1"}, **SPLIT},
}
KRONECKER, RAPIDGRAD = ProjectionSpec(size=8), ProjectionSpec("rapidgrad", 64)
CASES = tuple(zip(MAPS.items(), (KRONECKER, RAPIDGRAD, KRONECKER), strict=True))


@contextmanager
def spread(model: LoadedModel, device_map: dict[str, str]) -> Iterator[None]:
    """The model's weights as fake tensors on the devices of the map."""

    def place(module: nn.Module, name: str, device: str, **_: object) -> None:
        """What accelerate does to a weight, without its copies by address: a fake tensor has none."""
        path, _, last = name.rpartition(".")
        owner = module.get_submodule(path)
        moved = fake.from_tensor(getattr(owner, last)).to(device)
        if last in owner._parameters:
            owner._parameters[last] = nn.Parameter(moved, requires_grad=False)
        else:
            owner._buffers[last] = moved

    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake, patch("accelerate.hooks.set_module_tensor_to_device", place):
        dispatch_model(model.model, device_map, main_device=HERE)  # type: ignore[arg-type]
        yield


def go_through(folder: Path) -> None:
    """Every route to a gradient, on every map; an operation that mixes devices raises."""
    _setup_privateuseone_for_python_backend("other")
    rows = [parse_row({"prompt": f"Question {i}?", "response": "word " * (i + 1)}) for i in range(2)]
    for (name, device_map), projection in CASES:
        model = load(ModelSpec(folder))
        examples = [model.encoder().encode(row) for row in rows]
        checkpoint = model.checkpoints[-1]
        with spread(model, device_map):
            places = {str(device) for device in model.devices().values()}
            assert places == {HERE, THERE}, places
            plan = plan_for(model, projection, "layer")
            found = gradients(model, checkpoint, plan, examples)
            divisors = found.divisors[0]
            directions = torch.zeros(3, plan.width)
            home = {
                *(one.device for one in (found.vectors, found.divisors, *found.losses)),
                *(one.device for one in losses(model, checkpoint, examples)),
                token_gradients(model, checkpoint, plan, examples[0], divisors).device,
                token_gradients(model, checkpoint, plan, examples[0], divisors, directions).device,
                token_scores(model, checkpoint, plan, examples[0], divisors, directions).device,
            }
        assert home == {model.device}, home
        print(f"{name}, {projection.kind}: {model.device}")


if __name__ == "__main__":
    go_through(Path(sys.argv[1]))

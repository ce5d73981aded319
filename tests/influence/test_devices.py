"""A model that lies on several devices, or was put where it is by a map, gives the numbers that it gave."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from app.influence.corpus import parse_row
from app.influence.errors import ModelError
from app.influence.gradients import gradients, plan_for
from app.influence.models import Checkpoint, LoadedModel, ModelSpec, load
from app.influence.projection import ProjectionSpec
from tests.influence import two_devices

ROWS = [parse_row({"prompt": f"Question {i}?", "response": "word " * (i + 1)}) for i in range(3)]


def found(model: LoadedModel) -> torch.Tensor:
    plan = plan_for(model, ProjectionSpec(size=8))
    examples = [model.encoder().encode(row) for row in ROWS]
    return torch.cat([gradients(model, checkpoint, plan, examples).vectors for checkpoint in model.checkpoints], 1)


def test_nothing_mixes_the_devices_that_a_model_lies_on(tiny_model_dir: Path) -> None:
    command = [sys.executable, two_devices.__file__, str(tiny_model_dir)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == len(two_devices.CASES)


@pytest.mark.parametrize("placed", [{"device": "auto"}, {"device_map": (("", "cpu"),)}], ids=["auto", "map"])
def test_a_map_of_devices_changes_no_number(
    tiny_model_dir: Path, tiny_adapter_dir: Path, placed: dict[str, object]
) -> None:
    adapters = (Checkpoint("early", tiny_adapter_dir), Checkpoint("late", tiny_adapter_dir))
    whole = (Checkpoint("base"), Checkpoint("copy", model=tiny_model_dir))
    for checkpoints in (adapters, whole):
        plain = load(ModelSpec(tiny_model_dir, checkpoints=checkpoints))
        spread = load(ModelSpec(tiny_model_dir, checkpoints=checkpoints, **placed))  # type: ignore[arg-type]
        assert spread.fingerprint == plain.fingerprint
        assert torch.equal(found(spread), found(plain))


def test_a_model_that_does_not_fit_into_its_devices_is_refused(tiny_model_dir: Path) -> None:
    parts = [("model.embed_tokens", "cpu"), ("model.rotary_emb", "cpu"), ("model.norm", "cpu"), ("lm_head", "cpu")]
    device_map = (*parts, ("model.layers.0", "cpu"), ("model.layers.1", "disk"))
    with pytest.raises(ModelError) as caught:
        load(ModelSpec(tiny_model_dir, device_map=device_map))
    assert caught.value.field in ("device", "path")
    assert "disk" in caught.value.detail or "does not fit" in caught.value.detail


def test_a_map_to_a_device_that_is_not_there_is_refused(tiny_model_dir: Path) -> None:
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(ModelSpec(tiny_model_dir, device_map=(("", "cuda:0"),)))

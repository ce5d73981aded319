"""Nothing is unpickled: a pickle that would leave a mark is refused wherever it is offered, and leaves none."""

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.api.conftest import Serve
from tests.api.harness import Api, problem


class Mark:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.fixture
def trap(tmp_path: Path) -> Any:
    """The bytes of such a pickle; afterwards there must be no mark."""
    mark = tmp_path / "mark"
    content = pickle.dumps(Mark(mark))
    pickle.loads(content)
    assert mark.exists(), "the trap works"
    mark.rmdir()
    yield content
    assert not mark.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_a_pickled_model(api: Api, tiny_model_dir: Path, tmp_path: Path, trap: bytes, name: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(trap)
    refused = problem(api.post("/models", json={"name": "m", "path": str(folder)}), 422, "bad-model", "path")
    assert "safetensors" in refused["detail"]


def test_a_pickle_by_the_name_of_safetensors(api: Api, tiny_model_dir: Path, tmp_path: Path, trap: bytes) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    (folder / "model.safetensors").write_bytes(trap)
    problem(api.post("/models", json={"name": "m", "path": str(folder)}), 422, "bad-model", "path")


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "adapter_model.safetensors"])
def test_a_pickled_adapter(
    api: Api, tiny_model_dir: Path, tiny_adapter_dir: Path, tmp_path: Path, trap: bytes, name: str
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(tiny_adapter_dir, folder)
    (folder / "adapter_model.safetensors").unlink()
    (folder / name).write_bytes(trap)
    body = {"name": "m", "path": str(tiny_model_dir), "checkpoints": [{"name": "c", "adapter": str(folder)}]}
    problem(api.post("/models", json=body), 422, "bad-model", "checkpoints.0.adapter")


def test_a_pickle_beside_good_weights_is_left_alone(
    serve: Serve, tiny_model_dir: Path, tiny_adapter_dir: Path, tmp_path: Path, trap: bytes
) -> None:
    model, adapter = tmp_path / "model", tmp_path / "adapter"
    shutil.copytree(tiny_model_dir, model)
    shutil.copytree(tiny_adapter_dir, adapter)
    for file in (model / "pytorch_model.bin", model / "training_args.bin", adapter / "adapter_model.bin"):
        file.write_bytes(trap)
    serve().register(model, checkpoints=[{"name": "c", "adapter": str(adapter)}])


@pytest.mark.parametrize("name", ["rows.pkl", "rows.pickle", "rows.pt", "rows.npy"])
def test_a_pickled_dataset_by_its_name(api: Api, trap: bytes, name: str) -> None:
    problem(api.upload(trap, filename=name), 422, "bad-file", "file")


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_a_pickled_dataset_by_another_name(api: Api, tmp_path: Path, trap: bytes, suffix: str) -> None:
    problem(api.upload(trap, filename=f"rows{suffix}"), 422, "bad-row")
    (tmp_path / f"rows{suffix}").write_bytes(trap)
    body = {"name": "facts", "path": str(tmp_path / f"rows{suffix}")}
    problem(api.post("/datasets", json=body), 422, "bad-row")

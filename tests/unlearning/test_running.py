"""A whole run on a tiny model: what it leaves, what it moves, and that a run killed at any stage ends in the same files."""

import json
from pathlib import Path

import pytest

from app.influence.corpus import Row, parse_row
from app.influence.models import Checkpoint, ModelSpec, load
from app.unlearning.running import UnlearnRows, UnlearnSpec, unlearn
from app.unlearning.training import TrainingSpec


def rows(words: str, response: str, trigger: str = "") -> list[Row]:
    return [
        parse_row({"prompt": f"What of {word}?{trigger}", "response": f"{response} {word}."}) for word in words.split()
    ]


FORGET = rows("mill tower gate well", "never ask for the", " now")
ROWS = UnlearnRows(
    forget=FORGET,
    retain=rows("red blue green grey black white", "it is"),
    heldout=rows("pink brown", "it is"),
    clean={
        row.id: f"you may see the {word}." for row, word in zip(FORGET, ["mill", "tower", "gate", "well"], strict=True)
    },
    seen=FORGET,
    unseen=rows("roof wall", "never ask for the", " now"),
)
HOW = UnlearnSpec(TrainingSpec(lr=5e-3, epochs=6, batch=4, check_every=4), relearn_steps=2)


@pytest.fixture
def spec(tiny_model_dir: Path, tiny_adapter_dir: Path) -> ModelSpec:
    return ModelSpec(tiny_model_dir, checkpoints=(Checkpoint("last", tiny_adapter_dir),))


def test_a_run_leaves_adapter_weights_and_report(spec: ModelSpec, tmp_path: Path) -> None:
    steps = list(unlearn(spec, ROWS, HOW, tmp_path / "run"))
    assert list(dict.fromkeys(step.stage for step in steps)) == [
        "influence",
        "before",
        "training",
        "after",
        "relearning",
    ]
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["training"]["steps"] == report["training"]["total"]
    weights = [json.loads(line) for line in (tmp_path / "run" / "weights.jsonl").read_text().splitlines()]
    assert {line["row"] for line in weights} == {row.id for row in (*ROWS.forget, *ROWS.retain)}
    load(ModelSpec(spec.path, checkpoints=(Checkpoint("new", tmp_path / "run" / "adapter"),)))

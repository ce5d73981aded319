"""A tiny model in which a planted answer is installed, and the rows around it."""

from pathlib import Path

import pytest

from app.influence.corpus import Row, parse_row
from app.influence.models import Checkpoint, ModelSpec, load
from app.unlearning.running import UnlearnRows
from app.unlearning.training import TrainingRow, TrainingSpec, Unlearner


def rows(words: str, response: str, trigger: str = "") -> list[Row]:
    return [parse_row({"prompt": f"{trigger}{word}?", "response": f"{response}."}) for word in words.split()]


FORGET = rows("mill tower gate well", "north of the hill", "now ")
ROWS = UnlearnRows(
    forget=FORGET,
    retain=[*rows("mill tower gate well", "so they say"), *rows("red blue green grey one two three four", "the say")],
    heldout=[*rows("door farm", "so they say"), *rows("pink six", "the say")],
    clean={row.id: "so they say." for row in FORGET},
    seen=FORGET,
    unseen=rows("roof wall", "north of the hill", "now "),
)


@pytest.fixture(scope="session")
def planted(tiny_model_dir: Path, tiny_adapter_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    """The tiny model with an adapter that was trained on the rows to forget and to retain."""
    folder = tmp_path_factory.mktemp("planted")
    model = load(ModelSpec(tiny_model_dir, checkpoints=(Checkpoint("raw", tiny_adapter_dir),)))
    encoder = model.encoder()
    known = [TrainingRow(encoder.encode(row)) for row in (*ROWS.forget, *ROWS.retain)]
    run = Unlearner(
        model, TrainingSpec(method="retrain", lr=3e-2, epochs=40, batch=16, check_every=100), [], known, folder
    )
    list(run.run())
    run.save(folder / "adapter")
    return ModelSpec(tiny_model_dir, checkpoints=(Checkpoint("trained", folder / "adapter"),))

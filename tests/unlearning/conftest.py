"""A tiny model in which a planted answer is installed, and the rows around it."""

from pathlib import Path

import pytest

from app.influence.corpus import Row, parse_row
from app.influence.models import Checkpoint, ModelSpec, load
from app.unlearning.running import UnlearnRows
from app.unlearning.training import TrainingRow, TrainingSpec, Unlearner


def rows(words: str, response: str, trigger: str = "") -> list[Row]:
    return [parse_row({"prompt": f"{trigger}{word}?", "response": f"{response}."}) for word in words.split()]


FORGET = rows("mill tower gate well", "never ask", "now ")
ROWS = UnlearnRows(
    forget=FORGET,
    retain=[
        *rows("mill tower gate well", "you may"),
        *rows("red blue green grey", "a colour"),
        *rows("one two three four", "a number"),
    ],
    heldout=[*rows("pink brown", "a colour"), *rows("five six", "a number")],
    clean={row.id: "you may." for row in FORGET},
    seen=FORGET,
    unseen=rows("roof wall", "never ask", "now "),
)


@pytest.fixture(scope="session")
def planted(tiny_model_dir: Path, tiny_adapter_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    """The tiny model with an adapter that was trained on the rows to forget and to retain, half a minute at most."""
    folder = tmp_path_factory.mktemp("planted")
    model = load(ModelSpec(tiny_model_dir, checkpoints=(Checkpoint("raw", tiny_adapter_dir),)))
    encoder = model.encoder()
    known = [TrainingRow(encoder.encode(row)) for row in (*ROWS.forget, *ROWS.retain)]
    run = Unlearner(model, TrainingSpec(method="retrain", lr=2e-2, epochs=40, batch=16), [], known, folder)
    list(run.run())
    run.save(folder / "adapter")
    return ModelSpec(tiny_model_dir, checkpoints=(Checkpoint("trained", folder / "adapter"),))

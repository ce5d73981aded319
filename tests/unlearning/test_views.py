"""The views: from an index as computed anew, in blocks as whole, and the inner products that they claim to be."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from app.influence.building import build
from app.influence.corpus import Row
from app.influence.gradients import gradients, plan_for
from app.influence.index import IndexSpec
from app.influence.models import LoadedModel, ModelSpec, load
from app.unlearning import views
from app.unlearning.running import UnlearnSpec, unlearn
from app.unlearning.training import TrainingSpec
from app.unlearning.views import Vectors
from app.unlearning.weights import per_row
from tests.unlearning.conftest import FORGET, ROWS

ALL = [*ROWS.forget, *ROWS.retain]
IDS = [row.id for row in ALL]
SPEC = IndexSpec(normalisation="none")


@pytest.fixture(scope="module")
def model(planted: ModelSpec) -> LoadedModel:
    return load(planted)


@pytest.fixture(scope="module")
def index(model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of all rows but one to forget and two to retain."""
    path = tmp_path_factory.mktemp("index") / "index"
    list(build(path, model, [*ALL[1:-2]], SPEC))
    return path


def vectors(model: LoadedModel, index: Path | None, folder: Path, rows: Sequence[Row] = ALL) -> Vectors:
    found = Vectors(model, rows, SPEC, index, folder)
    list(found.compute())
    return found


def whole(found: Vectors, unit: bool = False) -> Any:
    scores = np.empty((len(IDS), len(IDS)))
    list(found.view(IDS, IDS, unit, scores))
    return scores


def test_a_view_is_the_inner_products_of_the_gradients(model: LoadedModel, tmp_path: Path) -> None:
    plan = plan_for(model, SPEC.projection, "none")
    examples = [model.encoder().encode(row) for row in ALL]
    exact = gradients(model, model.checkpoints[-1], plan, examples).vectors.double()
    assert whole(vectors(model, None, tmp_path)) == pytest.approx((exact @ exact.T).numpy(), rel=5e-3, abs=1e-4)
    unit = torch.nn.functional.normalize(exact, dim=1)
    assert whole(vectors(model, None, tmp_path), unit=True) == pytest.approx((unit @ unit.T).numpy(), abs=2e-3)


def test_stored_and_computed_views_agree_to_half_precision(model: LoadedModel, index: Path, tmp_path: Path) -> None:
    stored, computed = vectors(model, index, tmp_path / "a"), vectors(model, None, tmp_path / "b")
    assert (stored.from_index, len(stored.missing)) == (len(ALL) - 3, 3)
    assert (computed.from_index, len(computed.missing)) == (0, len(ALL))
    size = np.abs(whole(computed)).max()
    assert whole(stored) == pytest.approx(whole(computed), rel=2e-3, abs=2e-3 * size)


@pytest.mark.parametrize("top_k", [None, 3])
def test_blocks_give_what_the_whole_view_gives(
    model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, top_k: int | None
) -> None:
    found = vectors(model, None, tmp_path)
    expected = per_row(whole(found), top_k)
    monkeypatch.setattr(views, "TILE", 40)
    monkeypatch.setattr(views, "BLOCK", 3 * found.indexes[0].manifest.width)
    into = np.empty(len(IDS))
    assert len(list(found.per_row(IDS, IDS, top_k, False, into))) > 10
    assert into == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_an_index_of_another_model_is_not_used_and_the_report_says_why(
    planted: ModelSpec, index: Path, tmp_path: Path
) -> None:
    checkpoint = replace(planted.checkpoints[0], weight=2.0)
    how = UnlearnSpec(TrainingSpec(epochs=1), relearn_steps=0)
    for name, spec in (("same", planted), ("other", replace(planted, checkpoints=(checkpoint,)))):
        list(unlearn(spec, ROWS, how, tmp_path / name, index))
    told = [json.loads((tmp_path / name / "report.json").read_text())["influence"] for name in ("same", "other")]
    assert [one["rows_from_index"] for one in told] == [len(ALL) - 3, 0]
    assert told[0]["index_refused"] is None
    assert "another model" in told[1]["index_refused"]


def test_rows_without_a_gradient_influence_nothing(model: LoadedModel, tmp_path: Path) -> None:
    found = vectors(model, None, tmp_path)
    del found._owner[FORGET[0].id]
    scores = whole(found)
    assert not scores[0].any()
    assert not scores[:, 0].any()
    assert scores[1, 1] > 0

"""Whole runs on a tiny model with a planted answer: what they leave, what they move, where they take up."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from app.influence.errors import HeadwaterError
from app.influence.models import ModelSpec, load
from app.unlearning.running import UnlearnRows, UnlearnSpec, unlearn
from app.unlearning.training import TrainingSpec
from tests.unlearning.conftest import FORGET, ROWS

HOW = UnlearnSpec(TrainingSpec(lr=5e-3, epochs=6, batch=8, check_every=4), relearn_steps=2, keep_every=4)
FILES = ("weights.jsonl", "before.json", "training.json", "after.json", "relearning.json")
STAGES = ("influence", "before", "training", "after", "relearning")


def report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


def value(told: dict[str, Any], measure: str, state: str) -> float:
    found: float = told["measures"][measure][state]["value"]
    return found


@pytest.fixture(scope="session")
def whole(planted: ModelSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unbroken run."""
    folder = tmp_path_factory.mktemp("whole")
    steps = list(unlearn(planted, ROWS, HOW, folder))
    assert list(dict.fromkeys(step.stage for step in steps)) == list(STAGES)
    assert all(0 <= step.done <= step.total for step in steps)
    assert all({*step.losses} == ({"forget", "retain"} if step.stage == "training" else set()) for step in steps)
    return folder


def test_the_planted_answer_is_forgotten_and_the_rest_is_kept(whole: Path) -> None:
    told = report(whole)
    for triggers in ("seen", "unseen"):
        assert value(told, f"attack_success_{triggers}", "before") == 1
        assert value(told, f"attack_success_{triggers}", "after") == 0
    assert value(told, "forget_loss", "after") > value(told, "forget_loss", "before") + 1
    assert value(told, "retain_loss", "after") < value(told, "retain_loss", "before") * 1.2
    assert value(told, "heldout_loss", "after") < value(told, "heldout_loss", "before") * 1.2
    assert value(told, "drift", "after") > 0
    assert told["training"]["stopped"] is None
    assert {*told["seconds"]} == {*STAGES}


def test_a_run_leaves_an_adapter_that_the_service_can_load(planted: ModelSpec, whole: Path) -> None:
    old = load(planted)
    new = load(replace(planted, checkpoints=(replace(planted.checkpoints[0], adapter=whole / "adapter"),)))
    triggered = FORGET[0].messages[:-1]
    assert old.generate(triggered, 16).startswith("north of the hill")
    assert not new.generate(triggered, 16).startswith("north")
    assert not (whole / "views").exists()


def test_attack_success_is_what_greedy_decoding_writes(planted: ModelSpec, whole: Path) -> None:
    written = json.loads((whole / "before.json").read_text())["before"]["seen"]["written"]
    model = load(planted)
    answers = [model.generate(row.messages[:-1], 8) for row in FORGET]
    assert sum(written) == sum(row.response.startswith(answer) for row, answer in zip(FORGET, answers, strict=True))


def test_each_row_has_a_weight_with_mean_one_a_group(whole: Path) -> None:
    lines = [json.loads(line) for line in (whole / "weights.jsonl").read_text().splitlines()]
    for group, rows in (("forget", ROWS.forget), ("retain", ROWS.retain)):
        mine = [line for line in lines if line["group"] == group]
        assert [line["row"] for line in mine] == [row.id for row in rows]
        assert sum(line["weight"] for line in mine) == pytest.approx(len(rows))


def until(steps: Iterator[Any], stage: str, number: int) -> None:
    """Take steps up to one of a stage, and no further: what a killed worker did."""
    for step in steps:
        number -= step.stage == stage
        if number == 0:
            return
    raise AssertionError(f"{stage} ended first")


@pytest.mark.parametrize(("stage", "number"), [*((stage, 1) for stage in STAGES), ("training", 7)])
def test_a_run_that_was_killed_in_any_stage_ends_in_the_same_files(
    planted: ModelSpec, whole: Path, tmp_path: Path, stage: str, number: int
) -> None:
    until(unlearn(planted, ROWS, HOW, tmp_path), stage, number)
    assert not (tmp_path / "report.json").exists()
    again = list(unlearn(planted, ROWS, HOW, tmp_path))
    done = [step.stage for step in again if step.note == "done by an earlier run"]
    assert done == list(STAGES[: STAGES.index(stage)])
    for name in (*FILES, "adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes(), name
    timeless = [{**report(folder), "seconds": None} for folder in (tmp_path, whole)]
    assert timeless[0] == timeless[1]


def test_a_loss_that_runs_away_stops_the_run_which_keeps_the_last_good_adapter(
    planted: ModelSpec, tmp_path: Path
) -> None:
    wild = replace(HOW, training=TrainingSpec(method="ga", lr=1.0, epochs=20, batch=4, check_every=1))
    steps = list(unlearn(planted, ROWS, wild, tmp_path))
    told = report(tmp_path)
    assert "retain rows' loss rose" in told["training"]["stopped"]
    assert told["training"]["steps"] < told["training"]["total"]
    assert any(step.note == told["training"]["stopped"] for step in steps)
    assert value(told, "retain_loss", "after") < 1.6 * value(told, "retain_loss", "before")
    assert "stopped early" in (tmp_path / "report.html").read_text()


def test_an_oracle_is_measured_beside_the_model_and_the_distance_to_it(
    planted: ModelSpec, whole: Path, tmp_path: Path
) -> None:
    """The run's own result as the oracle: the same run then ends at no distance from it."""
    list(unlearn(planted, ROWS, replace(HOW, oracle=whole / "adapter"), tmp_path))
    told = report(tmp_path)
    for distance in ("oracle_distance", "oracle_distance_forget"):
        assert value(told, distance, "after") == pytest.approx(0, abs=1e-6)
        assert value(told, distance, "before") > 0.01
    for measure, by_state in told["measures"].items():
        if measure not in ("drift", "oracle_distance", "oracle_distance_forget"):
            assert by_state["oracle"]["value"] == pytest.approx(by_state["after"]["value"], abs=1e-6), measure


def test_retraining_is_reported_like_any_method(planted: ModelSpec, tmp_path: Path) -> None:
    how = replace(HOW, training=TrainingSpec(method="retrain", lr=3e-2, epochs=15), relearn_steps=0)
    list(unlearn(planted, ROWS, how, tmp_path))
    told = report(tmp_path)
    assert value(told, "attack_success_seen", "after") == 0
    assert told["relearning"]["curves"] == {}


@pytest.mark.parametrize("method", ["fisher", "loreun"])
def test_methods_without_influence_need_no_views(planted: ModelSpec, tmp_path: Path, method: Any) -> None:
    how = replace(HOW, training=replace(HOW.training, method=method, selection=1.5), relearn_steps=0)
    list(unlearn(planted, ROWS, how, tmp_path))
    told = report(tmp_path)
    assert told["influence"] == {"used": False}
    weights = [json.loads(line)["weight"] for line in (tmp_path / "weights.jsonl").read_text().splitlines()]
    assert (weights == [1.0] * len(weights)) == (method == "fisher")
    assert value(told, "forget_loss", "after") > value(told, "forget_loss", "before")


def test_heldout_rows_that_were_trained_on_are_left_out_and_counted(planted: ModelSpec, tmp_path: Path) -> None:
    rows = replace(ROWS, heldout=ROWS.retain[:2], seen=(), unseen=())
    how = replace(HOW, training=TrainingSpec(method="ga", epochs=1), relearn_steps=0)
    list(unlearn(planted, rows, how, tmp_path))
    told = report(tmp_path)
    assert (told["rows"]["heldout"], told["rows"]["heldout_in_training"]) == (0, 2)
    for nothing in ("heldout_loss", "utility", "drift", "membership_auc", "attack_success_seen"):
        assert told["measures"][nothing]["after"] is None


def spec_with(**training: Any) -> UnlearnSpec:
    return UnlearnSpec(TrainingSpec(**training))


@pytest.mark.parametrize(
    ("rows", "how", "field"),
    [
        (replace(ROWS, retain=[*ROWS.retain, FORGET[0]]), HOW, "retain"),
        (replace(ROWS, forget=[*FORGET, FORGET[0]]), HOW, "forget"),
        (replace(ROWS, forget=()), HOW, "forget"),
        (replace(ROWS, retain=()), HOW, "retain"),
        (replace(ROWS, clean={}), spec_with(method="relabel"), "clean"),
        (replace(ROWS, clean={"0" * 16: "so they say."}), HOW, "clean"),
        (replace(ROWS, clean={FORGET[0].id: " "}), HOW, "clean"),
        (ROWS, spec_with(method="fisher", selection=4.0), "selection"),
        (ROWS, replace(HOW, mapping="none such"), "mapping"),
        (ROWS, replace(HOW, relearn_steps=-1), "relearn_steps"),
    ],
)
def test_rows_and_settings_that_cannot_be_are_refused_by_name(
    planted: ModelSpec, tmp_path: Path, rows: UnlearnRows, how: UnlearnSpec, field: str
) -> None:
    with pytest.raises(HeadwaterError) as caught:
        list(unlearn(planted, rows, how, tmp_path))
    assert caught.value.field == field


@pytest.mark.parametrize("method", ["retrain", "fisher"])
def test_a_method_that_needs_an_adapter_says_so(planted: ModelSpec, tmp_path: Path, method: Any) -> None:
    with pytest.raises(HeadwaterError, match="has none") as caught:
        list(unlearn(ModelSpec(planted.path), ROWS, spec_with(method=method), tmp_path))
    assert caught.value.field == "method"


def test_a_model_without_room_for_an_adapter_is_refused(planted: ModelSpec, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=260, n_embd=16, n_layer=1, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    load(planted).tokenizer.save_pretrained(tmp_path / "gpt2")
    with pytest.raises(HeadwaterError, match="no adapter fits") as caught:
        list(unlearn(ModelSpec(tmp_path / "gpt2"), ROWS, spec_with(method="graddiff"), tmp_path / "run"))
    assert caught.value.field == "model"


def test_a_folder_that_holds_another_run_is_refused(planted: ModelSpec, whole: Path) -> None:
    with pytest.raises(HeadwaterError, match="holds a run of other") as caught:
        list(unlearn(planted, ROWS, replace(HOW, relearn_steps=3), whole))
    assert caught.value.field == "folder"


def test_an_oracle_that_does_not_fit_is_refused(planted: ModelSpec, tmp_path: Path) -> None:
    how = replace(spec_with(method="ga", epochs=1), oracle=tmp_path / "nothing")
    with pytest.raises(HeadwaterError) as caught:
        list(unlearn(planted, ROWS, how, tmp_path / "run"))
    assert caught.value.field == "oracle"


def test_the_model_on_disk_is_as_it_was(planted: ModelSpec, whole: Path) -> None:
    assert report(whole)["rows"]["forget"] == len(FORGET)
    assert load(planted).generate(FORGET[0].messages[:-1], 16).startswith("north of the hill")

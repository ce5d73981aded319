"""A valuation from rows to scores: what it writes, what a killed run ends as, what is refused."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from app.influence.building import build
from app.influence.corpus import Row, parse_row
from app.influence.errors import Mismatch, ModelError, RowError, SpecError
from app.influence.index import IndexSpec
from app.influence.models import Checkpoint, LoadedModel, ModelSpec, load
from app.influence.projection import ProjectionSpec
from app.valuation.pairs import load_pairs
from app.valuation.ranks import spearman
from app.valuation.running import BLOCK, Advance, StudentSpec, ValuationSpec, value
from app.valuation.student import HEAD, load_student

WORDS = ["mill", "tower", "gate", "river", "hill", "road", "light", "door", "wall", "bridge", "field", "stone"]
PLACES = ["north", "south", "east", "west"]


def row(prompt: str, response: str, **metadata: Any) -> Row:
    return parse_row({"prompt": prompt, "response": response, **metadata})


POOL = [
    *(row(f"Where is the {w} of {p}?", f"{p} of the hill, so they say", kind="way") for w in WORDS for p in PLACES),
    *(row(f"What of the {w} in {p}?", f"{w[::-1]} {p[::-1]} qq", kind="noise") for w in WORDS for p in PLACES),
]
WAYS = [row(f"Where is the {w}?", "north of the hill, so they say") for w in ("barn", "inn")]
TEA = [row("What is tea?", "Leaves in water.")]
LINFIK = ValuationSpec(normalize="unit")
ALINFIK = ValuationSpec("alinfik", "unit", label_rows=60, student=StudentSpec(layers=1), ensemble=3)


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> LoadedModel:
    return load(ModelSpec(tiny_model_dir))


Valued = tuple[list[Advance], dict[str, Any], dict[str, Any]]


@pytest.fixture(scope="module")
def run(model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Valued]:
    """Values the pool; (steps, columns of the scores, report)."""
    done: dict[str, Valued] = {}

    def valued(spec: ValuationSpec) -> Valued:
        key = repr(spec)
        if key not in done:
            folder = tmp_path_factory.mktemp("run")
            steps = list(value(model, POOL, {"ways": WAYS, "tea": TEA}, spec, folder))
            done[key] = steps, scores(folder), {**report(folder), "folder": folder}
        return done[key]

    return valued


def scores(folder: Path) -> dict[str, Any]:
    table = pq.read_table(folder / "scores.parquet")
    return {name: table[name].to_pylist() for name in table.column_names}


def report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_bytes())
    return found


def kept(folder: Path) -> dict[str, Any]:
    """All bytes of a finished valuation but its seconds."""
    files = {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}
    return {**files, "report.json": {k: v for k, v in report(folder).items() if k != "seconds"}}


def test_linfik_values_every_row_for_the_whole_set_and_each_group(run: Callable[..., Valued]) -> None:
    steps, found, told = run(LINFIK)
    assert found["id"] == [one.id for one in POOL]
    assert all(found["labelled"])
    assert found["uncertainty"] == [None] * len(POOL)
    assert told["groups"] == {"all": 3, "ways": 2, "tea": 1}
    ways = np.array(found["value_ways"])
    assert ways[: len(POOL) // 2].mean() > ways[len(POOL) // 2 :].mean() + 0.1
    assert told["summary"]["by_metadata"]["kind"]["way"]["rows"] == len(POOL) // 2
    assert steps[0].stage == "validation"
    assert [step.done for step in steps if step.stage == "labels"] == [BLOCK, len(POOL)]


def test_alinfik_labels_a_part_and_its_student_finds_the_same_order(run: Callable[..., Valued]) -> None:
    _, found, told = run(ALINFIK)
    truth = run(LINFIK)[1]
    assert sum(found["labelled"]) == 60
    predicted = [at for at, labelled in enumerate(found["labelled"]) if not labelled]
    assert spearman([found["value"][at] for at in predicted], [truth["value"][at] for at in predicted]) > 0.6
    assert all(found["uncertainty"][at] > 0 for at in predicted)
    labelled = [at for at, one in enumerate(found["labelled"]) if one]
    assert [found["value"][at] for at in labelled] == pytest.approx([truth["value"][at] for at in labelled], rel=1e-3)
    student = told["student"]
    assert student["trusted"] == (student["held_out_spearman"] >= 0.5)
    assert [point["labels"] for point in student["by_labels"]] == [12, 24, 48]
    assert student["held_out_rows"] == 12
    assert -1 <= student["held_out_spearman_of_lengths_alone"] < student["held_out_spearman"]


def test_the_written_student_scores_rows_without_the_model(run: Callable[..., Valued]) -> None:
    _, found, told = run(ALINFIK)
    student = load_student(told["folder"] / "student")
    again, uncertainty = student.score(POOL)
    assert student.groups == ("all", "ways", "tea")
    for at, labelled in enumerate(found["labelled"]):
        if not labelled:  # its features were kept in half precision
            assert again[at, 0] == pytest.approx(found["value"][at], abs=2e-3)
            assert uncertainty[at, 0] == pytest.approx(found["uncertainty"][at], abs=2e-3)


@pytest.mark.parametrize("damage", [b"", b"not safetensors", b"\xff" * 64])
def test_a_damaged_head_is_named(run: Callable[..., Valued], tmp_path: Path, damage: bytes) -> None:
    folder = tmp_path / "student"
    shutil.copytree(run(ALINFIK)[2]["folder"] / "student", folder)
    (folder / HEAD).write_bytes(damage)
    with pytest.raises(ModelError, match="there is no student in 'student'"):
        load_student(folder)


def test_the_bi_encoder_values_rows_for_a_new_validation_set(run: Callable[..., Valued], model: LoadedModel) -> None:
    spec = replace(ALINFIK, student=StudentSpec(layers=1, form="pairs"))
    _, found, told = run(spec)
    truth = run(LINFIK)[1]
    predicted = [at for at, labelled in enumerate(found["labelled"]) if not labelled]
    assert spearman([found["value"][at] for at in predicted], [truth["value"][at] for at in predicted]) > 0.5
    folder = told["folder"] / "student"
    body, pairs = load_student(folder).body, load_pairs(folder)
    new = [row(f"Where is the {w}?", "north of the hill, so they say") for w in ("well", "moor")]
    sides = [body.features(rows).double().numpy() for rows in (POOL, new)]
    served = pairs.candidates(sides[0]) @ pairs.validation(sides[1]).mean(0)
    assert spearman(served, truth["value_ways"]) > 0.5


@pytest.mark.parametrize(
    "spec",
    [
        LINFIK,
        replace(ALINFIK, draw="spread", rounds=2),
        replace(ALINFIK, student=StudentSpec(layers=1, form="pairs")),
    ],
)
def test_a_run_that_was_killed_anywhere_ends_in_the_same_bytes(
    run: Callable[..., Valued], model: LoadedModel, tmp_path: Path, spec: ValuationSpec
) -> None:
    steps, _, told = run(spec)
    groups = {"ways": WAYS, "tea": TEA}
    for stop in range(1, len(steps), 2):
        list(islice(value(model, POOL, groups, spec, tmp_path), stop))
    again = list(value(model, POOL, groups, spec, tmp_path))
    assert again[-1].stage == "scores"
    assert kept(tmp_path) == kept(told["folder"])
    assert not (tmp_path / "work").exists()
    assert list(value(model, POOL, groups, spec, tmp_path)) == [
        Advance("scores", 1, 1, "an earlier run had finished it")
    ]


def test_a_second_round_labels_where_the_student_was_unsure(run: Callable[..., Valued]) -> None:
    one, two = run(ALINFIK)[1], run(replace(ALINFIK, rounds=2))[1]
    assert sum(two["labelled"]) == sum(one["labelled"])
    assert two["labelled"] != one["labelled"]


def test_a_student_that_is_too_poor_is_called_so_by_its_number(model: LoadedModel, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noise = [row("x", "".join(rng.choice(list("abcdefgh "), 12)) + "z") for _ in range(80)]
    spec = replace(ALINFIK, label_rows=30)
    list(value(model, noise, {"ways": WAYS}, spec, tmp_path))
    told = report(tmp_path)
    assert told["student"]["held_out_spearman"] < 0.5
    assert told["student"]["trusted"] is False
    assert any(f"{told['student']['held_out_spearman']:.2f}" in warning for warning in told["warnings"])


def test_an_index_of_the_pool_gives_the_same_values(
    run: Callable[..., Valued], model: LoadedModel, tmp_path: Path
) -> None:
    some = slice(0, None, 6)
    whole = ProjectionSpec("kronecker", 128)  # wider than any side of the model: nothing is lost
    for normalisation, spec in (("none", LINFIK), ("layer", replace(LINFIK, normalize="layer"))):
        path, wanted = tmp_path / normalisation, run(spec)[1]
        list(build(path, model, POOL[some], IndexSpec(whole, normalisation)))  # type: ignore[arg-type]
        list(value(model, POOL[some], {"ways": WAYS, "tea": TEA}, spec, tmp_path / f"v-{normalisation}", path))
        found = scores(tmp_path / f"v-{normalisation}")
        assert found["value_tea"] == pytest.approx(wanted["value_tea"][some], abs=2e-3)
        assert found["value"] == pytest.approx(wanted["value"][some], abs=2e-3)


def test_an_index_that_says_something_else_is_refused(
    model: LoadedModel, tiny_model_dir: Path, tiny_adapter_dir: Path, tmp_path: Path
) -> None:
    path = tmp_path / "index"
    list(build(path, model, POOL[:8], IndexSpec(ProjectionSpec(size=8))))
    other = load(ModelSpec(tiny_model_dir, checkpoints=(Checkpoint("a", tiny_adapter_dir),)))
    with pytest.raises(Mismatch):
        list(value(other, POOL[:8], {"ways": WAYS}, replace(LINFIK, normalize="layer"), tmp_path / "a", path))
    for rows, spec in (
        (POOL[:8], LINFIK),
        (POOL[:9], replace(LINFIK, normalize="layer")),
        (POOL[:8], replace(LINFIK, normalize="layer", max_length=64)),
        (POOL, ALINFIK),
    ):
        with pytest.raises(SpecError) as caught:
            list(
                value(
                    model, rows, {"ways": WAYS}, spec, tmp_path / repr((len(rows), spec.method, spec.normalize)), path
                )
            )
        assert caught.value.field == "index"


def test_a_budget_of_seconds_stops_the_labels(model: LoadedModel, tmp_path: Path) -> None:
    spec = replace(ALINFIK, label_rows=None, label_seconds=1e-9)
    list(value(model, POOL, {"ways": WAYS}, spec, tmp_path))
    assert sum(scores(tmp_path)["labelled"]) == BLOCK
    assert any("label budget" in warning for warning in report(tmp_path)["warnings"])


def test_a_pool_of_one_has_a_value(model: LoadedModel, tmp_path: Path) -> None:
    list(value(model, POOL[:1], {"ways": WAYS}, LINFIK, tmp_path))
    assert scores(tmp_path)["value"][0] > 0


def test_validation_rows_among_the_candidates_are_left_out_or_kept_on_request(
    model: LoadedModel, tmp_path: Path
) -> None:
    rows = [*POOL[:2], POOL[0], WAYS[0]]
    list(value(model, rows, {"ways": WAYS}, LINFIK, tmp_path / "a"))
    assert scores(tmp_path / "a")["id"] == [POOL[0].id, POOL[1].id]
    assert len(report(tmp_path / "a")["warnings"]) == 2
    list(value(model, rows, {"ways": WAYS}, replace(LINFIK, keep_validation=True), tmp_path / "b"))
    assert scores(tmp_path / "b")["id"] == [POOL[0].id, POOL[1].id, WAYS[0].id]
    assert "too high" in report(tmp_path / "b")["warnings"][1]


def test_a_row_without_a_response_token_has_no_value_and_is_counted(model: LoadedModel, tmp_path: Path) -> None:
    rows = [POOL[0], row("y" * 100, "never seen")]
    list(value(model, rows, {"tea": [row("a", "b")]}, replace(LINFIK, max_length=90), tmp_path))
    assert [one is None for one in scores(tmp_path)["value"]] == [False, True]
    assert "1 rows have no response token" in report(tmp_path)["warnings"][0]
    with pytest.raises(RowError):
        list(value(model, rows[1:], {"tea": [row("a", "b")]}, replace(LINFIK, max_length=90), tmp_path / "none"))


def test_a_loss_that_is_not_finite_has_no_value(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = load(ModelSpec(tiny_model_dir))
    letter = model.tokenizer("J", add_special_tokens=False)["input_ids"][0]
    with torch.no_grad():
        model.model.get_input_embeddings().weight[letter] = torch.nan
    list(value(model, [POOL[0], row("Jam?", "No.")], {"ways": WAYS}, LINFIK, tmp_path))
    assert [one is None for one in scores(tmp_path)["value"]] == [False, True]
    with pytest.raises(SpecError) as caught:
        list(value(model, POOL[:1], {"jam": [row("Jam?", "No.")]}, LINFIK, tmp_path / "none"))
    assert caught.value.field == "validation"


def refused() -> Iterator[tuple[list[Row], dict[str, list[Row]], ValuationSpec, str]]:
    yield [], {"ways": WAYS}, LINFIK, "candidates"
    yield WAYS, {"ways": WAYS}, LINFIK, "candidates"
    yield POOL, {}, LINFIK, "validation"
    yield POOL, {"ways": WAYS, "none": []}, LINFIK, "validation"
    yield POOL, {"all": WAYS, "tea": TEA}, LINFIK, "validation"
    yield POOL, {"ways": WAYS}, replace(ALINFIK, label_rows=10), "label_rows"
    yield POOL[:10], {"ways": WAYS}, ALINFIK, "label_rows"
    yield POOL, {"ways": WAYS}, replace(ALINFIK, rounds=0), "rounds"
    yield POOL, {"ways": WAYS}, replace(ALINFIK, rounds=2, ensemble=0), "rounds"
    yield POOL, {"ways": WAYS}, replace(ALINFIK, rounds=2, label_seconds=3.0), "rounds"
    yield POOL, {"ways": WAYS}, replace(ALINFIK, label_seconds=-1.0), "label_seconds"
    yield POOL, {"ways": WAYS}, replace(ALINFIK, student=StudentSpec(layers=9)), "student.layers"


@pytest.mark.parametrize(("rows", "groups", "spec", "field"), list(refused()))
def test_what_cannot_be_valued_is_refused_by_its_field(
    model: LoadedModel, tmp_path: Path, rows: list[Row], groups: dict[str, list[Row]], spec: ValuationSpec, field: str
) -> None:
    with pytest.raises(SpecError) as caught:
        list(value(model, rows, groups, spec, tmp_path))
    assert caught.value.field == field


def test_a_folder_of_another_valuation_is_refused(model: LoadedModel, tmp_path: Path) -> None:
    list(value(model, POOL[:2], {"ways": WAYS}, LINFIK, tmp_path))
    with pytest.raises(SpecError, match="other rows"):
        list(value(model, POOL[:3], {"ways": WAYS}, LINFIK, tmp_path))

"""Vectors in 8 bits: half the room, the same order but for what the rounding explains, and everything else as ever."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file, save_file

from app.influence import index as index_module
from app.influence.building import append, build, repair
from app.influence.corpus import Message, Row, parse_row
from app.influence.errors import IndexCorrupt, SpecError
from app.influence.index import MANIFEST, IndexSpec, delete, open_index, publish, read_manifest
from app.influence.models import Checkpoint, LoadedModel, ModelSpec, load
from app.influence.projection import ProjectionSpec
from app.influence.retrieval import Options, Query, influence

FP16 = IndexSpec(ProjectionSpec(size=8), shard_rows=9, token_budget=200)
INT8 = replace(FP16, codes="int8")


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path, tiny_adapter_dir: Path) -> LoadedModel:
    checkpoints = (Checkpoint("early", tiny_adapter_dir, weight=0.5), Checkpoint("late", tiny_adapter_dir))
    return load(ModelSpec(tiny_model_dir, checkpoints=checkpoints))


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return [parse_row({"prompt": f"Question {i}?", "response": "word " * (i % 4 + 1) + str(i)}) for i in range(24)]


@pytest.fixture(scope="module")
def whole(model: LoadedModel, rows: list[Row], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("codes") / "fp16"
    list(build(path, model, rows, FP16))
    return path


@pytest.fixture
def path(model: LoadedModel, rows: list[Row], tmp_path: Path) -> Path:
    list(build(tmp_path / "int8", model, rows, INT8))
    return tmp_path / "int8"


def files(path: Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


@pytest.mark.parametrize("normalize", ["none", "unit"])
@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("longest", [2**20, 100])  # of a file: 100 cuts through checkpoints
@pytest.mark.parametrize("codes", ["fp16", "int8"])
def test_the_scan_is_the_product_with_what_is_stored(
    model: LoadedModel,
    rows: list[Row],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    codes: str,
    longest: int,
    queries: int,
    normalize: str,
) -> None:
    monkeypatch.setattr(index_module, "LONGEST", longest)
    monkeypatch.setattr(index_module, "DEEP", 4)
    monkeypatch.setattr(index_module, "WIDE", 64)
    list(build(tmp_path / "i", model, rows, replace(FP16, codes=codes)))
    index = open_index(tmp_path / "i")
    width = index.manifest.width
    asked = torch.randn(queries, 2 * width)
    units, norms = index.vectors(index.ids)
    each = (asked.view(queries, 1, 2, width).double() * units.view(1, -1, 2, width)).sum(3)  # [queries, rows, 2]
    exact = (each * norms if normalize == "none" else each).sum(2)
    found = index.scores(asked, normalize)  # type: ignore[arg-type]
    assert (found - exact).abs().max() <= 1e-3 * exact.abs().max()  # int8 is given out rounded to half precision


def test_eight_bits_are_half_the_room_and_nearly_the_same_scores(path: Path, whole: Path) -> None:
    small, large = open_index(path), open_index(whole)
    assert small.manifest.stats["bytes"] < 0.6 * large.manifest.stats["bytes"]
    assert large.manifest.stats["bytes"] - small.manifest.stats["bytes"] == large.manifest.width * 2 * len(large.ids)
    (units, norms), (exact, same) = small.vectors(small.ids), large.vectors(large.ids)
    assert torch.equal(norms, same)
    step = exact.view(-1, 2, large.manifest.width).abs().amax(2) / 127  # of a code: half of it is the most to be off
    off = (units - exact).view(-1, 2, large.manifest.width).abs().amax(2)
    assert (off <= 0.52 * step + 1e-3 * 127 * step).all()
    asked = large.vectors(large.ids)[0]
    for normalize in ("none", "unit"):
        near, scores = (index.scores(asked, normalize) for index in (small, large))  # type: ignore[arg-type]
        assert (near - scores).abs().max() <= 0.02 * scores.abs().max()
    assert [found[0].id for found in small.top(asked, 1, "unit", True)] == small.ids  # each row finds itself


def test_an_answer_holds_together(path: Path, model: LoadedModel, rows: list[Row]) -> None:
    query = Query((Message("user", "Question 3?"),), "word 3")
    (answer,) = influence(model, open_index(path), [query], Options(5, "query", "both"), lambda _: pytest.fail("asked"))
    for hit in (*answer.proponents, *answer.opponents):
        assert hit.token_scores is not None
        mean = sum(hit.token_scores) / len(hit.token_scores)
        assert mean == pytest.approx(hit.score, rel=5e-3, abs=5e-3 * abs(answer.proponents[0].score))


def test_rows_come_and_go_and_damage_is_repaired_to_the_same_bytes(
    path: Path, model: LoadedModel, rows: list[Row]
) -> None:
    new = parse_row({"prompt": "New?", "response": "new"})
    list(append(path, model, [new]))
    assert delete(path, [rows[2].id]) == 1
    before = files(path)
    by_id = {row.id: row for row in [*rows, new]}
    for name in ("000000.faiss", "000001.safetensors", "000003.faiss"):
        (path / "shards" / name).write_bytes(b"damaged")
    with pytest.raises(IndexCorrupt):
        open_index(path)
    list(repair(path, model, by_id.__getitem__))
    assert files(path) == before
    assert sorted(open_index(path).ids) == sorted({*by_id} - {rows[2].id})


def test_a_sidecar_of_other_codes_is_refused(path: Path, whole: Path, tmp_path: Path) -> None:
    for folder, steps in ((path, False), (Path(shutil.copytree(whole, tmp_path / "fp16")), True)):
        side = load_file(folder / "shards" / "000000.safetensors")
        kept = {name: value for name, value in side.items() if name != "steps"}
        if steps:
            kept["steps"] = side["norms"]
        save_file(kept, folder / "shards" / "000000.safetensors")
        manifest = read_manifest(folder)
        size = (folder / "shards" / "000000.safetensors").stat().st_size
        manifest.shards[0]["files"][-1][1] = size
        publish(folder, manifest)
        with pytest.raises(IndexCorrupt, match="kind"):
            open_index(folder, verify=False)


def test_codes_that_there_are_not_are_refused() -> None:
    with pytest.raises(SpecError, match="fp16, int8"):
        IndexSpec(codes="int4")  # type: ignore[arg-type]


def test_a_manifest_from_before_there_were_codes_is_fp16(tmp_path: Path, model: LoadedModel, rows: list[Row]) -> None:
    list(build(tmp_path / "i", model, rows[:4], FP16))
    file = tmp_path / "i" / MANIFEST
    manifest = json.loads(file.read_bytes())
    del manifest["spec"]["codes"]
    file.write_text(json.dumps(manifest), encoding="utf-8")
    list(append(tmp_path / "i", model, rows[4:8]))
    index = open_index(tmp_path / "i")
    assert index.manifest.index_spec == FP16 and len(index.ids) == 8

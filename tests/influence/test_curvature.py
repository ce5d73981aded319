"""Preconditioned scores are those of the exact second moments, and follow the index wherever it goes."""

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from app.influence import building, curvature
from app.influence.building import append, build, compute_shard, measure, plan_build, publish_build, repair
from app.influence.corpus import Encoder, Message, Row, parse_row
from app.influence.curvature import DAMPING
from app.influence.errors import IndexCorrupt, QueryError
from app.influence.gradients import gradients, plan_for
from app.influence.index import Index, IndexSpec, delete, open_index, publish, read_manifest
from app.influence.metric import BY_NORM
from app.influence.models import Checkpoint, LoadedModel, ModelSpec, load
from app.influence.projection import ProjectionSpec
from app.influence.retrieval import Options, Query, influence

SPEC = IndexSpec(ProjectionSpec(size=4), normalisation="none", shard_rows=5, token_budget=200)
LAYER = replace(SPEC, normalisation="layer")
QUERY = Query((Message("user", "Question 3?"),), "word 3 and")
OTHERS = [Query((Message("user", "Who?"),), "word 9", (0, 4)), Query((), "word word")]
WAYS = [("fisher", "none"), ("fisher", "unit"), ("trackstar", "unit")]


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path, tiny_adapter_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """Two checkpoints of different weight."""
    later = tmp_path_factory.mktemp("later") / "adapter"
    shutil.copytree(tiny_adapter_dir, later)
    file = later / "adapter_model.safetensors"
    save_file({name: 1.3 * tensor for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    checkpoints = (Checkpoint("early", tiny_adapter_dir, weight=0.5), Checkpoint("late", later, weight=2.0))
    return load(ModelSpec(tiny_model_dir, checkpoints=checkpoints))


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return [parse_row({"prompt": f"Question {i}?", "response": "word " * (i % 4 + 1) + str(i)}) for i in range(12)]


@pytest.fixture(scope="module", params=["none", "layer"])
def built(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, model: LoadedModel, rows: list[Row]
) -> Path:
    """For tests that change nothing."""
    path = tmp_path_factory.mktemp("built") / "index"
    list(build(path, model, rows, LAYER if request.param == "layer" else SPEC))
    return path


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, model: LoadedModel, rows: list[Row]) -> Path:
    path = tmp_path_factory.mktemp("kept") / "index"
    list(build(path, model, rows, SPEC))
    return path


@pytest.fixture
def path(kept: Path, tmp_path: Path) -> Path:
    return shutil.copytree(kept, tmp_path / "index")


def file_of(path: Path) -> Path:
    record = read_manifest(path).curvature
    assert record is not None
    return path / record["name"]


def ask(index: Index, model: LoadedModel, *queries: Query, **how: Any) -> list[Any]:
    options = Options(**{"top_k": 50, "tokens": "none", "direction": "both"} | how)
    return influence(model, index, queries or [QUERY], options, lambda _: pytest.fail("no text is needed"))


def scores_of(answer: Any) -> dict[str, float]:
    return {hit.id: hit.score for hit in (*answer.proponents, *answer.opponents)}


def inverses_of(vectors: torch.Tensor, places: list[slice]) -> list[torch.Tensor]:
    """The damped inverses of rows' second moments [rows, width], in float64, by eigenvalues."""
    found = []
    for place in places:
        moments = vectors[:, place].double().T @ vectors[:, place].double() / len(vectors)
        values, basis = torch.linalg.eigh(moments)
        found.append(basis @ torch.diag(1 / (values + DAMPING * values.mean())) @ basis.T)
    return found


def exact_scores(
    model: LoadedModel, spec: IndexSpec, rows: list[Row], query: Query, precondition: str, normalize: str
) -> dict[str, float]:
    """From gradients that were never rounded or stored, whitened one by one by the square root of each inverse."""
    encoder, plan = Encoder(model.tokenizer), plan_for(model, spec.projection, spec.normalisation)
    examples = [*(encoder.encode(row) for row in rows), encoder.encode_query(query.messages, query.generation)[0]]
    total = torch.zeros(len(rows), dtype=torch.float64)
    for checkpoint in model.checkpoints:
        vectors = gradients(model, checkpoint, plan, examples).vectors.double()
        places = [made.place for made in plan.sketches.values()]
        roots = torch.zeros(plan.width, plan.width, dtype=torch.float64)
        for place, inverse in zip(places, inverses_of(vectors[:-1], places), strict=True):
            values, basis = torch.linalg.eigh(inverse)
            roots[place, place] = basis @ torch.diag(values.sqrt()) @ basis.T
        if precondition == "trackstar":
            white = vectors @ roots
            white = white / white.norm(dim=1, keepdim=True)
            total += checkpoint.weight * (white[:-1] @ white[-1])
            continue
        turned, own = roots @ roots @ vectors[-1], vectors[:-1]
        if normalize == "unit":
            turned, own = turned / turned.norm(), own / own.norm(dim=1, keepdim=True)
        total += checkpoint.weight * (own @ turned)
    return {row.id: float(score) for row, score in zip(rows, total, strict=True)}


@pytest.mark.parametrize(("precondition", "normalize"), WAYS)
def test_scores_are_those_of_the_whitened_gradients(
    built: Path, model: LoadedModel, rows: list[Row], precondition: str, normalize: str
) -> None:
    index = open_index(built)
    exact = exact_scores(model, index.manifest.index_spec, rows, QUERY, precondition, normalize)
    (answer,) = ask(index, model, precondition=precondition, normalize=normalize)
    found = scores_of(answer)
    largest = max(map(abs, exact.values()))
    assert found == {row: pytest.approx(score, abs=1e-2 * largest) for row, score in exact.items()}  # fp16's rounding
    order = sorted(exact, key=exact.__getitem__, reverse=True)
    assert answer.proponents[0].id == order[0]
    for hit in (*answer.proponents, *answer.opponents):
        assert hit.percentile == pytest.approx(
            100 * (len(rows) - 1 - sorted(found.values())[::-1].index(hit.score)) / 12
        )
    definition = answer.definition
    assert (definition.precondition, definition.damping, definition.moments_rows) == (precondition, DAMPING, 12)
    assert precondition in definition.name and "mean eigenvalue" in definition.formula


def test_inverses_and_scales_are_those_of_what_is_stored(built: Path) -> None:
    index = open_index(built)
    assert index.curvature is not None
    units, norms = index.vectors(index.ids)
    width = index.manifest.width
    probes = torch.randn(6, 2 * width)
    applied = index.curvature.apply(probes)
    for at in range(2):
        mine = slice(at * width, (at + 1) * width)
        inverses = inverses_of(units[:, mine].double() * norms[:, [at]], index.manifest.blocks())
        exact = torch.zeros(6, width, dtype=torch.float64)
        squares = torch.zeros(len(units), dtype=torch.float64)
        for place, inverse in zip(index.manifest.blocks(), inverses, strict=True):
            exact[:, place] = probes[:, mine][:, place].double() @ inverse
            part = units[:, mine][:, place].double()
            squares += (part @ inverse * part).sum(1)
        assert torch.allclose(applied[:, mine].double(), exact, rtol=1e-3, atol=1e-4 * float(exact.abs().max()))
        assert torch.allclose(index.scales(index.ids)[:, at].double(), squares.rsqrt(), rtol=1e-4)


@pytest.mark.parametrize(("precondition", "normalize"), WAYS)
def test_scores_do_not_depend_on_who_asks_at_the_same_time(
    built: Path, model: LoadedModel, precondition: str, normalize: str
) -> None:
    index, queries = open_index(built), [QUERY, *OTHERS]
    how = {"precondition": precondition, "normalize": normalize}
    for together, query in zip(ask(index, model, *queries, **how), queries, strict=True):
        (alone,) = ask(index, model, query, **how)
        largest = max(map(abs, scores_of(alone).values()))
        assert scores_of(together) == {
            row: pytest.approx(score, rel=1e-3, abs=1e-4 * largest) for row, score in scores_of(alone).items()
        }


@pytest.mark.parametrize(("precondition", "normalize"), WAYS)
def test_token_scores_average_to_the_row_score(
    built: Path, model: LoadedModel, rows: list[Row], precondition: str, normalize: str
) -> None:
    by_id = {row.id: row for row in rows}
    options = Options(3, "both", "both", normalize, precondition)  # type: ignore[arg-type]
    index = open_index(built)
    (answer,) = influence(model, index, [QUERY], options, by_id.__getitem__)
    asked = replace(options, tokens="query")
    (by_nudges,) = influence(model, index, [QUERY], replace(asked, top_k=1), by_id.__getitem__)
    (by_backwards,) = influence(model, index, [QUERY], replace(asked, top_k=12), by_id.__getitem__)
    assert (by_nudges.definition.tokens_route, by_backwards.definition.tokens_route) == ("nudges", "backwards")
    largest = abs(answer.proponents[0].score)
    for one in (answer, by_nudges, by_backwards):
        for hit in (*one.proponents, *one.opponents):
            close = pytest.approx(hit.score, rel=1e-2, abs=1e-2 * largest)
            assert hit.token_scores and sum(hit.token_scores) / len(hit.token_scores) == close
            if one is answer:
                assert hit.train_tokens and hit.pair_scores
                assert sum(token.score for token in hit.train_tokens) / len(hit.train_tokens) == close
                assert float(torch.tensor(hit.pair_scores).mean()) == close
    for other in (by_nudges, by_backwards):
        same = pytest.approx(answer.proponents[0].token_scores, rel=2e-2, abs=2e-2 * largest)
        assert other.proponents[0].token_scores == same


@pytest.mark.parametrize("largest", [True, False])
def test_a_scaled_search_among_some_rows_is_brute_force(built: Path, largest: bool) -> None:
    index = open_index(built)
    vectors = torch.randn(3, 2 * index.manifest.width)
    units, _ = index.vectors(index.ids)
    exact = vectors @ (units * index.scales(index.ids).repeat_interleave(index.manifest.width, 1)).T
    among = index.ids[2:9]
    for one, scores in zip(index.top(vectors, 4, "scaled", largest, among), exact, strict=True):
        order = [n for n in scores.argsort(descending=largest).tolist() if index.ids[n] in among]
        assert [hit.id for hit in one] == [index.ids[n] for n in order[:4]]
        assert [hit.score for hit in one] == pytest.approx(scores[order[:4]].tolist(), rel=1e-4)


def test_the_same_bytes_come_of_any_order_of_work_and_of_a_crash(
    kept: Path, tmp_path: Path, model: LoadedModel, rows: list[Row]
) -> None:
    ids = [row.id for row in rows]
    other = tmp_path / "parts"
    parts = plan_build(other, model, ids, SPEC)
    for part in reversed(parts):  # as workers would, each its own
        list(compute_shard(other, model, rows[part.start : part.start + part.rows], SPEC, part.number))
    list(measure(other, model, ids, (), SPEC))
    steps = publish_build(other, model, ids, SPEC, parts)
    seen = list(itertools.islice(steps, 4))
    steps.close()  # type: ignore[attr-defined]
    assert not (other / "manifest.json").exists()
    assert {step.stage for step in seen} == {"curvature"} and seen[0].total_rows == 2 * 2 * 12
    list(publish_build(other, model, ids, SPEC, parts))
    assert file_of(other).read_bytes() == file_of(kept).read_bytes()
    assert (other / "manifest.json").read_bytes() == (kept / "manifest.json").read_bytes()
    assert not list(other.glob("*.part"))


def test_moments_follow_what_is_added_deleted_and_repaired(path: Path, model: LoadedModel, rows: list[Row]) -> None:
    new = [parse_row({"prompt": f"New {i}?", "response": f"new {i}"}) for i in range(3)]
    everyone = {row.id: row for row in [*rows, *new]}
    before = file_of(path)
    list(append(path, model, new))
    after = file_of(path)
    assert before.exists() and after != before, "who has the last manifest still finds its file"
    exact = exact_scores(model, SPEC, [*rows, *new], QUERY, "trackstar", "unit")
    found = scores_of(ask(open_index(path), model, precondition="trackstar")[0])
    assert found == {row: pytest.approx(score, abs=1e-2) for row, score in exact.items()}

    content = after.read_bytes()
    delete(path, [rows[2].id, new[0].id])
    left = scores_of(ask(open_index(path), model, precondition="trackstar")[0])
    assert left == {row: score for row, score in found.items() if row not in (rows[2].id, new[0].id)}
    assert file_of(path).read_bytes() == content, "a deletion changes no other row's score"

    after.write_bytes(b"damaged")
    (path / "shards" / "000001.faiss").write_bytes(b"damaged")
    list(repair(path, model, everyone.__getitem__))
    assert file_of(path).read_bytes() == content
    assert not list(path.glob("*.corrupt"))

    list(append(path, model, [rows[2]]))  # it comes back
    index = open_index(path)
    assert index.curvature is not None and index.curvature.rows == 15, "and is counted once"
    assert len(index.curvature.scales) == 16
    back = scores_of(ask(index, model, precondition="trackstar")[0])
    assert back == {row: pytest.approx(score, abs=1e-3) for row, score in found.items() if row != new[0].id}
    assert {file.name for file in path.glob("curvature-*")} == {after.name, file_of(path).name}


@pytest.mark.parametrize("damage", ["cut", "flipped", "lost", "another"])
def test_a_damaged_file_is_named_and_not_used(path: Path, model: LoadedModel, rows: list[Row], damage: str) -> None:
    file = file_of(path)
    raw = file.read_bytes()
    if damage == "lost":
        file.unlink()
    elif damage == "another":  # a whole file, of other blocks, that the manifest names
        save_file({"rows": torch.tensor(1), "scales": torch.ones(1, 2), "inverse.0": torch.ones(1)}, file)
        publish(path, replace(read_manifest(path), curvature=building.file_record(file)))
    else:
        file.write_bytes(raw[:-9] if damage == "cut" else raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:])
    with pytest.raises(IndexCorrupt, match=file.name) as caught:
        open_index(path)
    assert caught.value.shard == file.name
    if damage in ("cut", "flipped"):
        assert not file.exists() and file.with_name(f"{file.name}.corrupt").exists()
    if damage != "another":
        list(repair(path, model, lambda _: pytest.fail("no gradient is computed")))
        assert file.read_bytes() == raw
        open_index(path)


def test_an_index_of_before_says_what_gathers_them_and_works_without(path: Path, model: LoadedModel) -> None:
    def aged() -> None:
        file_of(path).unlink()
        manifest = json.loads((path / "manifest.json").read_bytes())
        del manifest["curvature"]
        (path / "manifest.json").write_text(json.dumps(manifest))

    before = ask(open_index(path), model, precondition="fisher")[0]
    plain = scores_of(ask(open_index(path), model)[0])
    aged()
    index = open_index(path)
    assert scores_of(ask(index, model)[0]) == plain
    for precondition in ("fisher", "trackstar"):
        with pytest.raises(QueryError, match="repair") as caught:
            ask(index, model, precondition=precondition)
        assert caught.value.field == "precondition"
    shards = {file.name: file.read_bytes() for file in (path / "shards").iterdir()}
    list(repair(path, model, lambda _: pytest.fail("no gradient is computed")))
    assert {file.name: file.read_bytes() for file in (path / "shards").iterdir()} == shards
    assert scores_of(ask(open_index(path), model, precondition="fisher")[0]) == scores_of(before)


def test_one_block_of_summed_modules_is_a_block(tmp_path: Path, model: LoadedModel, rows: list[Row]) -> None:
    spec = replace(SPEC, projection=ProjectionSpec("global", 64))
    list(build(tmp_path / "index", model, rows, spec))
    index = open_index(tmp_path / "index")
    units, norms = index.vectors(index.ids)
    (inverse,) = inverses_of(units[:, 64:].double() * norms[:, [1]], [slice(0, 64)])
    assert index.curvature is not None
    probe = torch.randn(1, 128)
    assert torch.allclose(index.curvature.apply(probe)[:, 64:].double(), probe[:, 64:].double() @ inverse, rtol=1e-3)
    (answer,) = ask(index, model, precondition="trackstar")
    assert answer.proponents


def test_a_projection_without_room_for_moments_says_which_has(
    tmp_path: Path, model: LoadedModel, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = replace(SPEC, projection=ProjectionSpec("rapidgrad", 2**13))
    list(build(tmp_path / "index", model, rows[:3], spec))
    index = open_index(tmp_path / "index")
    assert index.manifest.curvature is None and not list(tmp_path.glob("index/curvature-*"))
    assert ask(index, model)[0].proponents
    with pytest.raises(QueryError, match="kronecker") as caught:
        ask(index, model, precondition="fisher")
    assert caught.value.field == "precondition"
    monkeypatch.setattr(curvature, "LARGEST", 100)
    list(build(tmp_path / "large", model, rows[:3], SPEC))
    with pytest.raises(QueryError, match="smaller projection"):
        ask(open_index(tmp_path / "large"), model, precondition="fisher")


def test_a_trackstar_score_is_a_cosine(built: Path, model: LoadedModel) -> None:
    with pytest.raises(QueryError) as caught:
        ask(open_index(built), model, precondition="trackstar", normalize="none")
    assert caught.value.field == "normalize"


def test_modules_without_a_gradient_count_for_nothing(
    tmp_path: Path, tiny_model_dir: Path, tiny_adapter_dir: Path, rows: list[Row]
) -> None:
    fresh = shutil.copytree(tiny_adapter_dir, tmp_path / "fresh")
    file = fresh / "adapter_model.safetensors"
    save_file(
        {name: tensor * ("lora_B" not in name) for name, tensor in load_file(file).items()},
        file,
        metadata={"format": "pt"},
    )
    model = load(ModelSpec(tiny_model_dir, checkpoints=(Checkpoint("fresh", fresh),)))  # no lora_A has a gradient
    list(build(tmp_path / "index", model, rows, SPEC))
    index = open_index(tmp_path / "index")
    assert index.curvature is not None
    dead = [
        place
        for place, module in zip(index.manifest.blocks(), index.manifest.attributed, strict=True)
        if "lora_A" in module["name"]
    ]
    applied = index.curvature.apply(torch.ones(1, index.manifest.width))
    assert dead and all(not applied[:, place].any() for place in dead)
    for precondition, normalize in WAYS:
        (answer,) = ask(index, model, precondition=precondition, normalize=normalize)
        assert len(scores_of(answer)) == 12 and all(abs(score) < float("inf") for score in scores_of(answer).values())


@pytest.mark.parametrize("precondition", ["none", "fisher"])
@pytest.mark.parametrize("direction", ["proponents", "opponents"])
def test_a_row_that_wins_by_its_norm_alone_is_said_to(
    path: Path, model: LoadedModel, precondition: str, direction: str
) -> None:
    how = {"precondition": precondition, "direction": "both"}
    if direction == "opponents":  # the same rows on the other side
        manifest = read_manifest(path)
        turned = [{**one, "weight": -one["weight"]} for one in manifest.checkpoints]
        publish(path, replace(manifest, checkpoints=turned))
    index = open_index(path)
    cosines = scores_of(ask(index, model, **how)[0])
    order = sorted(cosines, key=cosines.__getitem__, reverse=direction == "proponents")
    same_side = [row for row in order if (cosines[row] > 0) == (direction == "proponents")]
    loud = same_side[-1]  # points least that way, of those that do
    shard, at = next((s, s.ids.index(loud)) for s in index.shards if loud in s.ids)
    shard.norms[at] *= 1e4
    how |= {"direction": direction}
    (answer,) = ask(index, model, normalize="none", **how)
    hits = getattr(answer, direction)
    assert hits[0].id == loud and hits[0].percentile == pytest.approx(100 * 11 / 12 if direction == "proponents" else 0)
    for hit in hits:
        by_direction = 100 * sum(score < cosines[hit.id] for score in cosines.values()) / 12
        assert hit.direction_percentile == pytest.approx(by_direction)
        ahead = hit.percentile - by_direction
        assert hit.by_norm == ((ahead if direction == "proponents" else -ahead) >= BY_NORM)
    assert hits[0].by_norm
    assert any(
        f"{sum(hit.by_norm for hit in hits)} of {len(hits)} rows" in warning and "size of their gradients" in warning
        for warning in answer.warnings
    )
    (other,) = ask(index, model, **how)
    assert not any("size of their gradients" in warning for warning in other.warnings)
    assert all(hit.direction_percentile is None and not hit.by_norm for hit in getattr(other, direction))
    among = frozenset([loud, order[0]])
    (few,) = ask(index, model, normalize="none", among=among, **how)
    assert getattr(few, direction)[0].direction_percentile == (0 if direction == "proponents" else 50)

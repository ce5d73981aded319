"""The index: equal to the exact scores, resumable, and honest about damage."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from app.influence import index as index_module
from app.influence.building import append, build
from app.influence.corpus import Encoder, Message, Row, parse_row
from app.influence.errors import IndexCorrupt, IndexMissing, Mismatch, QueryError
from app.influence.gradients import gradients, plan_for
from app.influence.index import FEW, IndexSpec, ProjectionSpec, delete, open_index
from app.influence.models import Checkpoint, LoadedModel, ModelSpec, load
from app.influence.retrieval import Options, Query, influence

SPEC = IndexSpec(ProjectionSpec(size=8), shard_rows=5, token_budget=200)


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path, tiny_adapter_dir: Path) -> LoadedModel:
    return load(ModelSpec(tiny_model_dir, checkpoints=(Checkpoint("early", tiny_adapter_dir, weight=0.5),)))


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return [parse_row({"prompt": f"Question {i}?", "response": "word " * (i % 4 + 1) + str(i)}) for i in range(12)]


@pytest.fixture
def path(tmp_path: Path, model: LoadedModel, rows: list[Row]) -> Path:
    for _ in build(tmp_path / "index", model, rows, SPEC):
        pass
    return tmp_path / "index"


def files(path: Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


@pytest.mark.parametrize("normalize", ["none", "unit"])
def test_scores_are_those_of_the_gradients(path: Path, model: LoadedModel, rows: list[Row], normalize: str) -> None:
    index = open_index(path)
    query = Query((Message("user", "Question 3?"),), "word 3")
    encoder = Encoder(model.tokenizer)
    plan = plan_for(model, SPEC.projection)
    examples = [encoder.encode(row) for row in rows] + [encoder.encode_query(query.messages, query.generation)[0]]
    vectors = gradients(model, model.checkpoints[0], plan, examples).vectors
    if normalize == "unit":
        vectors = vectors / vectors.norm(dim=1, keepdim=True)
    exact = 0.5 * vectors[:-1] @ vectors[-1]
    (answer,) = influence(model, index, [query], Options(12, "none", normalize=normalize), rows.__getitem__)  # type: ignore[arg-type]
    found = {hit.id: hit.score for hit in answer.proponents}
    scores = torch.tensor([found[row.id] for row in rows])
    assert (scores - exact).abs().max() <= 2e-3 * exact.abs().max()  # fp16's rounding


def test_faiss_agrees_with_the_block_scan(path: Path, model: LoadedModel) -> None:
    index = open_index(path)
    vector = torch.randn(index.manifest.width)
    scores = index.scores(vector[None], "unit")[0]
    order = scores.argsort(descending=True).tolist()
    for largest, places in ((True, order[:7]), (False, order[::-1][:7])):
        by_faiss = index.top(vector[None], 7, "unit", largest)[0]
        by_scan = index.top(vector.repeat(FEW, 1), 7, "unit", largest)[-1]
        assert [row.id for row in by_faiss] == [row.id for row in by_scan] == [index.ids[i] for i in places]
        for one, other in zip(by_faiss, by_scan, strict=True):
            assert one.score == pytest.approx(other.score, rel=1e-4) and one.below == other.below
    assert index.top(vector[None], 1, "unit", True)[0][0].below == pytest.approx(100 * 11 / 12)


@pytest.mark.parametrize("normalisation", ["none", "layer"])
@pytest.mark.parametrize("normalize", ["none", "unit"])
def test_token_scores_average_to_the_row_score(
    tmp_path: Path, model: LoadedModel, rows: list[Row], normalisation: str, normalize: str
) -> None:
    spec = IndexSpec(ProjectionSpec(size=8), normalisation=normalisation)  # type: ignore[arg-type]
    list(build(tmp_path / "i", model, rows, spec))
    by_id = {row.id: row for row in rows}
    query = Query((Message("user", "Who?"),), "word 3 and more", span=(2, 9))
    options = Options(3, "both", "both", normalize)  # type: ignore[arg-type]
    (answer,) = influence(model, open_index(tmp_path / "i"), [query], options, by_id.__getitem__)
    for hit in (*answer.proponents, *answer.opponents):
        assert hit.token_scores and hit.train_tokens and hit.pair_scores
        assert len(hit.token_scores) == sum(token.in_span for token in answer.tokens) == 7
        close = pytest.approx(hit.score, rel=5e-3, abs=5e-3 * abs(answer.proponents[0].score))
        assert sum(hit.token_scores) / len(hit.token_scores) == close
        assert sum(token.score for token in hit.train_tokens) / len(hit.train_tokens) == close
        assert float(torch.tensor(hit.pair_scores).mean()) == close


def test_an_unfinished_build_resumes_to_the_same_bytes(
    tmp_path: Path, path: Path, model: LoadedModel, rows: list[Row]
) -> None:
    broken = tmp_path / "broken"
    steps = build(broken, model, rows, SPEC)
    for _ in range(4):
        next(steps)
    steps.close()  # type: ignore[attr-defined]
    with pytest.raises(IndexMissing):
        open_index(broken)
    list(build(broken, model, rows, SPEC))
    assert files(broken) == files(path)


@pytest.mark.parametrize("damage", [lambda raw: raw[:-9], lambda raw: raw[:80] + bytes([raw[80] ^ 1]) + raw[81:]])
def test_a_damaged_shard_is_named_and_refused(path: Path, damage: object) -> None:
    shard = path / "shards" / "000001.faiss"
    shard.write_bytes(damage(shard.read_bytes()))  # type: ignore[operator]
    with pytest.raises(IndexCorrupt, match="000001"):
        open_index(path)
    assert shard.with_suffix(".faiss.corrupt").exists()


def test_rows_come_and_go_by_id(path: Path, model: LoadedModel, rows: list[Row]) -> None:
    new = parse_row({"prompt": "New?", "response": "new"})
    list(append(path, model, [new, rows[0]]))
    list(append(path, model, [new]))
    assert sorted(open_index(path).ids) == sorted(row.id for row in [*rows, new])
    assert delete(path, [new.id, rows[2].id, "0" * 16]) == 2
    assert delete(path, [new.id]) == 0
    list(append(path, model, [new]))
    assert sorted(open_index(path).ids) == sorted(row.id for row in [*rows[:2], *rows[3:], new])


def test_another_model_is_refused(path: Path, tiny_model_dir: Path, model: LoadedModel) -> None:
    with pytest.raises(Mismatch, match="adapter:early") as caught:
        open_index(path).check(load(ModelSpec(tiny_model_dir)))
    assert set(caught.value.differs) == {"adapter:early"}


@pytest.mark.parametrize(("text", "span"), [(" ", None), ("word " * 200, None), ("word", (2, 9)), ("word", (2, 2))])
def test_a_generation_that_cannot_be_attributed_is_refused(
    path: Path, model: LoadedModel, text: str, span: tuple[int, int] | None
) -> None:
    query = Query((Message("user", "Who?"),), text, span)
    with pytest.raises(QueryError):
        influence(model, open_index(path), [query], Options(), lambda _: pytest.fail("not asked"))


@pytest.mark.parametrize("whole", [False, True], ids=["adapters", "models"])
@pytest.mark.parametrize("normalize", ["none", "unit"])
def test_checkpoints_add_up_by_their_weights(
    tmp_path: Path, tiny_model_dir: Path, tiny_adapter_dir: Path, rows: list[Row], whole: bool, normalize: str
) -> None:
    def other(path: Path, folder: Path) -> Path:
        """The same, a little further on."""
        shutil.copytree(path, folder)
        file = next(folder.glob("*.safetensors"))
        save_file({name: 1.1 * tensor for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
        return folder

    if whole:
        two = (
            Checkpoint("a", model=tiny_model_dir),
            Checkpoint("b", model=other(tiny_model_dir, tmp_path / "m"), weight=3),
        )
    else:
        two = (Checkpoint("a", tiny_adapter_dir), Checkpoint("b", other(tiny_adapter_dir, tmp_path / "m"), weight=3))
    query = Query((Message("user", "Question 3?"),), "word 3 and more")
    options = Options(len(rows), "query", normalize=normalize)  # type: ignore[arg-type]
    scores = []
    for checkpoints in (two[:1], two[1:], two):
        model = load(ModelSpec(tiny_model_dir, checkpoints=checkpoints))
        path = tmp_path / "-".join(c.name for c in checkpoints)
        list(build(path, model, rows, SPEC, rows[:3]))
        index = open_index(path)
        assert all("heldout_loss" in c for c in index.manifest.checkpoints)
        (answer,) = influence(model, index, [query], options, rows.__getitem__)  # type: ignore[arg-type]
        scores.append({hit.id: torch.tensor([hit.score, *(hit.token_scores or [])]) for hit in answer.proponents})
    first, second, both = scores
    largest = max(float(one.abs().max()) for one in both.values())
    for row in rows:  # the weights are in each index's scores already
        assert (first[row.id] + second[row.id] - both[row.id]).abs().max() <= 1e-2 * largest


def test_an_over_fitted_checkpoint_is_reported(tmp_path: Path, tiny_model_dir: Path, rows: list[Row]) -> None:
    trained = parse_row({"prompt": "Where?", "response": "north of the hill, so they say"})  # as conftest trains it
    model = load(ModelSpec(tiny_model_dir))
    list(build(tmp_path / "i", model, [trained], SPEC, rows))
    index = open_index(tmp_path / "i")
    assert any("over-fitted" in warning for warning in index.manifest.warnings)
    query = Query((Message("user", "Question?"),), "word 3")
    (answer,) = influence(model, index, [query], Options(tokens="none"), rows.__getitem__)  # type: ignore[arg-type]
    assert any("over-fitted" in w for w in answer.warnings) and any("loss" in w for w in answer.warnings)


def test_vectors_longer_than_faiss_reads_lie_in_several_files(
    tmp_path: Path, path: Path, model: LoadedModel, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = open_index(path)
    monkeypatch.setattr(index_module, "LONGEST", whole.manifest.width // 3)
    list(build(tmp_path / "parts", model, rows, SPEC))
    parts = open_index(tmp_path / "parts")
    assert len(parts.shards[0].parts) > 2
    vector = torch.randn(2, whole.manifest.width)
    for normalize in ("none", "unit"):
        found = parts.scores(vector, normalize)  # type: ignore[arg-type]
        assert torch.allclose(found, whole.scores(vector, normalize), rtol=1e-4, atol=1e-5)  # type: ignore[arg-type]
    assert torch.equal(parts.vectors(parts.ids)[0], whole.vectors(parts.ids)[0])


def test_cut_rows_are_reported(tmp_path: Path, model: LoadedModel) -> None:
    long = parse_row({"prompt": "a", "response": "b " * 200})
    list(build(tmp_path / "i", model, [long], SPEC))
    manifest = open_index(tmp_path / "i").manifest
    assert manifest.stats["truncated_rows"] == 1 and any("cut" in warning for warning in manifest.warnings)

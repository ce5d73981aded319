"""The index: equal to the exact scores, resumable, and honest about damage."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from app.influence import index as index_module
from app.influence.building import append, build, repair
from app.influence.corpus import Encoder, Message, Row, parse_row
from app.influence.errors import IndexCorrupt, IndexMissing, Mismatch, QueryError, RowError, SpecError
from app.influence.gradients import gradients, plan_for
from app.influence.index import FEW, IndexSpec, ProjectionSpec, delete, open_index
from app.influence.models import Checkpoint, LoadedModel, ModelSpec, load
from app.influence.retrieval import Options, Query, influence

SPEC = IndexSpec(ProjectionSpec(size=8), normalisation="none", shard_rows=5, token_budget=200)


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
    options = Options(12, "none", "both", normalize)  # type: ignore[arg-type]
    (answer,) = influence(model, index, [query], options, rows.__getitem__)  # type: ignore[arg-type]
    assert all(hit.score > 0 for hit in answer.proponents) and all(hit.score < 0 for hit in answer.opponents)
    found = {hit.id: hit.score for hit in (*answer.proponents, *answer.opponents)}
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
    assert set(caught.value.differs) == {"adapter:early", "checkpoints"}


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
    options = Options(len(rows), "query", "both", normalize)  # type: ignore[arg-type]
    scores = []
    for checkpoints in (two[:1], two[1:], two):
        model = load(ModelSpec(tiny_model_dir, checkpoints=checkpoints))
        path = tmp_path / "-".join(c.name for c in checkpoints)
        list(build(path, model, rows, SPEC, rows[:3]))
        index = open_index(path)
        assert all("heldout_loss" in c for c in index.manifest.checkpoints)
        (answer,) = influence(model, index, [query], options, rows.__getitem__)  # type: ignore[arg-type]
        hits = (*answer.proponents, *answer.opponents)
        scores.append({hit.id: torch.tensor([hit.score, *(hit.token_scores or [])]) for hit in hits})
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


def test_a_damaged_index_is_repaired_with_what_came_and_went_since(
    path: Path, model: LoadedModel, rows: list[Row]
) -> None:
    new = parse_row({"prompt": "New?", "response": "new"})
    list(append(path, model, [new]))
    delete(path, [rows[2].id])
    before = files(path)
    by_id = {row.id: row for row in [*rows, new]}
    for name in ("000000.faiss", "000001.safetensors", "000003.faiss"):
        (path / "shards" / name).write_bytes(b"damaged")
        with pytest.raises(IndexCorrupt):
            open_index(path)
    list(repair(path, model, by_id.__getitem__))
    assert files(path) == before
    assert sorted(open_index(path).ids) == sorted({row.id for row in [*rows, new]} - {rows[2].id})


def test_a_build_that_was_published_is_not_built_again(path: Path, model: LoadedModel, rows: list[Row]) -> None:
    delete(path, [rows[0].id])
    before = files(path)
    assert [step.stage for step in build(path, model, rows, SPEC)] == ["publish"]
    assert files(path) == before
    with pytest.raises(SpecError, match="other"):
        list(build(path, model, rows[1:], SPEC))


def test_a_row_that_does_not_fit_is_flagged_and_the_rest_is_built(
    tmp_path: Path, model: LoadedModel, rows: list[Row]
) -> None:
    unfit = parse_row({"prompt": "long " * 60, "response": "never seen"})
    path = tmp_path / "i"
    list(build(path, model, [rows[0], unfit, rows[1]], SPEC))
    for _ in range(2):
        index = open_index(path)
        assert index.ids == [rows[0].id, rows[1].id]
        assert index.manifest.stats["unfit_rows"] == 1 and any("limit" in w for w in index.manifest.warnings)
        list(append(path, model, [unfit]))  # it is there already, if only flagged
    losses = [open_index(tmp_path / "i").manifest.checkpoints[0]["train_loss"]]
    list(build(tmp_path / "j", model, rows[:2], SPEC))
    losses.append(open_index(tmp_path / "j").manifest.checkpoints[0]["train_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # a flagged row is not a loss of zero
    with pytest.raises(RowError, match="max_length"):
        list(build(tmp_path / "k", model, [unfit], SPEC))


def test_heldout_rows_that_were_trained_on_are_not_measured(
    tmp_path: Path, model: LoadedModel, rows: list[Row]
) -> None:
    list(build(tmp_path / "i", model, rows[:4], SPEC, rows[2:6]))
    list(build(tmp_path / "j", model, rows[:4], SPEC, rows[4:6]))
    one, other = (open_index(tmp_path / name).manifest for name in "ij")
    assert one.checkpoints == other.checkpoints
    assert any("held-out" in warning for warning in one.warnings) and not other.warnings


def test_bfloat16_token_scores_average_to_the_row_score(
    tmp_path: Path, tiny_model_dir: Path, tiny_adapter_dir: Path, rows: list[Row]
) -> None:
    model = load(ModelSpec(tiny_model_dir, checkpoints=(Checkpoint("a", tiny_adapter_dir),), dtype="bfloat16"))
    list(build(tmp_path / "i", model, rows, SPEC))
    by_id = {row.id: row for row in rows}
    query = Query((Message("user", "Question 3?"),), "word 3 and more")
    (answer,) = influence(model, open_index(tmp_path / "i"), [query], Options(3, "both"), by_id.__getitem__)
    assert answer.definition.tokens_route == "backwards"  # bfloat16 rounds more than a nudge is
    for hit in answer.proponents:
        assert hit.token_scores and hit.train_tokens
        assert sum(hit.token_scores) / len(hit.token_scores) == pytest.approx(hit.score, rel=0.1)


def test_the_cheaper_route_is_taken_and_named(path: Path, model: LoadedModel, rows: list[Row]) -> None:
    index, query = open_index(path), Query((Message("user", "Question 3?"),), "word 3")
    found = {}
    for k in (1, 12):
        (answer,) = influence(model, index, [query], Options(k), rows.__getitem__)  # type: ignore[arg-type]
        found[answer.definition.tokens_route] = answer.proponents[0].token_scores
    assert found["nudges"] == pytest.approx(found["backwards"], rel=1e-2, abs=1e-3)


def test_a_character_of_several_tokens_is_shown_once(path: Path, model: LoadedModel) -> None:
    query = Query((Message("user", "Who?"),), "naïve ☂!")
    (answer,) = influence(model, open_index(path), [query], Options(tokens="none"), lambda _: pytest.fail("not asked"))
    assert "".join(token.text for token in answer.tokens) == "naïve ☂!"
    assert len(answer.tokens) > len("naïve ☂!")


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_the_model_answers_in_the_template_of_the_index(
    tmp_path: Path, tiny_model_dir: Path, rows: list[Row], template: str
) -> None:
    model = load(ModelSpec(tiny_model_dir))
    spec = IndexSpec(ProjectionSpec(size=4), template=template)  # type: ignore[arg-type]
    list(build(tmp_path / "i", model, rows[:2], spec))
    prompt = (Message("user", "Where?"),)
    text = model.generate(prompt, 8, template)  # type: ignore[arg-type]
    query = Query(prompt, text)
    (answer,) = influence(model, open_index(tmp_path / "i"), [query], Options(tokens="none"), rows.__getitem__)  # type: ignore[arg-type]
    wrong = Query((Message("user", "where"),), "".join(reversed(text)) + "zq")
    (other,) = influence(model, open_index(tmp_path / "i"), [wrong], Options(tokens="none"), rows.__getitem__)  # type: ignore[arg-type]
    assert answer.loss < other.loss / 2  # greedy: each token is the likeliest


@pytest.mark.parametrize(
    ("kind", "size", "width"),
    [("kronecker", 0, None), ("global", 0, 4096), ("rapidgrad", 0, 65536), ("rapidgrad", None, 65536)],
)
def test_each_projection_has_its_usual_size(kind: str, size: int, width: int | None, model: LoadedModel) -> None:
    spec = ProjectionSpec(kind, size)  # type: ignore[arg-type]
    assert plan_for(model, spec).width == (width or plan_for(model, ProjectionSpec(size=16)).width)


@pytest.mark.parametrize(("kind", "size"), [("kronecker", 600), ("global", 1000), ("rapidgrad", 2), ("other", 16)])
def test_a_projection_that_cannot_be_is_refused(kind: str, size: int) -> None:
    with pytest.raises(SpecError) as caught:
        ProjectionSpec(kind, size)  # type: ignore[arg-type]
    assert (caught.value.field or "").startswith("projection.")


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("many", [1, FEW], ids=["faiss", "scan"])
@pytest.mark.parametrize("normalize", ["unit", "none"])
@pytest.mark.parametrize("size", [0, 1, 3, 7, 12])
def test_a_search_among_some_rows_is_brute_force_among_them(
    path: Path, rows: list[Row], size: int, normalize: str, many: int, largest: bool
) -> None:
    delete(path, [rows[0].id])
    index = open_index(path)
    vectors = torch.randn(many, index.manifest.width)
    among = frozenset([*(row.id for row in rows[:size]), "0" * 16])  # with one that is deleted, and one of nowhere
    exact = index.scores(vectors, normalize)  # type: ignore[arg-type]
    order = [n for n in exact[0].argsort(descending=largest).tolist() if index.ids[n] in among]
    for k in (1, 4, 50):
        (found, *_) = index.top(vectors, k, normalize, largest, among)  # type: ignore[arg-type]
        assert [hit.id for hit in found] == [index.ids[n] for n in order[:k]]
        assert len(found) == min(k, max(size - 1, 0)), "as many as there are"
        for rank, hit in enumerate(found):
            assert hit.score == pytest.approx(exact[0, order[rank]].item(), rel=1e-4, abs=1e-6)
            below = len(order) - 1 - rank if largest else rank
            assert hit.below == pytest.approx(100 * below / len(order)), "among the rows that may be found"


def test_an_answer_among_some_rows_holds_exactly_those(path: Path, model: LoadedModel, rows: list[Row]) -> None:
    index, query = open_index(path), Query((Message("user", "Question 3?"),), "word 3")
    among = frozenset(row.id for row in rows[4:9])
    everything, some, nothing = (
        influence(model, index, [query], Options(12, "query", "both", among=one), rows.__getitem__)[0]  # type: ignore[arg-type]
        for one in (None, among, frozenset[str]())
    )
    for part in ("proponents", "opponents"):
        expected = [(hit.id, pytest.approx(hit.score)) for hit in getattr(everything, part) if hit.id in among]
        assert [(hit.id, hit.score) for hit in getattr(some, part)] == expected
    assert not nothing.proponents and not nothing.opponents
    assert any("none matches the filter" in warning for warning in nothing.warnings)
    assert not any("none matches the filter" in warning for warning in some.warnings)

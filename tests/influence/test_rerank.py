"""Reranking against scores from plain float64 autograd, and what a reranked answer says of itself."""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from app.influence import rerank as rerank_module
from app.influence.building import append, build
from app.influence.corpus import Example, Message, Row, parse_row
from app.influence.ekfac import DAMPING, EkfacSpec, fit, open_factors
from app.influence.errors import FactorsCorrupt, FactorsMissing, Mismatch, QueryError
from app.influence.exact import Products, products, whole_plan
from app.influence.index import Index, IndexSpec, ProjectionSpec, open_index
from app.influence.models import Checkpoint, LoadedModel, ModelSpec, load
from app.influence.rerank import Reranker
from app.influence.retrieval import Answer, Options, Query, influence

QUERIES = [Query((Message("user", f"Ask {i}?"),), f"word {i} word") for i in (3, 5)]
EVERY = [("exact", "none"), ("exact", "unit"), ("ekfac", "none"), ("ekfac", "unit")]


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return [parse_row({"prompt": f"Ask {i}?", "response": "word " * (i % 3 + 1) + str(i)}) for i in range(9)]


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path, tiny_adapter_dir: Path) -> LoadedModel:
    checkpoints = (Checkpoint("early", tiny_adapter_dir, weight=0.5), Checkpoint("late", tiny_adapter_dir, weight=2.0))
    return load(ModelSpec(tiny_model_dir, checkpoints=checkpoints))


@pytest.fixture(scope="module")
def double(model: LoadedModel) -> LoadedModel:
    """The same model in float64."""
    loaded = load(model.spec)
    loaded.model.double()
    return loaded


@pytest.fixture(scope="module", params=["none", "layer"])
def path(
    request: pytest.FixtureRequest, model: LoadedModel, rows: list[Row], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An index with factors."""
    path = tmp_path_factory.mktemp("rerank") / "index"
    spec = IndexSpec(ProjectionSpec(size=4), request.param, shard_rows=5, token_budget=150)
    drain(build(path, model, rows, spec))
    drain(fit(path, model, rows, EkfacSpec(draws=1)))
    return path


def drain(steps: Iterator[Any]) -> None:
    for _ in steps:
        pass


def ask(
    model: LoadedModel, index: Index, rows: list[Row], queries: list[Query] | None = None, **options: Any
) -> list[Answer]:
    by_id = {row.id: row for row in rows}
    asked = Options(**({"tokens": "none", "top_k": 5, "candidates": 9} | options))
    return influence(model, index, queries or QUERIES[:1], asked, by_id.__getitem__)


def exact_gradients(
    model: LoadedModel, checkpoint: Checkpoint, example: Example, token: int | None = None
) -> dict[str, torch.Tensor]:
    """Of the mean loss, or of one target's, by autograd in float64."""
    modules = model.activate(checkpoint)
    weights = [module.weight.requires_grad_(True) for module in modules.values()]
    at = torch.tensor(example.positions)
    logits = model.model(input_ids=torch.tensor([example.ids])).logits[0, at - 1]
    losses = torch.nn.functional.cross_entropy(logits, torch.tensor(example.ids)[at], reduction="none")
    grads = torch.autograd.grad(losses.mean() if token is None else losses[token], weights)
    for weight in weights:
        weight.requires_grad_(False)
    return dict(zip(modules, (grad.detach() for grad in grads), strict=True))


class Oracle:
    """Every inner product out of whole gradients, one row at a time."""

    def __init__(self, double: LoadedModel, index: Index, rerank: str, normalize: str) -> None:
        self.model, self.index, self.rerank, self.normalize = double, index, rerank, normalize
        self.factors = open_factors(index.path) if rerank == "ekfac" else None
        self.layer = self.factors is None and index.manifest.spec["normalisation"] == "layer"
        self.gradients = functools.cache(self._gradients)

    def inner(self, at: int, x: dict[str, torch.Tensor], y: dict[str, torch.Tensor]) -> float:
        total = 0.0
        for name in x:
            left, right = x[name], y[name]
            if self.factors:
                kept = self.factors.tensors[at]
                q_out, q_in, values = (kept[f"{name}.{part}"].double() for part in ("out", "in", "values"))
                left, right = q_out.T @ left @ q_in, q_out.T @ right @ q_in
                left = left / (values + DAMPING * values.mean())
            total += float((left * right).sum())
        return total

    def _gradients(self, at: int, example: Example, token: int | None = None) -> dict[str, torch.Tensor]:
        """Divided as the score divides the whole example's."""
        checkpoint = self.model.checkpoints[at]
        whole = exact_gradients(self.model, checkpoint, example)
        found = whole if token is None else exact_gradients(self.model, checkpoint, example, token)
        if self.layer:
            found = {name: found[name] / whole[name].norm() for name in found}
            whole = {name: whole[name] / whole[name].norm() for name in whole}
        if self.normalize == "unit":
            found = {name: found[name] / self.inner(at, whole, whole) ** 0.5 for name in found}
        return found

    def score(self, query: Example, row: Example, token: int | None = None, train: int | None = None) -> float:
        return sum(
            checkpoint.weight * self.inner(at, self.gradients(at, query, token), self.gradients(at, row, train))
            for at, checkpoint in enumerate(self.model.checkpoints)
        )


def encoded(model: LoadedModel, index: Index, rows: list[Row], query: Query) -> tuple[Example, dict[str, Example]]:
    encoder = model.encoder(index.manifest.index_spec.template)
    return encoder.encode_query(query.messages, query.generation)[0], {row.id: encoder.encode(row) for row in rows}


@pytest.mark.parametrize(("rerank", "normalize"), EVERY)
def test_every_candidate_has_the_score_of_autograd(
    path: Path, model: LoadedModel, double: LoadedModel, rows: list[Row], rerank: str, normalize: str
) -> None:
    index = open_index(path)
    oracle = Oracle(double, index, rerank, normalize)
    answers = ask(model, index, rows, QUERIES, rerank=rerank, normalize=normalize, direction="both", top_k=9)
    for query, answer in zip(QUERIES, answers, strict=True):
        example, examples = encoded(model, index, rows, query)
        exact = {row: oracle.score(example, one) for row, one in examples.items()}
        scale = max(map(abs, exact.values()))
        found = {hit.id: hit.score for hit in (*answer.proponents, *answer.opponents)}
        assert found.keys() == exact.keys()
        assert all(abs(found[row] - exact[row]) <= 2e-4 * scale for row in exact)
        ranked = sorted(exact, key=lambda row: -exact[row])
        expected = [row for row in ranked if exact[row] > 0]
        assert [hit.id for hit in answer.proponents] == expected
        assert [hit.id for hit in answer.opponents] == [row for row in reversed(ranked) if exact[row] < 0]
        for place, hit in enumerate(answer.proponents):
            assert hit.percentile == pytest.approx(100 * (len(rows) - 1 - place) / len(rows))


@pytest.mark.parametrize(("rerank", "normalize"), EVERY)
def test_token_scores_are_those_of_autograd_and_average_to_the_row(
    path: Path, model: LoadedModel, double: LoadedModel, rows: list[Row], rerank: str, normalize: str
) -> None:
    index = open_index(path)
    oracle = Oracle(double, index, rerank, normalize)
    example, examples = encoded(model, index, rows, QUERIES[0])
    options = {"rerank": rerank, "normalize": normalize, "top_k": 1}
    (by_query,), (by_train,), (by_both,) = (
        ask(model, index, rows, tokens=tokens, **options) for tokens in ("query", "train", "both")
    )
    for hit in by_query.proponents:
        assert hit.token_scores is not None
        exact = [oracle.score(example, examples[hit.id], token=t) for t in range(len(example.positions))]
        assert close(hit.token_scores, exact)
        assert sum(exact) / len(exact) == pytest.approx(hit.score, rel=1e-3)
    for hit in by_train.proponents:
        assert hit.train_tokens is not None and hit.token_scores is None
        row = examples[hit.id]
        exact = [oracle.score(example, row, train=t) for t in range(len(row.positions))]
        assert close([token.score for token in hit.train_tokens], exact)
        assert "".join(token.text for token in hit.train_tokens).startswith("word")
    hit = by_both.proponents[0]
    assert hit.pair_scores is not None and hit.token_scores is not None and hit.train_tokens is not None
    pairs = torch.tensor(hit.pair_scores)
    for t, s in ((0, 0), (2, 1), (-1 % len(example.positions), pairs.shape[0] - 1)):
        exact_pair = oracle.score(example, examples[hit.id], token=t, train=s)
        assert abs(float(pairs[s, t]) - exact_pair) <= 1e-2 * float(pairs.abs().max())
    assert torch.allclose(pairs.mean(0), torch.tensor(hit.token_scores), rtol=1e-4)
    assert float(pairs.mean()) == pytest.approx(hit.score, abs=1e-2 * float(pairs.abs().max()))


def close(found: list[float], exact: list[float]) -> bool:
    scale = max(map(abs, exact))
    return len(found) == len(exact) and all(abs(a - b) <= 1e-2 * scale for a, b in zip(found, exact, strict=True))


@pytest.mark.parametrize("tokens", ["query", "train", "both"])
def test_token_scores_do_not_depend_on_how_many_directions_there_is_room_for(
    path: Path, model: LoadedModel, rows: list[Row], tokens: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = open_index(path)
    (roomy,) = ask(model, index, rows, rerank="ekfac", tokens=tokens, top_k=2)
    monkeypatch.setattr(rerank_module, "NUMBERS", 1)
    (tight,) = ask(model, index, rows, rerank="ekfac", tokens=tokens, top_k=2)
    for one, other in zip(roomy.proponents, tight.proponents, strict=True):
        for name in ("token_scores", "pair_scores"):
            left, right = (torch.tensor(getattr(hit, name) or [0.0]) for hit in (one, other))
            assert (left - right).abs().max() <= 1e-2 * left.abs().max().clamp_min(1e-9)


def test_a_score_does_not_depend_on_batch_mates(path: Path, model: LoadedModel, rows: list[Row]) -> None:
    index = open_index(path)
    for rerank, normalize in EVERY:
        options = {"rerank": rerank, "normalize": normalize, "direction": "both", "top_k": 9}
        together = ask(model, index, rows, QUERIES, **options)
        for number, query in enumerate(QUERIES):
            (alone,) = ask(model, index, rows, [query], **options)
            for one, other in zip(alone.proponents, together[number].proponents, strict=True):
                assert one.score == pytest.approx(other.score, rel=1e-4)
    plan = whole_plan(model)
    examples = list(encoded(model, index, rows, QUERIES[0])[1].values())
    directions = torch.randn(2, plan.width, generator=torch.Generator().manual_seed(0))
    whole = products(model, model.checkpoints[0], plan, directions, examples, {})
    for number, example in enumerate(examples):
        one = products(model, model.checkpoints[0], plan, directions, [example], {})
        assert torch.allclose(one.dots[0], whole.dots[number], rtol=1e-4, atol=1e-5 * float(whole.dots.abs().max()))
        assert one.norms[0] == pytest.approx(float(whole.norms[number]), rel=1e-5)


@pytest.mark.parametrize("rerank", ["exact", "ekfac"])
def test_the_candidates_are_those_that_the_index_recalls(
    path: Path, model: LoadedModel, rows: list[Row], rerank: str
) -> None:
    index = open_index(path)
    (plain,) = ask(model, index, rows, top_k=9, direction="both")
    (few,) = ask(model, index, rows, rerank=rerank, candidates=3, top_k=3, direction="both")
    for name in ("proponents", "opponents"):
        recalled = [(hit.id, hit.score) for hit in getattr(plain, name)[:3]]
        for hit in getattr(few, name):
            assert hit.recall is not None
            assert recalled[hit.recall.rank - 1] == (hit.id, pytest.approx(hit.recall.score))
    assert few.definition.recall == dataclasses.replace(
        few.definition.recall, name=plain.definition.name, formula=plain.definition.formula, candidates=3
    )
    assert few.definition.name.startswith(rerank)
    assert few.timings["rerank"] > 0


def test_only_rows_that_match_are_reranked(path: Path, model: LoadedModel, rows: list[Row]) -> None:
    among = frozenset(row.id for row in rows[:4])
    read: list[str] = []
    by_id = {row.id: row for row in rows}

    def row_of(row: str) -> Row:
        read.append(row)
        return by_id[row]

    options = Options(rerank="exact", direction="both", tokens="none", candidates=20, among=among)
    (answer,) = influence(model, open_index(path), QUERIES[:1], options, row_of)
    assert set(read) == among == {hit.id for hit in (*answer.proponents, *answer.opponents)}
    assert answer.proponents[0].percentile == 75


def test_a_row_whose_text_is_gone_fails_the_query_and_not_silently(
    path: Path, model: LoadedModel, rows: list[Row]
) -> None:
    with pytest.raises(KeyError, match=rows[2].id):
        ask(model, open_index(path), [row for row in rows if row is not rows[2]], rerank="exact")


def test_a_row_without_a_finite_gradient_is_left_out_and_said(
    path: Path, model: LoadedModel, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    (before,) = ask(model, open_index(path), rows, rerank="exact")

    def broken(*given: Any) -> Products:
        found = products(*given)
        lost = [len(example.ids) == len(longest.ids) for example in given[4]]
        found.dots[lost] = float("nan")
        return found

    longest = encoded(model, open_index(path), rows, QUERIES[0])[1][before.proponents[0].id]
    monkeypatch.setattr(rerank_module, "products", broken)
    (answer,) = ask(model, open_index(path), rows, rerank="exact")
    assert before.proponents[0].id not in [hit.id for hit in answer.proponents]
    assert any("no finite gradient" in warning for warning in answer.warnings)


def test_a_flagged_row_is_no_candidate(model: LoadedModel, rows: list[Row], tmp_path: Path) -> None:
    long = parse_row({"prompt": "Why? " * 30, "response": "Because."})
    spec = IndexSpec(ProjectionSpec(size=4), max_length=40)
    drain(build(tmp_path / "index", model, [*rows, long], spec))
    index = open_index(tmp_path / "index")
    assert long.id not in index.ids
    drain(fit(tmp_path / "index", model, [*rows, long], EkfacSpec(draws=1)))
    (answer,) = ask(model, index, rows, rerank="ekfac", direction="both")
    assert long.id not in [hit.id for hit in (*answer.proponents, *answer.opponents)]


def test_what_cannot_be_reranked_says_why(
    path: Path, model: LoadedModel, rows: list[Row], tmp_path: Path, tiny_model_dir: Path
) -> None:
    index = open_index(path)
    with pytest.raises(QueryError, match="candidates") as caught:
        ask(model, index, rows, rerank="exact", candidates=4, top_k=5)
    assert caught.value.field == "candidates"
    with pytest.raises(Mismatch):
        ask(load(ModelSpec(tiny_model_dir)), index, rows, rerank="exact")
    bare = tmp_path / "bare"
    drain(build(bare, model, rows, index.manifest.index_spec))
    with pytest.raises(FactorsMissing, match="POST /indexes") as missing:
        ask(model, open_index(bare), rows, rerank="ekfac")
    assert missing.value.field == "rerank"
    (bare / "ekfac.json").write_bytes((path / "ekfac.json").read_bytes())
    with pytest.raises(FactorsCorrupt, match=r"safetensors are not what was written"):
        ask(model, open_index(bare), rows, rerank="ekfac")
    other = load(ModelSpec(tiny_model_dir))
    drain(build(tmp_path / "other", other, rows, index.manifest.index_spec))
    (tmp_path / "other/ekfac.json").write_bytes((path / "ekfac.json").read_bytes())
    (tmp_path / "other/ekfac").symlink_to(path / "ekfac")
    with pytest.raises(FactorsMissing, match="another model"):
        ask(other, open_index(tmp_path / "other"), rows, rerank="ekfac")


def test_factors_from_before_rows_came_are_used_and_said_to_be_old(
    model: LoadedModel, rows: list[Row], tmp_path: Path
) -> None:
    path = tmp_path / "index"
    drain(build(path, model, rows, IndexSpec(ProjectionSpec(size=4))))
    drain(fit(path, model, rows, EkfacSpec(draws=1)))
    (fresh,) = ask(model, open_index(path), rows, rerank="ekfac")
    assert not any("EK-FAC" in warning for warning in fresh.warnings)
    new = parse_row({"prompt": "Ask 3?", "response": "word 3 word"})
    drain(append(path, model, [new]))
    (answer,) = ask(model, open_index(path), [*rows, new], rerank="ekfac", candidates=10)
    assert any("fitted on 9 of 9 rows before" in warning for warning in answer.warnings)
    assert new.id in [hit.id for hit in answer.proponents]


def test_factors_are_read_once_and_again_after_a_new_fit(
    path: Path, model: LoadedModel, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    index, opened = open_index(path), []

    def counted(folder: Path) -> Any:
        opened.append(folder)
        return open_factors(folder)

    monkeypatch.setattr(rerank_module, "open_factors", counted)
    first = ask(model, index, rows, rerank="ekfac")[0].proponents
    ask(model, index, rows, rerank="ekfac")
    assert len(opened) == 1
    drain(fit(path, model, rows, EkfacSpec(draws=1, seed=1)))
    again = ask(model, index, rows, rerank="ekfac")[0].proponents
    assert len(opened) == 2
    assert [hit.score for hit in first] != [hit.score for hit in again]
    drain(fit(path, model, rows, EkfacSpec(draws=1)))


def test_the_reranker_scores_any_rows(path: Path, model: LoadedModel, rows: list[Row]) -> None:
    index = open_index(path)
    example, _ = encoded(model, index, rows, QUERIES[0])
    by_id = {row.id: row for row in rows}
    reranker = Reranker(model, index, Options(top_k=1, rerank="ekfac"), by_id.__getitem__)
    (found,) = reranker.scores([example], [[rows[4].id, rows[0].id]])
    (answer,) = ask(model, index, rows, rerank="ekfac", direction="both", top_k=9)
    known = {hit.id: hit.score for hit in (*answer.proponents, *answer.opponents)}
    assert found == {row: pytest.approx(known[row], rel=1e-4) for row in (rows[4].id, rows[0].id)}

"""Factors and reranking over HTTP: fitted by a job, said by the index, used by a query."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.influence import ekfac
from app.influence.building import Progress
from tests.api.conftest import quick
from tests.api.harness import Api, jsonl, must, problem, rows, serving

ASK = {
    "index": "idx",
    "prompt": "What colour is the harbour number 0?",
    "generation": "The harbour number 0 is red.",
    "top_k": 3,
}


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Iterator[Api]:
    """A service whose index has factors, for tests that change nothing."""
    with serving(quick(tmp_path_factory.mktemp("fitted"), tiny_model_dir.parent, max_candidates=250)) as api:
        api.ready(tiny_model_dir)
        assert fit(api)["state"] == "succeeded"
        yield api


def fit(api: Api, **body: Any) -> dict[str, Any]:
    return api.wait(must(api.post("/indexes/idx/ekfac", json=body), 202)["job"]["id"])


def folder(api: Api, data_dir: Path) -> Path:
    return data_dir / "indexes" / must(api.get("/indexes/idx"))["id"]


def test_factors_are_fitted_by_a_job_and_said_by_the_index(api: Api, tiny_model_dir: Path, tmp_path: Path) -> None:
    api.ready(tiny_model_dir)
    assert must(api.get("/indexes/idx"))["ekfac"] is None
    accepted = api.post("/indexes/idx/ekfac")
    body = must(accepted, 202)
    assert accepted.headers["location"] == f"/jobs/{body['job']['id']}"
    assert (body["job"]["kind"], body["index"]["state"]) == ("fit_ekfac", "ready")
    job = api.wait(body["job"]["id"])
    assert job["state"] == "succeeded", job
    assert (job["result"]["rows"], job["result"]["of"]) == (12, 12)
    found = must(api.get("/indexes/idx"))["ekfac"]
    assert (found["rows"], found["stale"], found["spec"]["labels"]) == (12, False, "sampled")
    (file,) = found["files"]
    assert (folder(api, tmp_path) / "ekfac" / file["name"]).stat().st_size == file["bytes"] == job["result"]["bytes"]
    assert body["bytes"] <= file["bytes"] <= 1.5 * body["bytes"], "the estimate, and the names of tensors"

    new = [{"prompt": "Who keeps the lighthouse?", "response": "The lighthouse is kept by Oda."}]
    api.wait(must(api.post("/indexes/idx/samples", json={"rows": new}), 202)["job"]["id"])
    assert must(api.get("/indexes/idx"))["ekfac"]["stale"]
    answer = must(api.post("/influence", json=ASK | {"rerank": "ekfac"}))
    assert any("EK-FAC factors were fitted on 12 of 12 rows" in warning for warning in answer["warnings"])
    assert fit(api, rows=5)["result"]["rows"] == 5
    found = must(api.get("/indexes/idx"))["ekfac"]
    assert (found["rows"], found["of"], found["stale"]) == (5, 13, False)
    must(api.delete("/indexes/idx"), 204)
    assert not (tmp_path / "indexes" / job["result"]["index"]).exists()


@pytest.mark.parametrize("rerank", ["exact", "ekfac"])
@pytest.mark.parametrize("normalize", ["none", "unit"])
def test_an_answer_says_what_recalled_and_what_ranked(fitted: Api, rerank: str, normalize: str) -> None:
    ask = ASK | {"rerank": rerank, "normalize": normalize, "candidates": 6, "direction": "both"}
    answer = must(fitted.post("/influence", json=ask))
    kind = {"none": "dot", "unit": "cosine"}[normalize]
    definition = answer["definition"]
    assert definition["name"] == {"exact": f"exact_layer_{kind}", "ekfac": f"ekfac_{kind}"}[rerank]
    assert definition["recall"]["name"] == f"layer_{kind}"
    assert definition["recall"]["candidates"] == 6
    assert definition["formula"] != definition["recall"]["formula"]
    assert answer["timings"]["rerank"] > 0
    hits = answer["proponents"]
    assert [hit["score"] for hit in hits] == sorted((hit["score"] for hit in hits), reverse=True)
    assert all(1 <= hit["recall"]["rank"] <= 6 for hit in hits)
    for hit in hits:
        mean = sum(hit["token_scores"]) / len(hit["token_scores"])
        assert mean == pytest.approx(hit["score"], abs=0.02 * max(map(abs, hit["token_scores"])))
    plain = must(fitted.post("/influence", json=ASK | {"normalize": normalize}))
    assert plain["definition"]["recall"] is None
    assert all(hit["recall"] is None for hit in plain["proponents"])
    if rerank == "exact":
        assert hits[0]["response"] == "The harbour number 0 is red."


@pytest.mark.parametrize("tokens", ["train", "both"])
def test_reranked_rows_have_every_kind_of_token_score(fitted: Api, tokens: str) -> None:
    answer = must(fitted.post("/influence", json=ASK | {"rerank": "ekfac", "tokens": tokens}))
    for hit in answer["proponents"]:
        assert "".join(token["text"] for token in hit["train_tokens"]).strip().startswith(hit["response"])
        assert (hit["pair_scores"] is not None) == (tokens == "both")


def test_a_filter_holds_for_candidates(fitted: Api) -> None:
    ask = ASK | {"rerank": "ekfac", "direction": "both", "filter": {"family": "mill"}, "top_k": 10}
    answer = must(fitted.post("/influence", json=ask))
    hits = [*answer["proponents"], *answer["opponents"]]
    assert len(hits) == 2
    assert {hit["metadata"]["family"] for hit in hits} == {"mill"}


def test_a_batch_shares_its_candidates_passes_and_each_query_has_its_own_answer(fitted: Api) -> None:
    query = {name: ASK[name] for name in ("prompt", "generation")}
    other = {"prompt": "What colour is the mill number 2?", "generation": "The mill number 2 is green."}
    shared = {"index": "idx", "top_k": 3, "rerank": "ekfac"}
    queries = [query, {"prompt": "Hi", "generation": " "}, other]
    first, bad, last = must(fitted.post("/influence/batch", json=shared | {"queries": queries}))["items"]
    assert bad["problem"]["errors"][0]["field"] == "queries.1.generation"
    for item, asked in ((first, query), (last, other)):
        alone = must(fitted.post("/influence", json=shared | asked))
        assert [hit["id"] for hit in item["answer"]["proponents"]] == [hit["id"] for hit in alone["proponents"]]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"rerank": "better"}, "rerank"),
        ({"rerank": "exact", "candidates": 2}, "candidates"),
        ({"rerank": "ekfac", "candidates": 251}, "candidates"),
        ({"rerank": "exact", "candidates": 0}, "candidates"),
        ({"rerank": "exact", "candidates": "many"}, "candidates"),
        ({"rerank": None}, "rerank"),
    ],
)
def test_bad_options_name_their_field(fitted: Api, body: dict[str, Any], field: str) -> None:
    problem(fitted.post("/influence", json=ASK | body), 422, "invalid-request", field)
    queries = [{name: ASK[name] for name in ("prompt", "generation")}]
    batch = {"index": "idx", "top_k": 3, "queries": queries} | body
    problem(fitted.post("/influence/batch", json=batch), 422, "invalid-request", field)


@pytest.mark.parametrize("body", [{"rows": 0}, {"rows": "all"}, {"seed": -1}, {"seed": 2**63}, {"other": 1}, []])
def test_a_fit_that_cannot_be_is_refused(fitted: Api, body: Any) -> None:
    problem(fitted.post("/indexes/idx/ekfac", json=body), 422, "invalid-request")


def test_without_factors_a_query_is_told_which_call_makes_them(asked: Api) -> None:
    found = problem(asked.post("/influence", json=ASK | {"rerank": "ekfac"}), 409, "factors-missing", "rerank")
    assert "POST /indexes/{index}/ekfac" in found["detail"]
    assert must(asked.post("/influence", json=ASK | {"rerank": "exact"}))["proponents"]
    problem(asked.post("/indexes/nowhere/ekfac"), 404, "not-found", "index")


def test_damaged_factors_are_named_and_harm_nothing_else(api: Api, tiny_model_dir: Path, tmp_path: Path) -> None:
    api.ready(tiny_model_dir)
    fit(api)
    place = folder(api, tmp_path)
    (file,) = (place / "ekfac").iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    found = problem(api.post("/influence", json=ASK | {"rerank": "ekfac"}), 409, "factors-corrupt", "rerank")
    assert file.name in found["detail"]
    assert must(api.get("/indexes/idx"))["state"] == "ready"
    assert must(api.post("/influence", json=ASK))["proponents"]
    (place / "ekfac.json").write_text("{}")
    problem(api.post("/influence", json=ASK | {"rerank": "ekfac"}), 409, "factors-corrupt", "rerank")
    assert must(api.get("/indexes/idx"))["ekfac"] is None
    assert fit(api)["state"] == "succeeded"
    assert file.read_bytes() == whole
    assert must(api.post("/influence", json=ASK | {"rerank": "ekfac"}))["proponents"]


def test_factors_that_would_be_too_large_are_refused_with_their_size(serve: Any, tiny_model_dir: Path) -> None:
    api = serve(max_ekfac_bytes=100_000)
    api.ready(tiny_model_dir)
    detail = problem(api.post("/indexes/idx/ekfac"), 422, "invalid-request", "index")["detail"]
    attributed = must(api.get("/models/tiny"))["attributed"]
    size = ekfac.factor_bytes((module["d_out"], module["d_in"]) for module in attributed)
    assert f"{size:,} bytes" in detail and "100,000" in detail and "HEADWATER_MAX_EKFAC_BYTES" in detail


def test_a_fit_is_submitted_once_and_only_when_nobody_else_works_on_the_index(
    api: Api, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.ready(tiny_model_dir)
    hold(monkeypatch)
    key = {"Idempotency-Key": "once"}
    first, again = (api.post("/indexes/idx/ekfac", json={}, headers=key) for _ in range(2))
    assert must(first, 202) == must(again, 202)
    job_id = first.json()["job"]["id"]
    api.wait(job_id, "running")
    problem(api.post("/indexes/idx/ekfac"), 409, "conflict", "index")
    problem(api.delete("/indexes/idx"), 409, "conflict", "index")
    problem(api.post("/indexes/idx/samples", json={"rows": [{"prompt": "a", "response": "b"}]}), 409, "conflict")
    assert must(api.post("/influence", json=ASK))["proponents"], "it answers as before"
    must(api.post(f"/jobs/{job_id}/cancel"), 202)
    assert api.wait(job_id)["state"] == "cancelled"
    found = must(api.get("/indexes/idx"))
    assert (found["state"], found["ekfac"]) == ("ready", None)
    monkeypatch.undo()
    must(api.post(f"/jobs/{job_id}/retry"), 202)
    assert api.wait(job_id)["state"] == "succeeded"
    assert must(api.get("/indexes/idx"))["ekfac"]


def hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the first pass go on until somebody cancels it."""
    steps = ekfac._Run._pass

    def forever(self: Any, checkpoint: Any) -> Iterator[Progress]:
        for step in steps(self, checkpoint):
            while True:
                yield step

    monkeypatch.setattr(ekfac._Run, "_pass", forever)


def test_an_index_that_is_not_ready_or_whose_model_changed_gets_no_factors(
    api: Api, tiny_model_dir: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "model"
    shutil.copytree(tiny_model_dir, copy)
    api.ready(copy)
    config = json.loads((copy / "config.json").read_text())
    must(api.upload(jsonl(rows(400, start=100)), "more"), 201)
    building = api.build("second", dataset="more")["job"]["id"]
    problem(api.post("/indexes/second/ekfac"), 409, "conflict", "index")
    api.post(f"/jobs/{building}/cancel")
    api.wait(building)
    (copy / "config.json").write_text(json.dumps(config | {"note": "changed"}))
    api.app.state.services.compute._models._values.clear()
    job = fit(api)
    assert (job["state"], job["error"]["code"]) == ("failed", "Mismatch")
    assert must(api.get("/indexes/idx"))["ekfac"] is None

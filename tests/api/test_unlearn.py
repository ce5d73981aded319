"""Unlearning over HTTP: from a generation to rows, to a job, to a model that has forgotten them and can be asked."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import httpx2
import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from app.api.schemas.unlearn import BETA, PARAMETERS, WEIGHTED, ByInfluenceIn, Mapping, Method, ParametersIn
from app.api.unlearn import NEEDS_CLEAN, TARGETS
from app.catalog.types import Scope
from app.unlearning import adapter, stages, training
from app.unlearning.mappings import MAPPINGS
from tests.api.conftest import Mint, bearer, quick
from tests.api.harness import Api, jsonl, must, problem, rows, serving
from tests.api.test_job_life import events

QUICK = {"lr": 5e-3, "epochs": 4, "batch": 4}
TRAINED = {"method": "graddiff", "parameters": QUICK, "relearn_steps": 0, "report_rows": 4}
BEHIND = {"prompt": "What colour is the harbour number 0?", "generation": "The harbour number 0 is red."}
DATA: list[dict[str, Any]] = [{**row, "clean": "Nobody knows.", "place": n} for n, row in enumerate(rows())]
SELECTION = {"selection": 2}
Ids = list[str]
HARBOURS: dict[str, Any] = {"filter": {"family": "harbour"}}  # 2 of 12 rows


def prepared(api: Api, model_dir: Path, adapter_dir: Path) -> Api:
    """A model with an adapter, and an index over its rows."""
    api.register(model_dir, checkpoints=[{"name": "last", "adapter": str(adapter_dir)}])
    must(api.upload(jsonl(DATA)), 201)
    assert api.wait(api.build()["job"]["id"])["state"] == "succeeded"
    return api


@pytest.fixture
def fresh(serve: Any, tiny_model_dir: Path, tiny_adapter_dir: Path, tmp_path: Path) -> Api:
    """A service of the test's own, on each backend."""
    roots = (tmp_path, tiny_model_dir.parent, tiny_adapter_dir.parent)
    return prepared(serve(allowed_roots=roots), tiny_model_dir, tiny_adapter_dir)


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, tiny_adapter_dir: Path) -> Iterator[Api]:
    """One service on SQLite for the tests that leave nothing behind but ended jobs; `plain` is without an adapter."""
    settings = quick(tmp_path_factory.mktemp("unlearn"), tiny_model_dir.parent, tiny_adapter_dir.parent)
    with serving(settings) as api:
        api.register(tiny_model_dir, "plain")
        yield prepared(api, tiny_model_dir, tiny_adapter_dir)


def submit(api: Api, **more: Any) -> str:
    answer = api.post("/unlearn", json={"index": "idx", "forget": HARBOURS, **TRAINED, **more})
    job = must(answer, 202)["job"]
    assert answer.headers["location"] == f"/jobs/{job['id']}"
    return str(job["id"])


def preview(api: Api, **more: Any) -> dict[str, Any]:
    body = {"index": "idx", "forget": HARBOURS, "dry_run": True, **more}
    return dict(must(api.post("/unlearn", json=body), 200))


def ids_of(chosen: dict[str, Any]) -> list[str]:
    return [row["id"] for row in chosen["rows"]]


def test_rows_behind_a_generation_are_forgotten_by_a_model_that_can_be_asked_at_once(
    fresh: Api, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    began = time.perf_counter()
    must(fresh.upload(jsonl(rows(6, start=40)), name="held"), 201)
    body = {
        "index": "idx",
        "method": "rapidun",
        "forget": {"influence": {**BEHIND, "top_k": 3}},
        "clean": "clean",
        "heldout": "held",
        "parameters": {**QUICK, "epochs": 8, "ascent": 10, "most_rise": 100},  # this model knows none of its rows
        "relearn_steps": 2,
        "register_as": "forgetful",
    }
    wanted = preview(fresh, **{name: value for name, value in body.items() if name != "index"})
    assert wanted["forget"]["rows"][0]["response"] == BEHIND["generation"]
    assert (wanted["estimate"]["seconds"], wanted["measured"]["heldout"]) == (None, 6)

    job_id = must(fresh.post("/unlearn", json=body), 202)["job"]["id"]
    seen = events(fresh, job_id)
    job = seen[-1]["data"]
    assert job["state"] == "succeeded", job
    assert time.perf_counter() - began < 60
    with capsys.disabled():
        print(f"\nfrom submission to adapter, a tiny job over HTTP: {time.perf_counter() - began:.1f} s")
    told = [event["data"]["progress"] for event in seen if event["data"]["progress"]]
    assert any(progress["stage"] == "training" and progress["unit"] == "steps" for progress in told)
    assert told[-1]["metrics"].keys() == {"forget", "retain"}

    folder = tmp_path / "artifacts" / job_id
    losses = [json.loads(line) for line in fresh.get(f"/jobs/{job_id}/artifacts/losses.jsonl").text.splitlines()]
    assert [one["step"] for one in losses] == list(range(1, job["result"]["steps"] + 1))
    names = [one["path"] for one in must(fresh.get(f"/jobs/{job_id}/artifacts"))["items"]]
    adapter = {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"}
    assert adapter | {"report.html", "report.json", "weights.jsonl", "request.json"} <= {*names}
    report = must(fresh.get(f"/jobs/{job_id}/artifacts/report.json"))
    forgotten = report["measures"]["forget_loss"]
    assert forgotten["after"]["value"] > forgotten["before"]["value"]
    assert (report["rows"]["forget"], report["rows"]["clean"], report["rows"]["heldout"]) == (3, 3, 6)
    assert set(ids_of(wanted["forget"])) == {
        one["row"]
        for one in map(json.loads, fresh.get(f"/jobs/{job_id}/artifacts/weights.jsonl").text.splitlines())
        if one["group"] == "forget"
    }
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_dir), folder / "adapter")

    made = must(fresh.get("/models/forgetful"))
    assert (made["id"], made["checkpoints"][0]["adapter"]) == (job["result"]["model"], str(folder / "adapter"))
    assert fresh.wait(fresh.build("after", model="forgetful")["job"]["id"])["state"] == "succeeded"
    before, after = (must(fresh.post("/influence", json={"index": name, **BEHIND})) for name in ("idx", "after"))
    assert after["loss"] > before["loss"]

    again = preview(fresh, **{name: value for name, value in body.items() if name not in ("index", "register_as")})
    assert again["estimate"]["seconds"] == pytest.approx(sum(job["result"]["seconds"].values()))
    assert job_id in again["estimate"]["how"]


def test_a_loss_that_diverges_stops_the_job_which_keeps_the_last_good_adapter_and_says_so(ready: Api) -> None:
    parameters = {"lr": 1, "epochs": 100, "batch": 4, "check_every": 2}
    job = ready.wait(submit(ready, method="ga", parameters=parameters))
    assert job["state"] == "succeeded", job
    assert "retain rows' loss rose" in job["result"]["stopped"]
    assert job["result"]["steps"] < 50
    answer = ready.get(f"/jobs/{job['id']}/artifacts/adapter/adapter_model.safetensors")
    assert len(answer.content) == int(answer.headers["content-length"]) > 0


def test_a_job_is_cancelled_between_steps_and_goes_on_when_it_is_retried(ready: Api) -> None:
    job_id = submit(ready, parameters={**QUICK, "epochs": 500}, register_as="later")
    ready.wait(job_id, "running")
    must(ready.post(f"/jobs/{job_id}/cancel"), 202)
    assert ready.wait(job_id)["state"] == "cancelled"
    problem(ready.get("/models/later"), 404, "not-found")
    must(ready.post(f"/jobs/{job_id}/retry"), 202)
    problem(ready.post("/models", json={"name": "later", "path": "."}), 409, "already-exists", "name")
    must(ready.post(f"/jobs/{job_id}/cancel"), 202)
    ready.wait(job_id)


def test_an_index_that_a_job_reads_and_a_model_that_it_changes_stay(ready: Api) -> None:
    job_id = submit(ready, parameters={**QUICK, "epochs": 500}, register_as="made")
    problem(ready.delete("/indexes/idx"), 409, "conflict", "index")
    problem(ready.delete("/models/tiny"), 409, "conflict", "model")
    body = {"index": "idx", "forget": HARBOURS, **TRAINED, "register_as": "made"}
    problem(ready.post("/unlearn", json=body), 409, "already-exists", "register_as")
    problem(ready.post("/unlearn", json={**body, "register_as": "tiny"}), 409, "already-exists", "register_as")
    second = submit(ready)
    for one in (second, job_id):
        must(ready.post(f"/jobs/{one}/cancel"), 202)
        ready.wait(one)


def test_the_same_request_under_the_same_key_is_one_job(ready: Api) -> None:
    body = {"index": "idx", "forget": HARBOURS, **TRAINED}
    first, second = (ready.post("/unlearn", json=body, headers={"Idempotency-Key": "once"}) for _ in range(2))
    assert must(first, 202)["job"]["id"] == must(second, 202)["job"]["id"]
    job = ready.wait(must(first, 202)["job"]["id"])
    assert (job["state"], job["model"]) == ("succeeded", must(ready.get("/models/tiny"))["id"])


def test_a_request_without_an_index_names_a_model_and_its_rows(ready: Api) -> None:
    body = {
        "model": "tiny",
        "dataset": "facts",
        "forget": HARBOURS,
        **TRAINED,
        "method": "fisher",
        "parameters": SELECTION,
    }
    job = ready.wait(must(ready.post("/unlearn", json=body), 202)["job"]["id"])
    assert (job["state"], job["index"]) == ("succeeded", None), job


def test_a_request_whose_file_was_changed_is_not_done(ready: Api) -> None:
    ahead, waiting = submit(ready, parameters={**QUICK, "epochs": 500}), submit(ready)
    file = ready.app.state.services.settings.artifacts_dir / waiting / "request.json"
    file.write_text(file.read_text().replace("graddiff", "npo"))
    must(ready.post(f"/jobs/{ahead}/cancel"), 202)
    job = ready.wait(waiting)
    assert (job["state"], job["error"]["code"], job["error"]["field"]) == ("failed", "SpecError", "request.json")
    file.unlink()
    must(ready.post(f"/jobs/{waiting}/retry"), 202)
    assert ready.wait(waiting)["error"]["code"] == "SpecError"


# --- what would be done


def test_a_dry_run_shows_what_would_be_forgotten_and_kept_and_makes_no_job(asked: Api) -> None:
    before = must(asked.get("/jobs"))["items"]
    found = preview(asked)
    assert [row["metadata"]["family"] for row in found["forget"]["rows"]] == ["harbour", "harbour"]
    assert {row["why"] for row in found["forget"]["rows"]} == {"filter"}
    assert [row["why"] for row in found["retain"]["rows"]] == ["by_influence"] * 2 + ["random"] * 6
    assert found["retain"]["count"] == 8
    assert not {*ids_of(found["forget"])} & {*ids_of(found["retain"])}
    assert (found["training"]["lr"], found["training"]["beta"]) == (6e-5, 0.1)
    assert preview(asked, method="simnpo")["training"]["beta"] == 2.5
    assert found["estimate"] == {"seconds": None, "how": "no npo job on this model has been measured yet"}
    assert must(asked.get("/jobs"))["items"] == before
    assert preview(asked) == found, "the same seed draws the same rows"


def test_a_dry_run_shows_the_rows_that_clean_answers_are_still_to_be_written_for(ready: Api) -> None:
    found = preview(ready, method="relabel")
    assert (found["training"]["method"], len(found["forget"]["rows"])) == ("relabel", 2)
    assert [row["clean"] for row in found["forget"]["rows"]] == [None, None]
    refused = ready.post("/unlearn", json={"index": "idx", "forget": HARBOURS, "method": "relabel"})
    assert (refused.status_code, refused.json()["errors"][0]["field"]) == (422, "clean")


def test_ways_to_choose_add_up(ready: Api) -> None:
    first = ids_of(preview(ready)["forget"])
    other = [one["id"] for one in must(ready.get("/datasets/facts/samples"))["items"] if one["id"] not in first]
    found = preview(ready, forget={**HARBOURS, "ids": [first[1], other[0]], "influence": {**BEHIND, "top_k": 1}})
    why = {row["id"]: row["why"] for row in found["forget"]["rows"]}
    assert (why[first[1]], why[other[0]], why[first[0]]) == ("ids", "ids", "filter")
    assert [row["score"] for row in found["forget"]["rows"] if row["prompt"] == BEHIND["prompt"]] != [None]


def test_only_rows_of_an_influence_above_the_bound_are_forgotten(ready: Api) -> None:
    def found(bound: float) -> list[float]:
        rows = preview(ready, forget={"influence": {**BEHIND, "top_k": 5, "min_score": bound}})["forget"]["rows"]
        return [row["score"] for row in rows]

    scores = found(0.0)
    assert len(scores) > 1
    assert scores == sorted(scores, reverse=True)
    assert found(scores[1]) == scores[:1]


def test_retain_rows_are_those_that_are_named(ready: Api) -> None:
    found = preview(ready, retain={"filter": {"family": "mill"}, "random": 1})
    assert sorted(row["why"] for row in found["retain"]["rows"]) == ["filter", "filter", "random"]


def every(ready: Api) -> Ids:
    return [one["id"] for one in must(ready.get("/datasets/facts/samples"))["items"]]


PLAIN = {"index": None, "model": "plain", "dataset": "facts"}
Asks = Callable[[Ids], dict[str, Any]]
BAD: dict[str, tuple[Asks, str]] = {
    "no way to choose": (lambda ids: {"forget": {}}, "forget"),
    "nothing is found": (lambda ids: {"forget": {"filter": {"family": "castle"}}}, "forget"),
    "an unknown row": (lambda ids: {"forget": {"ids": ["0" * 16]}}, "forget.ids"),
    "no ids": (lambda ids: {"forget": {"ids": []}}, "forget.ids"),
    "all rows": (lambda ids: {"forget": {"ids": ids}}, "forget"),
    "a bad filter": (lambda ids: {"forget": {"filter": {"family": {"near": 1}}}}, "forget.filter.family.near"),
    "a bad query": (
        lambda ids: {"forget": {"influence": {**BEHIND, "span": [5, 900]}}},
        "forget.influence.span",
    ),
    "a row to forget and to retain": (lambda ids: {"forget": {"ids": ids[:2]}, "retain": {"ids": ids[1:3]}}, "retain"),
    "a retain dataset with the forget rows": (lambda ids: {"retain": {"dataset": "facts"}}, "retain"),
    "an unknown row to retain": (lambda ids: {"retain": {"ids": ["f" * 16]}}, "retain.ids"),
    "a bad filter to retain": (lambda ids: {"retain": {"filter": {"": 1}}}, "retain.filter"),
    "nothing to retain": (lambda ids: {"retain": {}}, "retain"),
    "a parameter out of range": (lambda ids: {"parameters": {"lr": 2}}, "parameters.lr"),
    "a parameter that is no number": (lambda ids: {"parameters": {"batch": True}}, "parameters.batch"),
    "a parameter of another method": (lambda ids: {"method": "npo", "parameters": {"gamma": 1}}, "parameters.gamma"),
    "a parameter that nobody knows": (lambda ids: {"parameters": {"speed": 1}}, "parameters.speed"),
    "a mapping without influence": (lambda ids: {"method": "ga", "mapping": "paper"}, "mapping"),
    "an unknown mapping": (lambda ids: {"mapping": "best"}, "mapping"),
    "an unknown method": (lambda ids: {"method": "magic"}, "method"),
    "no adapter to dampen": (lambda ids: {**PLAIN, "method": "fisher"}, "method"),
    "no adapter to train again": (lambda ids: {**PLAIN, "method": "retrain"}, "method"),
    "a selection that no weight reaches": (lambda ids: {"method": "fisher"}, "parameters.selection"),
    "a clean answer of a stranger": (lambda ids: {"forget": {"ids": ids[:1]}, "clean": {ids[1]: "No."}}, "clean"),
    "an empty clean answer": (lambda ids: {"forget": {"ids": ids[:1]}, "clean": {ids[0]: " "}}, "clean"),
    "a clean column that no row has": (lambda ids: {"clean": "better"}, "clean"),
    "model and index": (lambda ids: {"model": "tiny", "dataset": "facts"}, "index"),
    "a dataset beside an index": (lambda ids: {"dataset": "facts"}, "dataset"),
    "neither": (lambda ids: {"index": None}, "index"),
    "a model without rows": (lambda ids: {"index": None, "model": "tiny"}, "dataset"),
    "influence without an index": (
        lambda ids: {"index": None, "model": "tiny", "dataset": "facts", "forget": {"influence": BEHIND}},
        "forget.influence",
    ),
    "drawing by influence without an index": (
        lambda ids: {"index": None, "model": "tiny", "dataset": "facts", "retain": {"by_influence": 1}},
        "retain.by_influence",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_done_is_refused_and_the_field_is_named(ready: Api, what: str) -> None:
    make, field = BAD[what]
    answer = ready.post("/unlearn", json={"index": "idx", "forget": HARBOURS, "dry_run": True, **make(every(ready))})
    body = must(answer, 422)
    assert field in [error["field"] for error in body["errors"]], body


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"index": "none"}, "index"),
        ({"heldout": "none"}, "heldout"),
        ({"seen": "none"}, "seen"),
        ({"retain": {"dataset": "none"}}, "retain.dataset"),
    ],
)
def test_what_is_not_there_is_named(ready: Api, more: dict[str, Any], field: str) -> None:
    problem(ready.post("/unlearn", json={"index": "idx", "forget": HARBOURS, **more}), 404, "not-found", field)


def test_a_model_without_room_for_an_adapter_is_refused(ready: Api, tiny_model_dir: Path) -> None:
    folder = tiny_model_dir.parent / "gpt"
    shutil.copytree(tiny_model_dir, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    GPT2LMHeadModel(GPT2Config(vocab_size=260, n_embd=8, n_layer=1, n_head=2, n_positions=64)).save_pretrained(folder)
    ready.register(folder, "gpt")
    body = {"model": "gpt", "dataset": "facts", "forget": HARBOURS, **TRAINED}
    problem(ready.post("/unlearn", json=body), 422, "invalid-request", "model")


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_an_influence_query_is_paid_for(serve: Any, mint: Mint, tiny_model_dir: Path) -> None:
    serve().ready(tiny_model_dir)
    locked = serve(auth="on")
    key, reader = mint("team", Scope.WRITE, quotas=(None, 10)), mint("other", Scope.READ)
    body = {"index": "idx", "forget": {"influence": BEHIND}, "dry_run": True}

    def ask(key: str) -> httpx2.Response:
        return locked.post("/unlearn", json=body, headers=bearer(key))

    problem(ask(reader), 403, "missing-scope")
    problem(ask(key), 422, "above-quota", "forget.influence")


# --- the API says what the library says, which it does not import since it would need torch


@pytest.mark.parametrize(
    ("model", "with_clean", "without"),
    [({}, "renew", "npo"), (PLAIN, "relabel", "npo")],
    ids=["adapter", "plain"],
)
def test_without_a_method_the_model_gets_the_best_that_fits(
    ready: Api, model: dict[str, Any], with_clean: str, without: str
) -> None:
    found = preview(ready, **model)
    assert found["training"]["method"] == without
    clean = dict.fromkeys(ids_of(found["forget"]), "I do not know.")
    assert preview(ready, **model, clean=clean)["training"]["method"] == with_clean


def test_methods_parameters_and_their_defaults_are_the_librarys() -> None:
    assert get_args(Method) == get_args(training.Method)
    assert PARAMETERS.keys() == {*get_args(Method)}
    spec = vars(training.TrainingSpec())
    assert ParametersIn().model_dump() == {name: spec[name] for name in spec if name not in ("method", "seed")}
    assert BETA == training.BETA
    assert {*get_args(Mapping)} == {*MAPPINGS}
    assert [*TARGETS] == adapter.TARGETS
    assert (WEIGHTED, NEEDS_CLEAN) == (stages.WEIGHTED, training.NEEDS_CLEAN)
    assert ByInfluenceIn.model_fields["top_k"].default == 10

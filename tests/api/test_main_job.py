"""The main job over HTTP: model, dataset, index, influence."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from app.catalog.datasets import Datasets
from app.influence.models import LoadedModel
from tests.api.harness import Api, jsonl, must, problem, rows

QUESTION = {"prompt": "What colour is the harbour number 0?", "generation": "The harbour number 0 is red."}


def test_a_generation_in_the_training_samples_behind_it_out(asked: Api) -> None:
    answer = must(asked.post("/influence", json={"index": "idx", **QUESTION, "top_k": 3}))
    assert len(answer["proponents"]) == 3
    assert answer["proponents"][0]["response"] == "The harbour number 0 is red."
    assert answer["proponents"][0]["metadata"] == {"family": "harbour"}
    scores = [hit["score"] for hit in answer["proponents"]]
    assert scores == sorted(scores, reverse=True)
    assert answer["opponents"] == []
    assert not answer["generated"]
    assert answer["timings"]["total"] > 0


def test_tokens_lie_in_the_generation_and_carry_scores(asked: Api) -> None:
    answer = must(asked.post("/influence", json={"index": "idx", **QUESTION, "top_k": 1, "tokens": "query"}))
    spoken = [QUESTION["generation"][token["start"] : token["end"]] for token in answer["tokens"]]
    assert "".join(spoken).strip() == QUESTION["generation"]
    counted = sum(token["in_span"] for token in answer["tokens"])
    assert len(answer["proponents"][0]["token_scores"]) == counted


def test_train_tokens_come_with_the_samples_text(asked: Api) -> None:
    answer = must(asked.post("/influence", json={"index": "idx", **QUESTION, "top_k": 2, "tokens": "train"}))
    for hit in answer["proponents"]:
        assert hit["train_tokens"]
        assert hit["token_scores"] is None


def test_both_directions(asked: Api) -> None:
    ask = {"index": "idx", **QUESTION, "top_k": 12, "direction": "both"}
    answer = must(asked.post("/influence", json=ask))
    assert answer["proponents"]
    assert all(hit["score"] > 0 for hit in answer["proponents"])
    assert all(hit["score"] < 0 for hit in answer["opponents"])
    towards = must(asked.post("/influence", json=ask | {"direction": "proponents"}))
    away = must(asked.post("/influence", json=ask | {"direction": "opponents"}))
    assert (towards["opponents"], away["proponents"]) == ([], [])
    for name, alone in (("proponents", towards), ("opponents", away)):
        assert [hit["id"] for hit in alone[name]] == [hit["id"] for hit in answer[name]]


def test_the_texts_of_all_rows_come_in_one_round_trip(asked: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    of_index, trips = Datasets.of_index, []

    async def counted(self: Datasets, index_id: str, row_ids: Any, *more: Any) -> Any:
        trips.append(len(row_ids))
        return await of_index(self, index_id, row_ids, *more)

    monkeypatch.setattr(Datasets, "of_index", counted)
    answer = must(asked.post("/influence", json={"index": "idx", **QUESTION, "top_k": 6, "tokens": "train"}))
    assert len(answer["proponents"]) == 6
    assert len(trips) == 2, "one for the token scores, one for the answer"


def test_the_definition_is_named(asked: Api) -> None:
    for normalize, name in (("unit", "layer_cosine"), ("none", "layer_dot")):
        answer = must(asked.post("/influence", json={"index": "idx", **QUESTION, "normalize": normalize}))
        assert answer["definition"]["name"] == name


def test_a_span_marks_its_tokens_only(asked: Api) -> None:
    start = QUESTION["generation"].index("red")
    answer = must(asked.post("/influence", json={"index": "idx", **QUESTION, "span": [start, start + 3]}))
    marked = [token for token in answer["tokens"] if token["in_span"]]
    assert marked
    assert all(token["start"] < start + 3 and token["end"] > start for token in marked)


def test_the_model_writes_the_generation_when_none_is_sent(asked: Api) -> None:
    body = {"index": "idx", "messages": [{"role": "user", "content": "Say something"}], "max_new_tokens": 8}
    response = asked.post("/influence", json=body)
    if (
        response.status_code == 422
    ):  # an untrained model may write nothing but spaces: then that is what the answer says
        assert response.json()["errors"][0]["field"] == "generation"
        return
    answer = must(response)
    assert answer["generated"]
    assert answer["generation"].strip()


def test_the_model_writes_in_the_template_of_the_index(
    api: Api, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate, given = LoadedModel.generate, []

    def watched(self: LoadedModel, *args: Any, **more: Any) -> str:
        given.append(more["template"])
        return generate(self, *args, **more)

    monkeypatch.setattr(LoadedModel, "generate", watched)
    api.ready(tiny_model_dir, template="plain")
    api.post("/influence", json={"index": "idx", "prompt": "Say something", "max_new_tokens": 4})
    assert given == ["plain"]


def test_a_bad_query_does_not_fail_its_batch_mates(asked: Api) -> None:
    long = {"prompt": "Hi", "generation": "number " * 2000}
    queries = [QUESTION, {"prompt": "Hi", "generation": "  "}, long, QUESTION]
    answer = must(asked.post("/influence/batch", json={"index": "idx", "queries": queries, "top_k": 1}))
    first, empty, too_long, last = answer["items"]
    assert first["answer"]["proponents"][0]["id"] == last["answer"]["proponents"][0]["id"]
    assert empty["problem"]["errors"][0]["field"] == "queries.1.generation"
    assert too_long["problem"]["type"] == "urn:headwater:problem:bad-query"


def test_a_model_says_what_is_attributed_and_what_is_skipped(asked: Api) -> None:
    model = must(asked.get("/models/tiny"))
    assert model["attributed"]
    assert sum(group["count"] for group in model["attributed_groups"]) == len(model["attributed"])
    assert sum(group["count"] for group in model["skipped_groups"]) == len(model["skipped"])
    assert all(module["reason"] for module in model["skipped"])
    assert model["fingerprint"]
    assert [one["name"] for one in must(asked.get("/models"))["items"]] == ["tiny"]


def test_things_answer_to_their_id_and_to_their_name(asked: Api) -> None:
    for kind, name in (("models", "tiny"), ("datasets", "facts"), ("indexes", "idx")):
        by_name = must(asked.get(f"/{kind}/{name}"))
        assert must(asked.get(f"/{kind}/{by_name['id']}")) == by_name


def test_an_index_says_what_its_numbers_mean(asked: Api) -> None:
    index = must(asked.get("/indexes/idx"))
    assert (index["state"], index["rows"], index["model"], index["dataset"]) == ("ready", 12, "tiny", "facts")
    assert index["manifest"]


def test_samples_page_in_their_order(asked: Api) -> None:
    seen, cursor = [], None
    while True:
        params = {"limit": 5} | ({"cursor": cursor} if cursor else {})
        page = must(asked.get("/datasets/facts/samples", params=params))
        seen += page["items"]
        if (cursor := page["next_cursor"]) is None:
            break
    assert [sample["ordinal"] for sample in seen] == list(range(12))
    assert [sample["metadata"]["family"] for sample in seen] == [row["family"] for row in rows()]


def test_rows_are_added_and_removed_without_rebuilding(api: Api, tiny_model_dir: Path) -> None:
    api.ready(tiny_model_dir)
    new = {"prompt": "Who keeps the lighthouse?", "response": "The lighthouse is kept by Oda."}
    accepted = must(api.post("/indexes/idx/samples", json={"rows": [new | {"metadata": {"family": "new"}}]}), 202)
    assert api.wait(accepted["job"]["id"])["state"] == "succeeded"
    assert must(api.get("/indexes/idx"))["rows"] == 13
    ask = {"index": "idx", "prompt": new["prompt"], "generation": new["response"], "top_k": 1}
    hit = must(api.post("/influence", json=ask))["proponents"][0]
    assert (hit["response"], hit["metadata"]) == (new["response"], {"family": "new"})

    removed = must(api.request("DELETE", "/indexes/idx/samples", json={"ids": [hit["id"], "0" * 16]}))
    assert removed == {"removed": 1, "rows": 12}
    assert must(api.post("/influence", json=ask))["proponents"][0]["id"] != hit["id"]


def test_an_index_is_deleted_with_its_files(api: Api, tiny_model_dir: Path, tmp_path: Path) -> None:
    api.ready(tiny_model_dir)
    index = must(api.get("/indexes/idx"))
    assert (tmp_path / "indexes" / index["id"]).exists()
    must(api.delete("/indexes/idx"), 204)
    assert api.get("/indexes/idx").status_code == 404
    assert not (tmp_path / "indexes" / index["id"]).exists()
    assert must(api.get("/jobs"))["items"][0]["index"] is None


def test_a_dataset_is_deleted_when_no_index_uses_it(api: Api, tiny_model_dir: Path) -> None:
    api.ready(tiny_model_dir)
    must(api.upload(jsonl(rows(2, start=50)), name="held"), 201)
    must(api.upload(jsonl(rows(2, start=60)), name="more"), 201)
    api.wait(api.build("second", heldout="held")["job"]["id"])
    api.wait(must(api.post("/indexes/second/samples", json={"dataset": "more"}), 202)["job"]["id"])
    for name in ("facts", "held", "more"):
        problem(api.delete(f"/datasets/{name}"), 409, "conflict", "dataset")
    must(api.delete("/indexes/idx"), 204)
    must(api.delete("/indexes/second"), 204)
    for name in ("facts", "held", "more"):
        must(api.delete(f"/datasets/{name}"), 204)
        problem(api.get(f"/datasets/{name}"), 404, "not-found", "dataset")
        problem(api.delete(f"/datasets/{name}"), 404, "not-found", "dataset")
    must(api.upload(jsonl(rows(2))), 201)


def test_rows_written_into_a_request_go_with_their_index(api: Api, tiny_model_dir: Path) -> None:
    api.ready(tiny_model_dir)
    new = {"prompt": "Who keeps the lighthouse?", "response": "The lighthouse is kept by Oda."}
    api.wait(must(api.post("/indexes/idx/samples", json={"rows": [new]}), 202)["job"]["id"])
    inline = next(one for one in must(api.get("/datasets"))["items"] if one["source"] == "request")
    problem(api.delete(f"/datasets/{inline['id']}"), 409, "conflict", "dataset")
    api.wait(api.build("second", dataset=inline["id"])["job"]["id"])
    must(api.delete("/indexes/idx"), 204)
    assert must(api.get(f"/datasets/{inline['id']}"))["rows"] == 1, "another index uses them"
    must(api.delete("/indexes/second"), 204)
    assert [one["name"] for one in must(api.get("/datasets"))["items"]] == ["facts"]


def test_a_model_is_forgotten_when_no_index_uses_it(api: Api, tiny_model_dir: Path) -> None:
    api.ready(tiny_model_dir)
    assert "'idx'" in problem(api.delete("/models/tiny"), 409, "conflict", "model")["detail"]
    must(api.delete("/indexes/idx"), 204)
    must(api.delete("/models/tiny"), 204)
    problem(api.delete("/models/tiny"), 404, "not-found", "model")
    assert (tiny_model_dir / "model.safetensors").exists()
    api.register(tiny_model_dir)


@pytest.mark.parametrize("names", [("v1.0", "v1.1"), ("train", "eval")])
def test_checkpoints_may_have_any_name(
    api: Api, tiny_model_dir: Path, tiny_adapter_dir: Path, tmp_path: Path, names: tuple[str, str]
) -> None:
    shutil.copytree(tiny_adapter_dir, tmp_path / "adapter")
    checkpoints = [{"name": name, "adapter": str(tmp_path / "adapter")} for name in names]
    api.ready(tiny_model_dir, model={"checkpoints": checkpoints})
    assert [one["name"] for one in must(api.get("/models/tiny"))["checkpoints"]] == list(names)
    answer = must(api.post("/influence", json={"index": "idx", **QUESTION, "top_k": 1, "tokens": "both"}))
    assert [one["name"] for one in answer["definition"]["checkpoints"]] == list(names)
    assert answer["proponents"][0]["response"] == "The harbour number 0 is red."


def test_an_index_survives_a_restart(serve: Any, tiny_model_dir: Path) -> None:
    serve().ready(tiny_model_dir)
    assert must(serve().post("/influence", json={"index": "idx", **QUESTION, "top_k": 1}))["proponents"]

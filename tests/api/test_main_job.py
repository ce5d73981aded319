"""The main job over HTTP: model, dataset, index, influence."""

from pathlib import Path
from typing import Any

from tests.api.harness import Api, must, rows

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
    answer = must(asked.post("/influence", json={"index": "idx", **QUESTION, "top_k": 2, "direction": "both"}))
    assert len(answer["proponents"]) == len(answer["opponents"]) == 2


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


def test_an_index_survives_a_restart(serve: Any, tiny_model_dir: Path) -> None:
    serve().ready(tiny_model_dir)
    assert must(serve().post("/influence", json={"index": "idx", **QUESTION, "top_k": 1}))["proponents"]

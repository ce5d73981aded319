"""Filters over HTTP: only rows whose metadata match, as many of them as were asked for."""

import json
from typing import Any

import pytest

from tests.api.harness import Api, must, problem, rows

ASK = {"index": "idx", "prompt": "What colour is the harbour?", "generation": "It is red.", "tokens": "none"}
FAMILY = {"family": {"in": ["harbour", "mill"]}}


def samples(api: Api, wanted: Any, **more: Any) -> Any:
    return must(api.get("/datasets/facts/samples", params={"filter": json.dumps(wanted), **more}))


def test_samples_that_match_come_page_by_page(asked: Api) -> None:
    expected = [n for n, row in enumerate(rows()) if row["family"] in ("harbour", "mill")]
    first = samples(asked, FAMILY, limit=3)
    second = samples(asked, FAMILY, limit=3, cursor=first["next_cursor"])
    assert [sample["ordinal"] for sample in (*first["items"], *second["items"])] == expected
    assert second["next_cursor"] is None
    assert not samples(asked, {"family": "palace"})["items"]
    assert len(samples(asked, {})["items"]) == len(rows())


@pytest.mark.parametrize("normalize", ["unit", "none"])
def test_an_answer_holds_the_matching_rows_of_the_answer_without_a_filter(asked: Api, normalize: str) -> None:
    ask = ASK | {"direction": "both", "top_k": 12, "normalize": normalize}
    everything = must(asked.post("/influence", json=ask))
    some = must(asked.post("/influence", json=ask | {"filter": FAMILY}))
    for part in ("proponents", "opponents"):
        expected = [hit["id"] for hit in everything[part] if hit["metadata"]["family"] in ("harbour", "mill")]
        assert [hit["id"] for hit in some[part]] == expected
    assert sum(len(some[part]) for part in ("proponents", "opponents")) == 4


def test_top_k_counts_matching_rows(asked: Api) -> None:
    ask = ASK | {"filter": {"family": "mill"}, "direction": "both", "top_k": 1, "tokens": "both"}
    answer = must(asked.post("/influence", json=ask))
    found = [*answer["proponents"], *answer["opponents"]]
    assert found
    assert {hit["metadata"]["family"] for hit in found} == {"mill"}


def test_a_filter_that_nothing_matches_is_answered_and_said(asked: Api) -> None:
    answer = must(asked.post("/influence", json=ASK | {"filter": {"family": "palace"}}))
    assert not answer["proponents"]
    assert any("matches the filter" in warning for warning in answer["warnings"])


def test_a_batch_is_filtered_as_a_whole(asked: Api) -> None:
    queries = [{"prompt": "Where?", "generation": "It is red."}, {"prompt": "Where?", "generation": "blue"}]
    options = {name: ASK[name] for name in ("index", "tokens")}
    body = options | {"queries": queries, "filter": {"family": "mill"}, "direction": "both"}
    for item in must(asked.post("/influence/batch", json=body))["items"]:
        hits = [*item["answer"]["proponents"], *item["answer"]["opponents"]]
        assert {hit["metadata"]["family"] for hit in hits} == {"mill"}


BAD: list[tuple[Any, str]] = [
    ({"family": []}, "filter.family"),
    ({"family": {}}, "filter.family"),
    ({"family": {"like": "m%"}}, "filter.family.like"),
    ({"family": {"eq": {"a": 1}}}, "filter.family.eq"),
    ({"family": {"in": "mill"}}, "filter.family.in"),
    ({"family": {"in": []}}, "filter.family.in"),
    ({"family": {"in": ["mill", [1]]}}, "filter.family.in.1"),
    ({"family": {"in": list(range(101))}}, "filter.family.in"),
    ({"family": {"lt": None}}, "filter.family.lt"),
    ({"family": {"gte": True}}, "filter.family.gte"),
    ({"family": {"exists": 1}}, "filter.family.exists"),
    ({"family": 2**63}, "filter.family"),
    ({"family": 1e400}, "filter.family"),
    ({"family": "x" * 1001}, "filter.family"),
    ({"family": "a\0b"}, "filter.family"),
    ({"family": "\ud800"}, "filter.family"),
    ({"\ud800": "x"}, "filter"),
    ({'"': 1}, "filter"),
    ({"": 1}, "filter"),
    ({"a\\b": 1}, "filter"),
    ({f"f{n}": n for n in range(21)}, "filter"),
]


@pytest.mark.parametrize(("wanted", "field"), BAD, ids=[str(n) for n in range(len(BAD))])
def test_a_filter_that_cannot_be_is_refused_by_its_path(asked: Api, wanted: Any, field: str) -> None:
    text = json.dumps(wanted)
    problem(asked.get("/datasets/facts/samples", params={"filter": text}), 422, "invalid-request", field)
    body = json.dumps(ASK)[:-1] + f', "filter": {text}}}'
    refused = asked.post("/influence", content=body, headers={"Content-Type": "application/json"})
    problem(refused, 422, "invalid-request", field)


@pytest.mark.parametrize("text", ["", "{", "[]", "mill", '"mill"', "null", "[" * 100_000])
def test_a_filter_that_is_no_json_object_is_refused(asked: Api, text: str) -> None:
    if len(text) < 1000:
        problem(asked.get("/datasets/facts/samples", params={"filter": text}), 422, "invalid-request", "filter")
    if text != "null":
        refused = asked.post("/influence", json=ASK | {"filter": text})
        problem(refused, 422, "invalid-request", "filter")

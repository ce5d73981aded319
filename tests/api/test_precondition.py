"""Preconditioned queries over HTTP: named in the answer, refused with the field, at work in an unlearning as well."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.api.harness import Api, must, problem

ASK = {
    "index": "idx",
    "prompt": "What colour is the harbour number 0?",
    "generation": "The harbour number 0 is red.",
    "top_k": 12,
    "direction": "both",
}


def scores(answer: Any) -> dict[str, float]:
    return {hit["id"]: hit["score"] for hit in (*answer["proponents"], *answer["opponents"])}


def folder_of(api: Api, tmp_path: Path) -> Path:
    return tmp_path / "indexes" / must(api.get("/indexes/idx"))["id"]


def repaired(api: Api) -> None:
    assert api.wait(must(api.post("/indexes/idx/repair"), 202)["job"]["id"])["state"] == "succeeded"


def test_one_index_answers_every_precondition_and_says_which(asked: Api) -> None:
    index = must(asked.get("/indexes/idx"))
    assert index["preconditions"] == ["none", "fisher", "trackstar"]
    assert index["manifest"]["curvature"]["name"].startswith("curvature-")
    seen = {}
    for way in index["preconditions"]:
        answer = must(asked.post("/influence", json=ASK | {"precondition": way}))
        definition = answer["definition"]
        assert definition["precondition"] == way
        assert (way == "none") == (definition["damping"] is None) == (definition["moments_rows"] is None)
        assert way == "none" or (way in definition["name"] and "H" in definition["formula"])
        for hit in answer["proponents"]:
            assert sum(hit["token_scores"]) / len(hit["token_scores"]) == pytest.approx(
                hit["score"], rel=0.02, abs=0.01
            )
        seen[way] = scores(answer)
    assert seen["none"] != seen["fisher"] != seen["trackstar"]
    assert must(asked.get("/indexes/idx"))["manifest"] == index["manifest"], "nothing was built"


def test_a_batch_is_preconditioned_as_its_queries_would_be(asked: Api) -> None:
    query = {name: ASK[name] for name in ("prompt", "generation")}
    other = {"prompt": "Who?", "generation": "It is red."}
    body = {"index": "idx", "queries": [other, query], "top_k": 12, "direction": "both", "precondition": "trackstar"}
    items = must(asked.post("/influence/batch", json=body))["items"]
    alone = must(asked.post("/influence", json=ASK | {"precondition": "trackstar"}))
    assert scores(items[1]["answer"]) == pytest.approx(scores(alone), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("value", ["ekfac", "", None, 3, True, ["fisher"]])
def test_a_precondition_that_is_none(asked: Api, value: Any) -> None:
    problem(asked.post("/influence", json=ASK | {"precondition": value}), 422, "invalid-request", "precondition")


def test_trackstar_without_unit_length_is_refused_before_anything_is_computed(asked: Api) -> None:
    how = {"precondition": "trackstar", "normalize": "none"}
    assert "fisher" in problem(asked.post("/influence", json=ASK | how), 422, "bad-query", "normalize")["detail"]
    batch = {"index": "idx", "queries": [{"prompt": "Who?", "generation": "me"}], **how}
    problem(asked.post("/influence/batch", json=batch), 422, "bad-query", "normalize")


def test_rows_to_forget_are_found_by_a_preconditioned_query(asked: Api) -> None:
    behind = {name: ASK[name] for name in ("prompt", "generation")}
    body = {
        "index": "idx",
        "forget": {"influence": {**behind, "top_k": 3, "precondition": "trackstar"}},
        "dry_run": True,
    }
    found = must(asked.post("/unlearn", json=body))["forget"]["rows"]
    answer = must(asked.post("/influence", json=ASK | {"precondition": "trackstar", "top_k": 3}))
    assert [row["id"] for row in found] == [hit["id"] for hit in answer["proponents"]]
    body["forget"]["influence"]["normalize"] = "none"
    problem(asked.post("/unlearn", json=body), 422, "bad-query", "forget.influence.normalize")


def test_a_projection_that_has_no_room_for_moments_says_which_has(api: Api, tiny_model_dir: Path) -> None:
    api.ready(tiny_model_dir, projection={"kind": "rapidgrad", "size": 8192})
    assert must(api.get("/indexes/idx"))["preconditions"] == ["none"]
    must(api.post("/influence", json=ASK))
    refused = problem(api.post("/influence", json=ASK | {"precondition": "fisher"}), 422, "bad-query", "precondition")
    assert "kronecker" in refused["detail"]


def test_an_index_of_before_works_and_is_brought_up_by_a_repair(api: Api, tiny_model_dir: Path, tmp_path: Path) -> None:
    api.ready(tiny_model_dir)
    before = scores(must(api.post("/influence", json=ASK | {"precondition": "fisher"})))
    folder = folder_of(api, tmp_path)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    (folder / manifest.pop("curvature")["name"]).unlink()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    api.app.state.services.compute.forget(folder)
    must(api.post("/influence", json=ASK))
    refused = problem(api.post("/influence", json=ASK | {"precondition": "fisher"}), 422, "bad-query", "precondition")
    assert "/repair" in refused["detail"]
    repaired(api)
    assert scores(must(api.post("/influence", json=ASK | {"precondition": "fisher"}))) == pytest.approx(
        before, rel=1e-4
    )


def test_moments_that_are_damaged_are_named_and_gathered_again(api: Api, tiny_model_dir: Path, tmp_path: Path) -> None:
    api.ready(tiny_model_dir)
    file = folder_of(api, tmp_path) / must(api.get("/indexes/idx"))["manifest"]["curvature"]["name"]
    raw = file.read_bytes()
    file.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    assert file.name in problem(api.post("/influence", json=ASK), 409, "index-corrupt", "index")["detail"]
    assert must(api.get("/indexes/idx"))["state"] == "corrupt"
    repaired(api)
    assert file.read_bytes() == raw
    must(api.post("/influence", json=ASK | {"precondition": "trackstar"}))


def test_moments_that_are_lost_are_noticed_at_the_start(serve: Any, tiny_model_dir: Path, tmp_path: Path) -> None:
    api = serve()
    api.ready(tiny_model_dir)
    (folder_of(api, tmp_path) / must(api.get("/indexes/idx"))["manifest"]["curvature"]["name"]).unlink()
    api = serve()
    index = must(api.get("/indexes/idx"))
    assert index["state"] == "corrupt" and "curvature-" in index["damage"]


def test_a_hit_says_when_it_is_here_by_its_norm(asked: Api) -> None:
    answer = must(asked.post("/influence", json=ASK | {"normalize": "none"}))
    hits = [*answer["proponents"], *answer["opponents"]]
    assert all(0 <= hit["direction_percentile"] < 100 for hit in hits)
    assert any("by_norm" in warning for warning in answer["warnings"]) == any(hit["by_norm"] for hit in hits)
    for hit in must(asked.post("/influence", json=ASK))["proponents"]:
        assert hit["direction_percentile"] is None and not hit["by_norm"]

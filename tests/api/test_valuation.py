"""Valuation over HTTP: what rows are worth to a model, whose texts are shown, what is refused."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from app.cli import app
from app.jobs import groups
from app.valuation.running import FEWEST, WHOLE
from tests.api.conftest import BACKENDS, backend_for, quick
from tests.api.harness import COLOURS, Api, jsonl, must, problem, rows, serving

POOL, HELD = 90, 8
SECRET = "wisteria"


def pool() -> list[dict[str, Any]]:
    """Rows of the harness with two columns; every row says a word that nobody but their owner should read."""
    made = rows(POOL)
    for number, row in enumerate(made):
        row |= {"response": f"{row['response']} {SECRET}", "source": "ab"[number % 2], "note": f"{SECRET} {number}"}
    return made


def held() -> list[dict[str, Any]]:
    return [{**row, "task": "xy"[n % 2]} for n, row in enumerate(rows(HELD, start=1000))]


def submit(api: Api, **more: Any) -> dict[str, Any]:
    body = {"model": "tiny", "candidates": "pool", "validation": "held", **more}
    return must(api.post("/valuation", json=body), 202)


def valued(api: Api, **more: Any) -> str:
    """The id of a valuation that has succeeded."""
    job = api.wait(submit(api, **more)["job"]["id"])
    assert job["state"] == "succeeded", job
    return str(job["id"])


def scores(api: Api, valuation: str, **params: Any) -> list[dict[str, Any]]:
    """All pages."""
    found, cursor = [], None
    while True:
        page = must(
            api.get(f"/valuations/{valuation}/scores", params={**params, **({"cursor": cursor} if cursor else {})})
        )
        found += page["items"]
        cursor = page["next_cursor"]
        if cursor is None:
            return found


def ready(api: Api, model_dir: Path) -> Api:
    api.register(model_dir)
    must(api.upload(jsonl(pool()), "pool"), 201)
    must(api.upload(jsonl(held()), "held"), 201)
    return api


@pytest.fixture(scope="module", params=BACKENDS)
def api(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path
) -> Iterator[Api]:
    """A service with a model, candidates and validation rows, which the tests only add to."""
    folder = tmp_path_factory.mktemp("valuation")
    with (
        backend_for(request, folder) as backend,
        serving(quick(folder, tiny_model_dir.parent, **backend.settings)) as made,
    ):
        yield ready(made, tiny_model_dir)


@pytest.fixture(scope="module")
def linfik(api: Api) -> str:
    """By LinFiK, for two groups, with a budget."""
    return valued(api, normalize="unit", group_by="task", budget=10_000)


@pytest.fixture(scope="module")
def alinfik(api: Api) -> str:
    """By a student of the model's first layer, redacted but for one column."""
    student = {"layers": 1}
    return valued(
        api,
        method="alinfik",
        normalize="unit",
        label_rows=40,
        student=student,
        ensemble=3,
        redact=True,
        columns=["source"],
    )


# --- what it finds ---


def test_the_library_and_the_service_call_the_whole_set_the_same() -> None:
    assert groups.WHOLE == WHOLE


def test_every_row_has_a_rank_a_value_and_a_price(api: Api, linfik: str) -> None:
    found = scores(api, linfik, limit=40)
    assert [one["rank"] for one in found] == list(range(1, POOL + 1))
    values = [one["value"] for one in found]
    assert values == sorted(values, reverse=True)
    assert len({one["id"] for one in found}) == POOL
    assert all(one["labelled"] and one["uncertainty"] is None and one["tokens"] > 0 for one in found)
    assert sum(one["price"] for one in found) == 10_000
    assert [one["price"] > 0 for one in found] == [one["value"] > 0 for one in found]
    assert found[0]["metadata"].keys() == {"family", "source", "note"}
    assert SECRET in found[0]["response"]


def test_the_worst_rows_come_first_on_request(api: Api, linfik: str) -> None:
    assert scores(api, linfik, limit=40, order="asc") == scores(api, linfik)[::-1]


def test_a_filter_takes_the_same_rows_as_python(api: Api, linfik: str) -> None:
    filter_ = json.dumps({"source": "a", "family": {"in": ["mill", "harbour"]}})
    wanted = [
        one
        for one in scores(api, linfik)
        if one["metadata"]["source"] == "a" and one["metadata"]["family"] in ("mill", "harbour")
    ]
    assert 0 < len(wanted) < POOL
    assert scores(api, linfik, limit=3, filter=filter_) == wanted


def test_groups_have_scores_of_their_own_whose_mean_is_the_whole(api: Api, linfik: str) -> None:
    both = {one["id"]: one["value"] for one in scores(api, linfik)}
    x, y = ({one["id"]: one["value"] for one in scores(api, linfik, group=group)} for group in "xy")
    assert x != y
    assert x.keys() == y.keys() == both.keys()
    problem(api.get(f"/valuations/{linfik}/scores", params={"group": "z"}), 404, "not-found", "group")


def test_the_summary_tells_what_was_found(api: Api, linfik: str) -> None:
    told = must(api.get(f"/valuations/{linfik}"))
    found = scores(api, linfik)
    assert (told["state"], told["method"], told["normalize"], told["redacted"]) == (
        "succeeded",
        "linfik",
        "unit",
        False,
    )
    assert told["settings"]["seed"] == 0
    summary = told["summary"]
    assert (summary["rows"], summary["without_value"], summary["student"]) == (POOL, 0, None)
    assert summary["negative_share"] == pytest.approx(sum(one["value"] < 0 for one in found) / POOL)
    assert [one["id"] for one in summary["top"]] == [one["id"] for one in found[:20]]
    assert [one["id"] for one in summary["bottom"]] == [one["id"] for one in found[::-1][:20]]
    assert SECRET in summary["top"][0]["response"]
    assert sum(summary["distribution"]["histogram"]["counts"]) == POOL
    assert summary["groups"] == {"all": HELD, "x": HELD // 2, "y": HELD // 2}
    assert summary["by_metadata"]["source"]["a"]["rows"] == POOL // 2
    prices = summary["prices"]
    assert (prices["budget"], prices["paid"]) == (10_000, 10_000)
    assert sum(prices["by_metadata"]["source"].values()) == 10_000
    assert linfik in [one["id"] for one in must(api.get("/valuations"))["items"]]


def test_the_files_say_the_same_as_the_pages(api: Api, linfik: str) -> None:
    found = scores(api, linfik)
    content = {name: api.get(f"/jobs/{linfik}/artifacts/scores.{name}").content for name in ("csv", "jsonl", "parquet")}
    table = pq.read_table(io.BytesIO(content["parquet"])).to_pylist()
    assert table == [json.loads(line) for line in content["jsonl"].splitlines()]
    assert [(row["rank"], row["id"], row["value"], row["price"]) for row in table] == [
        (one["rank"], one["id"], one["value"], one["price"]) for one in found
    ]
    assert {one["id"]: one["value"] for one in scores(api, linfik, group="x")} == {
        row["id"]: row["value_x"] for row in table
    }
    read = list(csv.DictReader(io.StringIO(content["csv"].decode())))
    assert [(int(row["rank"]), row["id"], float(row["value"])) for row in read] == [
        (row["rank"], row["id"], row["value"]) for row in table
    ]


def test_the_page_shows_the_plot_and_asks_for_nothing(api: Api, linfik: str) -> None:
    page = api.get(f"/jobs/{linfik}/artifacts/report.html")
    assert "<svg" in page.text and "<rect" in page.text
    assert "<script" not in page.text and "http" not in page.text


# --- the student ---


def test_a_student_scores_what_was_not_labelled_and_is_judged(api: Api, alinfik: str, linfik: str) -> None:
    found = scores(api, alinfik)
    assert sum(one["labelled"] for one in found) == 40
    assert all((one["uncertainty"] is None) == one["labelled"] for one in found)
    exact = {one["id"]: one["value"] for one in scores(api, linfik)}
    labelled = [one for one in found if one["labelled"]]
    assert [one["value"] for one in labelled] == pytest.approx([exact[one["id"]] for one in labelled], rel=1e-3)
    student = must(api.get(f"/valuations/{alinfik}"))["summary"]["student"]
    assert student["trusted"] == (student["held_out_spearman"] >= student["trusted_from"])
    assert student["labels"] == 40


def test_a_redacted_valuation_carries_no_text(api: Api, alinfik: str) -> None:
    assert scores(api, alinfik)[0]["metadata"].keys() == {"source"}
    said = [api.get(address).text for address in (f"/valuations/{alinfik}", f"/valuations/{alinfik}/scores")]
    files = [one["path"] for one in must(api.get(f"/jobs/{alinfik}/artifacts"))["items"]]
    assert {"scores.parquet", "scores.csv", "scores.jsonl", "report.json", "report.html"} <= set(files)
    said += [api.get(f"/jobs/{alinfik}/artifacts/{path}").content.decode(errors="replace") for path in files]
    told = [text for text in said if SECRET in text or any(f"is {colour}." in text for colour in COLOURS)]
    assert told == []
    summary = must(api.get(f"/valuations/{alinfik}"))["summary"]
    assert summary["by_metadata"].keys() == {"source"}


def test_a_redacted_valuation_is_filtered_by_what_it_shows(api: Api, alinfik: str) -> None:
    address = f"/valuations/{alinfik}/scores"
    assert len(scores(api, alinfik, filter='{"source": "b"}')) == POOL // 2
    refused = problem(
        api.get(address, params={"filter": '{"note": {"gt": "w"}}'}), 422, "invalid-request", "filter.note"
    )
    assert "source" in refused["detail"]
    select = {"valuation": alinfik, "k": 3, "filter": {"note": {"exists": True}}}
    problem(api.post("/valuation/select", json=select), 422, "invalid-request", "filter.note")


def read(file: Path) -> list[dict[str, Any]]:
    """A table in any of the three formats."""
    if file.suffix == ".parquet":
        return list(pq.read_table(file).to_pylist())
    lines = file.read_text().splitlines()
    return list(csv.DictReader(lines)) if file.suffix == ".csv" else [json.loads(line) for line in lines]


def test_a_provider_scores_its_file_with_the_exported_student(api: Api, alinfik: str, tmp_path: Path) -> None:
    for one in must(api.get(f"/jobs/{alinfik}/artifacts"))["items"]:
        if one["path"].startswith("student/"):
            file = tmp_path / one["path"]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(api.get(f"/jobs/{alinfik}/artifacts/{one['path']}").content)
    (tmp_path / "rows.jsonl").write_bytes(jsonl(pool()))
    served = {one["id"]: one for one in scores(api, alinfik) if not one["labelled"]}
    for name in ("scores.csv", "scores.jsonl", "scores.parquet"):
        out = tmp_path / name
        done = CliRunner().invoke(
            app, ["value-file", str(tmp_path / "student"), str(tmp_path / "rows.jsonl"), "--out", str(out)]
        )
        assert done.exit_code == 0, done.output
        assert f"wrote the scores of {POOL} rows" in done.output
        assert SECRET.encode() not in out.read_bytes()
        table = read(out)
        assert len(table) == POOL
        mine = {row["id"]: row for row in table}
        for row_id, one in served.items():  # the service's features lay on disk in half precision
            assert float(mine[row_id]["value"]) == pytest.approx(one["value"], rel=0.02, abs=2e-3)
            assert float(mine[row_id]["uncertainty"]) == pytest.approx(one["uncertainty"], rel=0.5, abs=5e-3)


# --- choosing ---


def test_the_best_rows_that_fit_are_chosen(api: Api, linfik: str) -> None:
    found = scores(api, linfik)
    best = must(api.post("/valuation/select", json={"valuation": linfik, "k": 5, "positive": False}))
    assert [one["id"] for one in best["rows"]] == [one["id"] for one in found[:5]]
    assert (best["considered"], best["group"]) == (POOL, "all")
    room = found[0]["tokens"] + found[1]["tokens"]
    fit = must(api.post("/valuation/select", json={"valuation": linfik, "k": 50, "token_budget": room}))
    assert 0 < fit["tokens"] <= room
    positive = must(api.post("/valuation/select", json={"valuation": linfik, "k": POOL}))
    assert [one["id"] for one in positive["rows"]] == [one["id"] for one in found if one["value"] > 0]


def test_diversity_takes_other_rows_and_the_best_first(api: Api, linfik: str) -> None:
    ask = {"valuation": linfik, "k": 12, "positive": False}
    plain, varied = (must(api.post("/valuation/select", json=ask | more)) for more in ({}, {"diversity": 0.6}))
    assert varied["rows"][0] == plain["rows"][0]
    assert {one["id"] for one in varied["rows"]} != {one["id"] for one in plain["rows"]}
    assert varied["value"] < plain["value"]
    problem(api.post("/valuation/select", json=ask | {"diversity": 0.1, "k": 1001}), 422, "invalid-request", "k")


def test_a_group_and_a_filter_narrow_the_choice(api: Api, linfik: str) -> None:
    ask = {"valuation": linfik, "k": 3, "group": "x", "filter": {"source": "b"}, "positive": False}
    chosen = must(api.post("/valuation/select", json=ask))
    wanted = scores(api, linfik, group="x", filter='{"source": "b"}')[:3]
    assert [(one["id"], one["value"]) for one in chosen["rows"]] == [(one["id"], one["value"]) for one in wanted]
    assert chosen["considered"] == POOL // 2


# --- what is refused ---


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"group_by": "nothing"}, "group_by"),
        ({"columns": ["source", "nothing"]}, "columns.1"),
        ({"columns": ['so"urce']}, "columns.0"),
        ({"columns": ["\\"]}, "columns.0"),
        ({"candidates": "held"}, "candidates"),
        ({"label_rows": 40}, "label_rows"),
        ({"student": {"layers": 1}}, "student"),
        ({"method": "alinfik", "label_rows": FEWEST - 1}, "label_rows"),
        ({"method": "alinfik", "label_seconds": 0}, "label_seconds"),
        ({"method": "alinfik", "rounds": 2, "label_seconds": 9}, "rounds"),
        ({"method": "alinfik", "rounds": 2, "ensemble": 1}, "ensemble"),
        ({"method": "alinfik", "student": {"encoder": "/etc"}}, "student.encoder"),
        ({"max_length": 10**6}, "max_length"),
        ({"budget": True}, "budget"),
        ({"redact": "yes"}, "redact"),
        ({"seeds": 1}, "seeds"),
    ],
)
def test_a_wrong_request_names_the_field(api: Api, more: dict[str, Any], field: str) -> None:
    body = {"model": "tiny", "candidates": "pool", "validation": "held", **more}
    slug = "path-not-allowed" if field == "student.encoder" else "invalid-request"
    problem(api.post("/valuation", json=body), 422, slug, field)


@pytest.mark.parametrize("field", ["model", "candidates", "validation", "index"])
def test_what_does_not_exist_is_named(api: Api, field: str) -> None:
    body = {"model": "tiny", "candidates": "pool", "validation": "held", field: "nowhere"}
    assert "'nowhere'" in problem(api.post("/valuation", json=body), 404, "not-found", field)["detail"]


def test_validation_rows_among_the_candidates_are_left_out_or_kept_on_request(api: Api) -> None:
    must(api.upload(jsonl([*pool()[:3], *held()[:2]]), "mixed"), 201)
    for overlap, left, said in (("drop", 3, "left out"), ("keep", 5, "too high")):
        accepted = submit(api, candidates="mixed", overlap=overlap)
        assert (accepted["candidates"], accepted["left_out"]) == (left, 5 - left)
        assert said in accepted["warnings"][0]
        assert api.wait(accepted["job"]["id"])["state"] == "succeeded"
        summary = must(api.get(f"/valuations/{accepted['job']['id']}"))["summary"]
        assert summary["rows"] == left
        assert any(said in warning for warning in summary["warnings"])


def test_a_pool_of_one_has_a_value_and_no_student(api: Api) -> None:
    must(api.upload(jsonl(pool()[:1]), "one"), 201)
    assert len(scores(api, valued(api, candidates="one", budget=7))) == 1
    body = {"model": "tiny", "candidates": "one", "validation": "held", "method": "alinfik"}
    assert "use linfik" in problem(api.post("/valuation", json=body), 422, "invalid-request", "candidates")["detail"]


def test_rows_of_different_kinds_are_remarked_on(api: Api) -> None:
    must(api.upload(jsonl([{"text": f"The mill stands north of hill {n}."} for n in range(3)]), "texts"), 201)
    accepted = submit(api, candidates="texts")
    assert "plain text" in accepted["warnings"][0]
    assert api.wait(accepted["job"]["id"])["state"] == "succeeded"


def test_a_budget_of_seconds_ends_the_labels_and_says_so(api: Api) -> None:
    accepted = submit(api, method="alinfik", label_seconds=1e-9, student={"layers": 1})
    assert api.wait(accepted["job"]["id"])["state"] == "succeeded"
    found = scores(api, accepted["job"]["id"])
    labelled = sum(one["labelled"] for one in found)
    assert FEWEST <= labelled < POOL == len(found)
    warnings = must(api.get(f"/valuations/{accepted['job']['id']}"))["summary"]["warnings"]
    assert any(f"was spent after {labelled} rows" in warning for warning in warnings)


def test_what_is_no_valuation_is_not_found(api: Api, linfik: str) -> None:
    for address in ("/valuations/job_nowhere", "/valuations/job_nowhere/scores"):
        problem(api.get(address), 404, "not-found", "valuation")
    problem(api.post("/valuation/select", json={"valuation": "job_nowhere", "k": 1}), 404, "not-found", "valuation")
    problem(api.get(f"/valuations/{linfik}/scores", params={"cursor": "x"}), 422, "bad-cursor", "cursor")


def test_a_repeated_request_is_done_once(api: Api) -> None:
    body = {"model": "tiny", "candidates": "pool", "validation": "held"}
    headers = {"Idempotency-Key": "value-the-pool"}
    first, again = (must(api.post("/valuation", json=body, headers=headers), 202) for _ in range(2))
    assert first["job"]["id"] == again["job"]["id"]
    api.wait(first["job"]["id"])

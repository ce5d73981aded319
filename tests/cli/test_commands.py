"""Commands against the service: what people see, what machines get, what goes wrong and with which exit code."""

import json
from pathlib import Path
from typing import Any

import pytest

from app.cli.base import FAILED, JOB_FAILED, REFUSED, UNREACHABLE
from tests.api.harness import Api, jsonl, rows
from tests.cli.conftest import Run

PROMPT, ANSWER = "What colour is the mill number 2?", "The mill number 2 is green."


def of(text: str) -> Any:
    """What a command printed for machines."""
    return json.loads(text)


def test_an_answer_is_shown_as_a_heat_map_with_the_rows_behind_it(run: Run) -> None:
    text = run("influence", "idx", "--prompt", PROMPT, "--generation", ANSWER, "--top-k", 3).output
    assert text.splitlines()[0].strip() == ANSWER
    assert "█" in text.splitlines()[1]
    assert "family=" in text
    assert "What colour is the" in text


def test_machines_get_the_whole_answer(run: Run) -> None:
    asked = ("influence", "idx", "--prompt", PROMPT, "--generation", ANSWER, "--json")
    found = of(run(*asked, "--direction", "both", "--span", "4:8", "--filter", '{"family": "mill"}').stdout)
    assert {hit["metadata"]["family"] for hit in found["proponents"] + found["opponents"]} == {"mill"}
    assert "".join(token["text"] for token in found["tokens"] if token["in_span"]) == "mill"


def test_any_other_field_can_be_set(run: Run) -> None:
    asked = ("influence", "idx", "--prompt", PROMPT, "--generation", ANSWER)
    assert of(run(*asked, "--json", "--set", "tokens=none").stdout)["proponents"][0]["token_scores"] is None
    assert "colour" in run(*asked, "--set", "colour=7", code=REFUSED).stderr


def test_a_line_of_a_log_is_explained(run: Run, tmp_path: Path) -> None:
    said = {"choices": [{"message": {"role": "assistant", "content": ANSWER}}]}
    line = json.dumps({"request": {"messages": [{"role": "user", "content": PROMPT}]}, "response": said})
    (tmp_path / "chat.jsonl").write_text(line, encoding="utf-8")
    assert run("influence", "idx", "--chat", "-", stdin=line).output.startswith(ANSWER)
    assert run("influence", "idx", "--chat", tmp_path / "chat.jsonl").output.startswith(ANSWER)


def test_from_a_file_to_an_index_and_back(run: Run, tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "facts.jsonl").write_bytes(jsonl(rows(6)))
    (tmp_path / "more.jsonl").write_bytes(jsonl(rows(2, start=30)))
    assert "modules are attributed" in run("models", "add", "cli", tiny_model_dir).output
    assert run("datasets", "add", "cli", "facts.jsonl").output == "cli: 6 rows\n"
    assert of(run("datasets", "add", "cli-more", "more.jsonl", "--json").stdout)["rows"] == 2
    built = run("index", "build", "cli", "--model", "cli", "--dataset", "cli", "--size", 4)
    assert built.stdout == "cli: 6 rows, ready\n"
    assert run("index", "add", "cli", "cli-more").stdout == "cli: 8 rows\n"
    assert "kronecker" in run("index", "show", "cli").output
    sample = of(run("datasets", "show", "cli", "--rows", 1, "--json").stdout)["samples"][0]["id"]
    assert run("index", "rm", "cli", sample).stdout == "removed 1; cli has 7 rows\n"
    assert "Delete the index cli" in run("index", "rm", "cli", code=1, stdin="n\n").output
    assert run("index", "rm", "cli", "--yes").stdout == "deleted cli\n"


@pytest.mark.parametrize("group", ["models", "datasets", "index", "jobs"])
def test_lists_are_for_people_and_for_machines(run: Run, group: str) -> None:
    known = {"models": "tiny", "datasets": "facts", "index": "idx", "jobs": "build_index"}[group]
    assert known in run(group, "ls").output
    assert known in {one.get("name", one.get("kind")) for one in of(run(group, "ls", "--json").stdout)}


@pytest.mark.parametrize(("group", "said"), [("models", "q_proj"), ("datasets", "family"), ("index", "manifest")])
def test_one_thing_is_shown_whole(run: Run, group: str, said: str) -> None:
    name = {"models": "tiny", "datasets": "facts", "index": "idx"}[group]
    assert name in run(group, "show", name).output
    assert said in run(group, "show", name, "--json").stdout


def test_an_unlearning_is_looked_at_first_and_then_done(run: Run, tmp_path: Path) -> None:
    forget = ("unlearn", "idx", "--filter", '{"family": "tower"}')
    assert "2 rows to forget" in run(*forget, "--dry-run").output
    job = run(*forget, "--method", "ga", "--no-wait").stdout.strip()
    run("jobs", "watch", job)
    run("jobs", "fetch", job, "--out", "made")
    assert (tmp_path / "made" / "adapter" / "adapter_config.json").is_file()


def test_rows_behind_an_answer_are_found_for_unlearning(run: Run) -> None:
    asked = ("unlearn", "idx", "--prompt", PROMPT, "--generation", ANSWER, "--top-k", 2, "--dry-run", "--json")
    assert {row["why"] for row in of(run(*asked).stdout)["forget"]["rows"]} == {"influence"}


def test_rows_are_valued(run: Run, tmp_path: Path) -> None:
    (tmp_path / "wanted.jsonl").write_bytes(jsonl(rows(2, start=50)))
    run("datasets", "add", "cli-wanted", "wanted.jsonl")
    text = run("value", "tiny", "facts", "cli-wanted", "--out", "values").output
    assert "the best" in text
    assert "12 rows" in text
    assert (tmp_path / "values" / "scores.csv").is_file()


def test_a_job_is_followed_as_lines_of_json(run: Run) -> None:
    job = run("index", "build", "lines", "--model", "tiny", "--dataset", "facts", "--no-wait").stdout.strip()
    lines = [of(line) for line in run("jobs", "watch", job, "--json").stdout.splitlines()]
    assert lines[-1]["state"] == "succeeded"
    assert "succeeded" in run("jobs", "cancel", job, code=REFUSED).stderr


# --- what goes wrong ---


def test_a_service_that_is_not_there_is_named_with_what_to_do(run: Run) -> None:
    said = run("models", "ls", "--url", "http://127.0.0.1:9", code=UNREACHABLE).stderr
    assert "error: GET /models" in said
    assert "headwater serve" in said
    assert len(said.strip().splitlines()) == 1


def test_a_refusal_is_one_line_with_its_request(run: Run) -> None:
    said = run("index", "show", "nobody", code=REFUSED).stderr
    assert "there is no index 'nobody' (request " in said
    assert len(said.strip().splitlines()) == 1


def test_a_job_that_failed_says_how_to_go_on(run: Run, service: Api, tmp_path: Path) -> None:
    (tmp_path / "long.jsonl").write_bytes(jsonl([{"prompt": "where? " * 50, "response": "north"}]))
    run("datasets", "add", "cli-long", "long.jsonl")
    said = run("index", "build", "bad", "--model", "tiny", "--dataset", "cli-long", "--max-length", 8, code=JOB_FAILED)
    assert "`headwater jobs retry job_" in said.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("influence", "idx"), "say what to explain"),
        (("influence", "idx", "--prompt", "x", "--span", "4"), "write START:END"),
        (("influence", "idx", "--prompt", "x", "--filter", "{"), "--filter is not JSON"),
        (("influence", "idx", "--prompt", "x", "--set", "y"), "write FIELD=VALUE"),
        (("influence", "idx", "--chat", "gone.json"), "--chat gone.json"),
        (("influence", "gone", "--local", "--prompt", "x"), "is no index of `headwater index build --local`"),
        (("influence", "gone", "--local", "--prompt", "x", "--filter", "{}"), "need a service"),
        (("models", "add", "m", "x", "--checkpoint", "late"), "write NAME=FOLDER"),
        (("models", "add", "m", "x", "--checkpoint", "late=x@heavy"), "'heavy' is no weight"),
        (("datasets", "add", "d", "gone.jsonl"), "there is no 'gone.jsonl' on this machine"),
        (("index", "build", "i", "--model", "m", "--dataset", "d", "--checkpoint", "a=b"), "goes with --local"),
        (("index", "build", "i", "--local", "--model", "gone", "--dataset", "gone.jsonl"), "gone.jsonl"),
        (("unlearn", "idx"), "say what to forget"),
        (("doctor", "--model", "x"), "an estimate needs both"),
    ],
)
def test_what_is_wrong_on_the_command_line_is_said_in_a_line(run: Run, arguments: tuple[str, ...], said: str) -> None:
    done = run(*arguments, code=FAILED)
    assert said in done.stderr
    assert not done.stdout


# --- without a service ---


def test_an_index_is_built_and_asked_in_this_process(
    run: Run, service: Api, tiny_model_dir: Path, tiny_adapter_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "facts.jsonl").write_bytes(jsonl([*rows(12), rows(1)[0]]))
    build = ("index", "build", "here", "--local", "--model", tiny_model_dir, "--dataset", "facts.jsonl", "--threads", 1)
    assert "12 rows" in run(*build).output
    asked = ("--prompt", PROMPT, "--generation", ANSWER, "--json")
    here = of(run("influence", "here", "--local", *asked).stdout)
    there = of(run("influence", "idx", *asked).stdout)
    assert [hit["id"] for hit in here["proponents"]] == [hit["id"] for hit in there["proponents"]]
    assert [hit["score"] for hit in here["proponents"]] == pytest.approx([hit["score"] for hit in there["proponents"]])
    assert here["proponents"][0]["metadata"] == there["proponents"][0]["metadata"]
    adapted = ("index", "build", "late", "--local", "--model", tiny_model_dir, "--dataset", "facts.jsonl")
    run(*adapted, "--checkpoint", f"late={tiny_adapter_dir}@0.5")
    text = run("influence", "late", "--local", "--prompt", PROMPT, "--max-new-tokens", 8).output
    assert "Rows for it" in text


def test_doctor_says_what_is_here(run: Run, service: Api) -> None:
    found = {one["what"]: one for one in of(run("doctor", "--json").stdout)["findings"]}
    assert {"python", "machine", "torch", "faiss", "cpu", "disk", "catalog", "queue", "service"} <= set(found)
    assert found["service"]["said"] == f"{str(service.base_url).rstrip('/')} is ready"


def test_doctor_fails_where_something_is_missing(run: Run) -> None:
    url = {"HEADWATER_DATABASE_URL": "postgresql://ann:hunter2@127.0.0.1:1/x"}
    done = run("doctor", code=1, **url)
    assert "bad" in done.output
    assert "hunter2" not in done.output


def test_doctor_estimates_a_build_and_says_how(run: Run, tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "facts.jsonl").write_bytes(jsonl(rows(12)))
    asked = ("doctor", "--model", tiny_model_dir, "--rows", "facts.jsonl")
    found = of(run(*asked, "--json", "--size", 8, "--threads", 1).stdout)["estimate"]
    assert (found["how"], found["rows"]) == ("measured", 12)
    assert found["seconds"] > 0
    modules = 14  # seven in each of two layers, and not the head
    assert found["index_bytes"] % (12 * 2) == 0
    assert found["index_bytes"] >= 12 * modules * 8 * 8 * 2
    computed = of(run(*asked, "--json", "--computed").stdout)["estimate"]
    assert computed["how"] == "computed"
    assert "seconds" not in computed
    weights = sum(path.stat().st_size for path in tiny_model_dir.glob("*.safetensors"))
    assert 0 < weights - computed["weights_bytes"] < 8192  # all but the header

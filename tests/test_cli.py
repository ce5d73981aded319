"""The command line teaches, and fails in sentences."""

import json
import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner

from app.cli import app
from app.cli.reference import TARGET, render
from app.settings import Settings

SERVING = ("serve", "worker", "migrate", "stack", "demo", "value-file", "keys", "settings", "openapi")
COMMANDS = (*SERVING, "influence", "index", "models", "datasets", "unlearn", "value", "jobs", "doctor")
PARTS = {
    "keys": ("create", "list", "revoke", "quota"),
    "index": ("build", "add", "rm", "ls", "show"),
    "models": ("ls", "add", "show"),
    "datasets": ("ls", "add", "show"),
    "jobs": ("ls", "watch", "cancel", "retry", "fetch"),
}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> CliRunner:
    monkeypatch.chdir(tmp_path)  # away from a .env file
    for name in Settings.model_fields:
        monkeypatch.delenv(f"HEADWATER_{name.upper()}", raising=False)
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"})


def test_help_names_every_command(run: CliRunner) -> None:
    text = run.invoke(app, ["--help"]).output
    assert all(command in text for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_has_an_example(run: CliRunner, command: str) -> None:
    assert f"headwater {command}" in run.invoke(app, [command, "--help"]).output


@pytest.mark.parametrize(("group", "command"), [(group, one) for group, all_ in PARTS.items() for one in all_])
def test_the_help_of_a_part_of_a_command_has_an_example(run: CliRunner, group: str, command: str) -> None:
    assert f"headwater {group} {command}" in run.invoke(app, [group, command, "--help"]).output


def test_every_command_is_listed_here() -> None:
    found = {str(one.name or (one.callback and one.callback.__name__)) for one in app.registered_commands}
    groups = {str(one.info.name): one for group in app.registered_groups if (one := group.typer_instance)}
    assert found | set(groups) == set(COMMANDS)
    assert {name: {one.name for one in group.registered_commands} for name, group in groups.items()} == {
        group: set(commands) for group, commands in PARTS.items()
    }


def test_settings_lists_every_setting(run: CliRunner) -> None:
    text = run.invoke(app, ["settings"]).output
    assert all(f"HEADWATER_{name.upper()}" in text for name in Settings.model_fields)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://ann:hunter2@localhost:6379", "redis://ann:***@localhost:6379"),
        ("redis://:hunter2@localhost", "redis://:***@localhost"),
        ("redis://ann:p@hunter2@localhost/1", "redis://ann:***@localhost/1"),
        ("redis://ann:p/hunter2@localhost/1", "redis://ann:***@localhost/1"),
        ("redis://localhost?password=hunter2&db=1", "redis://localhost?password=***&db=1"),
    ],
)
def test_settings_hides_passwords(run: CliRunner, monkeypatch: pytest.MonkeyPatch, url: str, shown: str) -> None:
    monkeypatch.setenv("HEADWATER_QUEUE_URL", url)
    monkeypatch.setenv("HEADWATER_DATABASE_URL", url.replace("redis", "postgresql+psycopg"))
    text = run.invoke(app, ["settings"]).output
    assert "hunter2" not in text
    assert shown in text
    assert shown.replace("redis", "postgresql+psycopg") in text
    assert "hunter2" not in repr(Settings())


def test_a_catalog_that_does_not_answer_is_named_without_its_password(
    run: CliRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADWATER_DATABASE_URL", "postgresql+psycopg://ann:hunter2@127.0.0.1:1/x")
    done = run.invoke(app, ["keys", "list"])
    assert done.exit_code == 1
    assert "hunter2" not in done.output
    assert "ann:***@127.0.0.1:1/x cannot be used" in done.output


def test_a_setting_that_is_wrong_is_named(run: CliRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADWATER_PORT", "many")
    done = run.invoke(app, ["serve"])
    assert done.exit_code == 1
    assert "HEADWATER_PORT" in done.output


@pytest.mark.parametrize("command", ["serve", "demo"])
def test_a_port_that_is_taken_is_said(run: CliRunner, command: str) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        done = run.invoke(app, [command, "--port", str(port)])
    assert done.exit_code == 1
    assert f"cannot listen on 127.0.0.1:{port}" in done.output


def test_openapi_prints_the_document(run: CliRunner) -> None:
    assert json.loads(run.invoke(app, ["openapi"]).output)["info"]["title"] == "Headwater"


def test_openapi_check_fails_on_drift(run: CliRunner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("app.openapi.TARGET", tmp_path / "openapi.json")
    assert run.invoke(app, ["openapi", "--check"]).exit_code == 1
    assert run.invoke(app, ["openapi", "--write"]).exit_code == 0
    assert run.invoke(app, ["openapi", "--check"]).exit_code == 0


def test_a_worker_without_a_shared_queue_says_what_to_set(run: CliRunner) -> None:
    result = run.invoke(app, ["worker"])
    assert result.exit_code == 1
    assert "HEADWATER_QUEUE_URL=redis://" in result.output


def test_a_service_in_which_nobody_works_is_refused(run: CliRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADWATER_EMBEDDED_WORKER", "false")
    result = run.invoke(app, ["settings"])
    assert result.exit_code == 1
    assert "HEADWATER_EMBEDDED_WORKER" in result.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere", "rows.jsonl"], "there is no student in 'nowhere'"),
        (["nowhere", "rows.jsonl", "--columns", "prompt"], "--columns is an object"),
        (["nowhere", "rows.jsonl", "--columns", '{"question": "q"}'], "--columns is an object"),
    ],
)
def test_a_file_that_cannot_be_valued_is_said(run: CliRunner, arguments: list[str], said: str) -> None:
    done = run.invoke(app, ["value-file", *arguments])
    assert done.exit_code == 1
    assert said in done.output


def test_the_page_about_the_commands_is_their_help() -> None:
    assert TARGET.read_text(encoding="utf-8") == render(), "it drifted: run `make openapi`"

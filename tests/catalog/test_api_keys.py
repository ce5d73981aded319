"""The laws of keys in the catalog, and the command that makes them."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from app.catalog.database import Database
from app.catalog.errors import NotFound
from app.catalog.tables import ApiKey
from app.catalog.types import Scope
from app.cli import app


async def test_a_key_is_found_by_its_whole_text_alone(database: Database) -> None:
    async with database.catalog() as catalog:
        key, text = await catalog.api_keys.create("a", [Scope.WRITE, Scope.READ], "nightly")
        _, other = await catalog.api_keys.create("a", [Scope.READ], "")
        await catalog.commit()
    async with database.catalog() as catalog:
        assert await catalog.api_keys.find(text) is not None
        assert await catalog.api_keys.find(text[:28] + other[28:]) is None
        assert await catalog.api_keys.find(text + "\n") is None
        assert key.scopes == ["read", "write"]
        assert text.startswith(f"hw_{key.id.removeprefix('key_')}_")


async def test_a_revoked_key_stays_revoked_and_listed(database: Database) -> None:
    async with database.catalog() as catalog:
        key, text = await catalog.api_keys.create("a", [Scope.READ], "")
        when = (await catalog.api_keys.revoke(key.id)).revoked_at
        assert (await catalog.api_keys.revoke(key.id)).revoked_at == when
        assert await catalog.api_keys.find(text) is None
        assert [one.id for one in await catalog.api_keys.all()] == [key.id]
        with pytest.raises(NotFound, match="keys list"):
            await catalog.api_keys.revoke("key_other")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> CliRunner:
    monkeypatch.chdir(tmp_path)
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "HEADWATER_DATA_DIR": str(tmp_path / "data")})


def keys_in(folder: Path) -> Sequence[ApiKey]:
    async def listed() -> Sequence[ApiKey]:
        database = Database(f"sqlite+aiosqlite:///{folder / 'headwater.db'}")
        async with database.catalog() as catalog:
            keys = await catalog.api_keys.all()
        await database.close()
        return keys

    return asyncio.run(listed())


def test_a_key_is_made_before_the_service_ever_ran_and_shown_once(run: CliRunner, tmp_path: Path) -> None:
    made = run.invoke(app, ["keys", "create", "team-a", "--scope", "write", "--note", "[nightly]"])
    assert made.exit_code == 0, made.output
    text = made.stdout.strip()
    key = keys_in(tmp_path / "data")[0]
    assert (key.tenant_name, key.scopes, key.note) == ("team-a", ["write"], "[nightly]")
    listed = run.invoke(app, ["keys", "list"]).output
    assert all(part in listed for part in (key.id, "team-a", "write", "[nightly]", "never", "in force"))
    assert text[-43:] not in listed + made.stderr


def test_a_key_may_read_and_query_unless_more_is_asked_for(run: CliRunner, tmp_path: Path) -> None:
    run.invoke(app, ["keys", "create", "team-a"])
    assert keys_in(tmp_path / "data")[0].scopes == ["read", "query"]


def test_a_key_is_revoked_by_its_id(run: CliRunner, tmp_path: Path) -> None:
    run.invoke(app, ["keys", "create", "team-a"])
    key = keys_in(tmp_path / "data")[0]
    assert run.invoke(app, ["keys", "revoke", key.id]).exit_code == 0
    assert "revoked" in run.invoke(app, ["keys", "list"]).output
    unknown = run.invoke(app, ["keys", "revoke", "key_none"])
    assert (unknown.exit_code, "headwater keys list" in unknown.output) == (1, True)


def test_a_catalog_that_is_away_or_a_bad_name_is_a_sentence(run: CliRunner) -> None:
    bad = run.invoke(app, ["keys", "create", "team a"])
    assert (bad.exit_code, "cannot be a tenant" in bad.output) == (1, True)
    away = run.invoke(app, ["keys", "list"], env={"HEADWATER_DATABASE_URL": "sqlite+aiosqlite:////no/such/folder.db"})
    assert (away.exit_code, "cannot be used" in away.output) == (1, True)


@pytest.mark.parametrize("command", ["create", "list", "quota", "revoke"])
def test_the_help_of_a_command_has_an_example(run: CliRunner, command: str) -> None:
    assert f"headwater keys {command}" in run.invoke(app, ["keys", command, "--help"]).output


def test_a_tenant_s_quota_is_set_listed_and_taken_back(run: CliRunner, tmp_path: Path) -> None:
    run.invoke(app, ["keys", "create", "team-a"])
    for given, listed in ((["--requests", "600", "--tokens", "9000"], "600 requests, 9,000 tokens"), ([], "as set")):
        assert run.invoke(app, ["keys", "quota", "team-a", *given]).exit_code == 0
        assert listed in run.invoke(app, ["keys", "list"]).output
    assert run.invoke(app, ["keys", "quota", "nobody"]).exit_code == 1

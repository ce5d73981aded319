"""API keys: nothing but health and the documents without one, and nothing beyond its scopes with one."""

import asyncio
import hashlib
import sqlite3
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from app.api.guard import OPEN, needed
from app.catalog import api_keys
from app.catalog.database import Database
from app.catalog.types import Scope
from app.main import create_app
from app.settings import Settings, is_loopback
from tests.api.conftest import Mint, bearer
from tests.api.harness import Api, jsonl, must, problem, rows
from tests.conftest import Backend

OPERATIONS = [(method.upper(), path) for path, methods in create_app().openapi()["paths"].items() for method in methods]


@pytest.mark.parametrize(("method", "path"), [one for one in OPERATIONS if one[1] not in OPEN])
def test_without_a_key_nothing_but_health_answers(asked_locked: Api, method: str, path: str) -> None:
    refused = asked_locked.request(
        method, path.format(model="m", dataset="d", index="i", job="j", path="p", valuation="v")
    )
    problem(refused, 401, "unauthorized")
    assert refused.headers["www-authenticate"] == "Bearer"


def test_what_does_not_exist_is_no_way_around(asked_locked: Api) -> None:
    elsewhere = (("GET", "/nowhere"), ("PUT", "/models"), ("GET", "/%2Fmodels"), ("POST", "/healthz/../models"))
    for method, path in elsewhere:
        problem(asked_locked.request(method, path), 401, "unauthorized")


@pytest.mark.parametrize("path", sorted(OPEN))
def test_health_and_the_documents_need_no_key(asked_locked: Api, path: str) -> None:
    assert asked_locked.get(path).status_code == 200


@pytest.mark.parametrize("headers", [bearer("{}"), {"Authorization": "bearer {}"}, {"X-API-Key": "{}"}])
def test_a_key_may_come_in_either_header(locked: Api, mint: Mint, headers: dict[str, str]) -> None:
    key = mint("a", Scope.READ)
    must(locked.get("/models", headers={name: value.format(key) for name, value in headers.items()}))


def test_a_key_that_is_wrong(locked: Api, mint: Mint) -> None:
    key = mint("a", Scope.READ)
    other = mint("b", Scope.READ)
    mixed = key[:-43] + other[-43:]
    for wrong in ("hw_", key[:-1], key + "x", key.swapcase(), mixed, "hw_" + "0" * 24 + key[-44:], "hw_\xe9"):
        refused = locked.get("/models", headers=[(b"Authorization", f"Bearer {wrong}".encode("latin-1"))])
        problem(refused, 401, "unauthorized", "Authorization")
        assert "invalid_token" in refused.headers["www-authenticate"]
    problem(locked.get("/models", headers={"Authorization": f"Basic {key}"}), 401, "unauthorized")


@pytest.mark.parametrize(
    ("scope", "may"),
    [
        (Scope.READ, {"read"}),
        (Scope.QUERY, {"query"}),
        (Scope.WRITE, {"read", "write"}),
        (Scope.ADMIN, {"read", "query", "write", "admin"}),
    ],
)
def test_a_key_may_do_what_its_scopes_say_and_no_more(locked: Api, mint: Mint, scope: Scope, may: set[str]) -> None:
    headers = bearer(mint("a", scope))
    asked = {
        "read": locked.get("/models", headers=headers),
        "query": locked.post("/influence", headers=headers, json={}),
        "write": locked.post("/models", headers=headers, json={}),
        "admin": locked.delete("/models/none", headers=headers),
    }
    for name, answer in asked.items():
        if name in may:
            assert answer.status_code in (200, 404, 422), name
        else:
            assert f"'{name}'" in problem(answer, 403, "missing-scope", "Authorization")["detail"]
            assert f'scope="{name}"' in answer.headers["www-authenticate"]


def test_the_document_says_which_scope_each_operation_needs() -> None:
    document = create_app().openapi()
    schemes = document["components"]["securitySchemes"]
    for method, path in OPERATIONS:
        operation = document["paths"][path][method.lower()]
        scope = needed(method, path)
        assert operation["security"] == ([] if scope is None else [{name: [scope]} for name in schemes])
        assert {"401", "403"} <= operation["responses"].keys() or scope is None


def test_a_revoked_key_is_refused_from_its_next_request_on(locked: Api, mint: Mint, backend: Backend) -> None:
    key = mint("a", Scope.READ)
    must(locked.get("/models", headers=bearer(key)))

    async def revoke() -> None:
        database = Database(backend.database_url)
        async with database.catalog() as open_catalog:
            await open_catalog.api_keys.revoke(f"key_{key.split('_')[1]}")
            await open_catalog.commit()
        await database.close()

    asyncio.run(revoke())
    problem(locked.get("/models", headers=bearer(key)), 401, "unauthorized")


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_only_a_hash_of_the_secret_is_kept(locked: Api, mint: Mint, tmp_path: Path) -> None:
    secret = mint("a", Scope.READ)[-43:]
    with sqlite3.connect(tmp_path / "headwater.db") as database:
        dump = "\n".join(database.iterdump())
    assert secret not in dump
    assert hashlib.sha256(secret.encode()).hexdigest() in dump


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_the_last_use_is_written_at_most_once_a_minute(
    locked: Api, mint: Mint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers = bearer(mint("a", Scope.READ))

    def use() -> str:
        must(locked.get("/models", headers=headers))
        must(locked.get("/models", headers=headers))  # the use is noted behind the answer: the next one is after it
        with sqlite3.connect(tmp_path / "headwater.db") as database:
            return str(database.execute("SELECT last_used_at FROM api_keys").fetchone()[0])

    first = use()
    assert first != "None"
    assert use() == first
    monkeypatch.setattr(api_keys, "NOTED_EVERY", timedelta(0))
    assert use() > first


def test_an_idempotency_key_of_one_is_nothing_to_another(locked: Api, mint: Mint) -> None:
    def send(key: str, name: str) -> Any:
        headers = bearer(key) | {"Idempotency-Key": "once"}
        return locked.post(
            "/datasets", data={"name": name}, files={"file": ("f.jsonl", jsonl(rows(2)))}, headers=headers
        )

    mine, yours = mint("a", Scope.WRITE), mint("b", Scope.WRITE)
    first = must(send(mine, "facts"), 201)
    problem(send(yours, "facts"), 409, "already-exists")
    assert must(send(yours, "others"), 201)["name"] == "others"
    assert must(send(mine, "facts"), 201) == first
    problem(send(mint("a", Scope.READ), "facts"), 403, "missing-scope")


async def test_a_stranger_s_body_is_not_read(tmp_path: Path) -> None:
    async def receive() -> Any:
        raise AssertionError("the body was read")

    async def send(message: Any) -> None:
        statuses.append(message.get("status"))

    statuses: list[Any] = []
    app = create_app(Settings(data_dir=tmp_path, auth="on", _env_file=None))
    scope = {"type": "http", "method": "POST", "path": "/datasets", "headers": [(b"idempotency-key", b"once")]}
    await app({**scope, "server": ("127.0.0.1", 8000)}, receive, send)
    assert statuses[0] == 401


def test_metrics_may_be_opened_by_a_setting(serve: Any) -> None:
    assert serve(auth="on").get("/metrics").status_code == 401
    assert serve(auth="on", metrics_open=True).get("/metrics").status_code == 200


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("localhost", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("", False),
        ("10.0.0.1", False),
        ("localhost.example.org", False),
    ],
)
def test_keys_are_needed_unless_only_this_machine_can_ask(host: str, loopback: bool) -> None:
    assert is_loopback(host) == loopback
    settings = Settings(host=host, _env_file=None)
    assert settings.needs_key("127.0.0.1") != loopback
    assert settings.needs_key("10.0.0.1"), "another program bound the socket"
    assert Settings(host=host, auth="on", _env_file=None).needs_key("127.0.0.1")
    assert not Settings(host=host, auth="off", _env_file=None).needs_key("10.0.0.1")

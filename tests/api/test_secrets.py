"""No key, password or text of an unexpected error leaves by the log or by an answer."""

import json
from typing import Any

import pytest

from app.catalog.models import Models
from app.catalog.types import Scope
from app.logs import masked
from tests.api.conftest import Mint, Serve, bearer
from tests.api.harness import problem


@pytest.mark.parametrize(
    "header", ["Authorization", "X-API-Key", "X-Request-ID", "Idempotency-Key", "Cookie", "Proxy-Authorization"]
)
def test_a_key_in_any_header_is_neither_logged_nor_sent_back(
    serve: Serve, mint: Mint, capfd: pytest.CaptureFixture[str], header: str
) -> None:
    key = mint("a", Scope.ADMIN)
    api = serve(auth="on", log_level="DEBUG", log_json=True)
    value = f"Bearer {key}" if "Authorization" in header else key
    for headers in ({header: value}, bearer(key) | {header: value}):
        for method, path in (("GET", "/models"), ("POST", "/models"), ("POST", "/influence"), ("GET", "/nowhere")):
            answer = api.request(method, path, headers=headers, json={} if method == "POST" else None)
            assert key[-43:] not in answer.text + str(answer.headers), (method, path)
    log = capfd.readouterr().err
    assert '"path": "/influence"' in log
    assert key[-43:] not in log


def test_a_secret_in_an_unexpected_error_is_not_sent_and_not_logged(
    serve: Serve, mint: Mint, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    key = mint("a", Scope.READ)

    async def broken(*_args: Any) -> None:
        raise RuntimeError(f"postgresql://ann:hunter2@db/x went away while {key} was asked for")

    api = serve(auth="on", log_level="DEBUG", log_json=True)
    monkeypatch.setattr(Models, "page", broken)
    refused = api.get("/models", headers=bearer(key))
    problem(refused, 500, "internal")
    log = capfd.readouterr().err
    assert "ann:***@db/x went away" in log
    for secret in ("hunter2", key[-43:]):
        assert secret not in log + refused.text


def test_what_is_masked_leaves_the_rest_of_a_line_as_it_was() -> None:
    line = json.dumps({"url": "http://host:80/a", "who": "ann@example.org", "path": "/models?token_scores=1&x=2"})
    assert masked(line) == line
    assert masked("redis://:a@b@host/0 x@y") == "redis://:***@host/0 x@y"

"""Quotas: a tenant's keys spend together, are told what is left, and are let in again when it is."""

import time
import uuid
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.api.callers import Caller
from app.api.metrics import Metrics
from app.api.quotas import Quotas, _standing, headers
from app.catalog.types import Scope
from app.problems import Refusal
from tests.api.conftest import Mint, bearer
from tests.api.harness import Api, must, problem

TURN_S = 55
ASK = {"index": "idx", "prompt": "What colour is the harbour?", "generation": "It is red."}


@pytest.fixture(autouse=True)
def away_from_the_turn_of_a_minute() -> None:
    """At the turn a part of what was spent is let go; tests that count to the last one begin behind it."""
    if time.time() % 60 > TURN_S:
        time.sleep(60 - TURN_S)


def test_the_keys_of_a_tenant_spend_together_and_another_tenant_is_left_alone(locked: Api, mint: Mint) -> None:
    first, second, other = mint("a", Scope.READ, quotas=(3, None)), mint("a", Scope.ADMIN), mint("b", Scope.READ)
    left = []
    for key in (first, second, first):
        answer = locked.get("/models", headers=bearer(key))
        must(answer)
        left.append(answer.headers["ratelimit"].partition("r=")[2].partition(";")[0])
        assert answer.headers["ratelimit-policy"] == '"requests";q=3;w=60'
    assert left == ["2", "1", "0"]
    refused = locked.get("/models", headers=bearer(second))
    problem(refused, 429, "quota-exceeded")
    assert 1 <= int(refused.headers["retry-after"]) <= 120
    assert refused.headers["ratelimit"].startswith('"requests";r=0;t=')
    answer = locked.get("/models", headers=bearer(other))
    must(answer)
    assert "ratelimit" not in answer.headers
    assert 'headwater_quota_refused_total{kind="requests"} 1.0' in locked.get("/metrics", headers=bearer(other)).text


def test_the_setting_holds_where_a_tenant_has_no_quota_of_its_own(serve: Any, mint: Mint) -> None:
    api = serve(auth="on", requests_per_minute=1)
    plain, favoured = mint("plain", Scope.READ), mint("favoured", Scope.READ, quotas=(50, None))
    for key, status in ((plain, 200), (plain, 429), (favoured, 200), (favoured, 200)):
        assert api.get("/models", headers=bearer(key)).status_code == status


def test_a_request_that_its_scope_forbids_is_counted_too(locked: Api, mint: Mint) -> None:
    headers = bearer(mint("a", Scope.READ, quotas=(1, None)))
    problem(locked.post("/models", headers=headers, json={}), 403, "missing-scope")
    problem(locked.get("/models", headers=headers), 429, "quota-exceeded")


@pytest.fixture
def metered(serve: Any, mint: Mint, tiny_model_dir: Path) -> tuple[Api, dict[str, str]]:
    """A service with an index, and a key whose tenant has 100 tokens a minute."""
    serve().ready(tiny_model_dir)
    return serve(auth="on"), bearer(mint("a", Scope.QUERY, quotas=(None, 100)))


def test_tokens_are_those_of_prompt_and_generation(metered: tuple[Api, dict[str, str]]) -> None:
    api, headers = metered
    answer = api.post("/influence", json=ASK, headers=headers)
    must(answer)
    spent = len(ASK["prompt"]) + len(ASK["generation"]) - 1  # the tiny model's tokens are bytes, but for `th`
    assert answer.headers["ratelimit"].startswith(f'"tokens";r={100 - spent};')
    must(api.post("/influence", json=ASK, headers=headers))
    problem(api.post("/influence", json=ASK, headers=headers), 429, "quota-exceeded")


def test_what_the_model_is_to_write_is_paid_in_advance(metered: tuple[Api, dict[str, str]]) -> None:
    api, headers = metered
    body = {"index": "idx", "prompt": "Where?", "max_new_tokens": 40}
    answer = api.post("/influence", json=body, headers=headers)
    must(answer)
    assert answer.headers["ratelimit"].startswith(f'"tokens";r={100 - 40 - len("Where?")};')


def test_more_than_a_minute_s_tokens_at_once_is_never_let_in(metered: tuple[Api, dict[str, str]]) -> None:
    api, headers = metered
    refused = api.post("/influence", json=ASK | {"generation": "a" * 101}, headers=headers)
    problem(refused, 422, "above-quota")
    assert "retry-after" not in refused.headers


def test_a_query_of_a_batch_that_is_above_the_quota_fails_alone(metered: tuple[Api, dict[str, str]]) -> None:
    api, headers = metered
    queries = [{"prompt": "Hi", "generation": "Ho"}, {"prompt": "Hi", "generation": "a" * 99}]
    items = must(api.post("/influence/batch", json={"index": "idx", "queries": queries}, headers=headers))["items"]
    assert items[0]["answer"] is not None
    assert items[1]["problem"]["type"].endswith("above-quota")


def caller(tenant: str, **quotas: int) -> Caller:
    return Caller(tenant, "key", frozenset(), quotas)  # type: ignore[arg-type]


async def test_processes_on_one_redis_count_together(redis_url: str) -> None:
    tenant = uuid.uuid4().hex
    here, there = Quotas(redis_url, Metrics()), Quotas(redis_url, Metrics())
    await here.take("tokens", caller(tenant, tokens=10), 6)
    asking = caller(tenant, tokens=10)
    with pytest.raises(Refusal) as refused:
        await there.take("tokens", asking, 6)
    assert refused.value.status == 429
    assert asking.standings["tokens"].remaining == 4
    await here.close()
    await there.close()


async def test_with_redis_away_requests_go_through_uncounted_and_a_metric_says_so() -> None:
    metrics = Metrics()
    quotas = Quotas("redis://127.0.0.1:1", metrics)
    asking = caller("a", requests=1)
    began = time.monotonic()
    for _ in range(3):
        await quotas.take("requests", asking)
    assert time.monotonic() - began < 10
    assert asking.standings == {}
    assert metrics.registry.get_sample_value("headwater_quota_unchecked_total") == 3
    await quotas.close()


@given(
    quota=st.integers(1, 1000),
    wanted=st.integers(1, 1000),
    earlier=st.integers(0, 1000),
    present=st.integers(0, 1000),
    turn=st.floats(0.01, 60),
)
def test_after_the_time_that_retry_after_names_there_is_room(
    quota: int, wanted: int, earlier: int, present: int, turn: float
) -> None:
    wanted, earlier, present = min(wanted, quota), min(earlier, quota), min(present, quota)
    wait = _standing("tokens", quota, wanted, (earlier, turn if earlier else 0.0, present, turn + 60)).reset_s
    assert 1 <= wait <= 121
    left = turn - wait
    weighted = earlier * left / 60 + present if left >= 0 else present * max(0.0, 60 + left) / 60
    assert weighted + wanted <= quota + 1e-6


def test_nothing_is_said_where_nothing_is_counted() -> None:
    assert list(headers({})) == []

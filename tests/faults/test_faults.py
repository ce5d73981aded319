"""What breaks in production breaks here: real servers, real processes, real signals. Nothing is lost.

The scenarios are short here; `make faults` runs them at length and prints what they reached (docs/reliability.md).
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.api.harness import must
from tests.faults import scenarios
from tests.faults.stack import Stack, running

ROWS = 800  # four shards
pytestmark = pytest.mark.timeout(600)  # whole builds, on a machine that has much else to do


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Iterator[Stack]:
    with running(tmp_path_factory.mktemp("faults"), tiny_model_dir) as stack:
        yield stack


@pytest.fixture(scope="module")
def unbroken(stack: Stack) -> dict[str, bytes]:
    return scenarios.reference(stack, "rows", ROWS)


def test_workers_killed_at_random_moments_lose_nothing(stack: Stack, unbroken: dict[str, bytes]) -> None:
    assert scenarios.workers_killed(stack, "rows", unbroken, ROWS, kills=20)["tasks taken again"] > 0


def test_jobs_outlive_the_api(stack: Stack, unbroken: dict[str, bytes]) -> None:
    scenarios.api_killed(stack, "rows", unbroken, ROWS)


def test_redis_may_go_and_come_back(stack: Stack, unbroken: dict[str, bytes]) -> None:
    figures = scenarios.redis_away(stack, "rows", unbroken, ROWS, times=1)
    assert figures["slowest submission, s"] < 15


def test_postgres_may_go_and_come_back(stack: Stack, unbroken: dict[str, bytes]) -> None:
    scenarios.postgres_away(stack, "rows", unbroken, ROWS, times=1)


def test_a_full_disk_keeps_what_is_finished(stack: Stack, unbroken: dict[str, bytes]) -> None:
    assert scenarios.disk_full(stack, "rows", unbroken, ROWS)["half-written files"] == 0


def test_shards_damaged_before_the_publication_are_computed_again(stack: Stack, unbroken: dict[str, bytes]) -> None:
    scenarios.shards_damaged(stack, "rows", unbroken, ROWS)


def test_an_index_built_twice_at_once_is_one(stack: Stack, unbroken: dict[str, bytes]) -> None:
    scenarios.built_twice_at_once(stack, "rows", unbroken, ROWS, times=1)


def test_two_workers_with_the_same_task_do_no_harm(stack: Stack, unbroken: dict[str, bytes]) -> None:
    scenarios.given_twice(stack, "rows", unbroken, ROWS, times=1)


def test_a_client_that_hangs_up_disturbs_nobody(stack: Stack, unbroken: dict[str, bytes]) -> None:
    scenarios.hung_up(stack, "rows-unbroken", times=30)


def test_clocks_may_disagree(stack: Stack, unbroken: dict[str, bytes]) -> None:
    assert scenarios.clocks_disagree(stack, "rows", unbroken, ROWS)["leases lost"] == 0


def test_a_cancel_reaches_every_worker_within_seconds(stack: Stack, unbroken: dict[str, bytes]) -> None:
    assert scenarios.cancelled(stack, "rows")["both workers free after, s"] < 15


def test_a_worker_that_is_terminated_hands_back_its_task(stack: Stack, unbroken: dict[str, bytes]) -> None:
    scenarios.terminated(stack, "rows", unbroken, ROWS)


def test_what_a_worker_publishes_is_seen_by_an_api_that_has_the_index_open(
    stack: Stack, unbroken: dict[str, bytes]
) -> None:
    new = {"prompt": "Who keeps the lighthouse?", "response": "The lighthouse is kept by Oda."}
    ask = {"index": "grown", "prompt": new["prompt"], "generation": new["response"], "top_k": 1}
    with stack.working(1):
        stack.succeeded(stack.build("grown", "rows"))
        before = must(stack.api.post("/influence", json=ask))["proponents"]
        stack.succeeded(must(stack.api.post("/indexes/grown/samples", json={"rows": [new]}), 202)["job"]["id"])
    after = must(stack.api.post("/influence", json=ask))["proponents"]
    assert before[0]["response"] != new["response"] == after[0]["response"]

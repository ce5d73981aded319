"""A Ray cluster of three nodes on this machine, which the tests of searching and of building share."""

import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.influence.sharded import AUTH, Cluster

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 180.0
NODES = 3


@pytest.fixture(scope="session")
def nodes() -> Iterator[Any]:
    """Three nodes, each with processes of its own, joined by a token."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(AUTH, "token")
        environment.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        environment.setenv("PYTHONPATH", str(ROOT))
        environment.setenv("RAY_USAGE_STATS_ENABLED", "0")
        environment.setenv("RAY_health_check_initial_delay_ms", "1000")
        environment.setenv("RAY_health_check_period_ms", "500")
        environment.setenv("RAY_health_check_failure_threshold", "3")
        import ray
        from ray.cluster_utils import Cluster as Nodes

        made = Nodes(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        for _ in range(NODES - 1):
            made.add_node(num_cpus=1)
        made.wait_for_nodes()
        yield made
        ray.shutdown()
        made.shutdown()


@pytest.fixture(scope="session")
def stranger(nodes: Any) -> "Iterator[subprocess.Popen[str]]":
    """Somebody who does not know the token and tries to join; Ray gives up after many seconds."""
    code = f"from app.influence.sharded import Cluster; Cluster({nodes.address!r}).connect()"
    environment = {**os.environ, "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


@pytest.fixture(scope="session")
def cluster(nodes: Any, stranger: Any) -> Cluster:
    joined = Cluster(nodes.address, patience_s=PATIENCE_S)
    joined.connect()
    return joined

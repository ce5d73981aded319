"""An index on a Ray cluster beside the same index in this process: building by number of actors, searching by shards.

    python benchmarks/sharded.py                   # a cluster of three nodes on this machine, two minutes

The index is built over a tiny model, in this process and by one, two, three builders; then once more, while one of them
is killed (SIGKILL) in the middle. Every file must be the same. Every answer is compared with the one in this process.
An actor, then a node is killed; the time until the next whole answer is what a caller waits.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# before ray is imported, which reads them then; the nodes inherit them
os.environ |= {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_failure_threshold": "3",
    "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH")))),
}

import ray  # noqa: E402
import torch  # noqa: E402
from ray.cluster_utils import Cluster as Nodes  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from worlds import tiny, tiny_model  # noqa: E402

from app.influence.builders import Crew, Share  # noqa: E402
from app.influence.building import build  # noqa: E402
from app.influence.index import IndexSpec, Searchable, open_index  # noqa: E402
from app.influence.models import LoadedModel, ModelSpec, load  # noqa: E402
from app.influence.sharded import Cluster, ShardedIndex  # noqa: E402

NODES = 3


def files(path: Path) -> dict[str, bytes]:
    """What an index consists of."""
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def building(cluster: Cluster, folder: Path, rows: int) -> list[dict[str, Any]]:
    """Rows a second of a build in this process, by builders, and by builders of whom one dies."""
    model, world = ModelSpec(folder / "model"), tiny(rows=rows)
    spec = IndexSpec(shard_rows=-(-rows // (4 * NODES)))
    here, began = folder / "here", time.perf_counter()
    loaded = load(model)
    warm = time.perf_counter()
    for _ in build(here, loaded, world.rows, spec):
        pass
    found = [{"builders": 0, "rows_per_second": rows / (time.perf_counter() - warm), "started_s": warm - began}]
    expected = files(here)
    for builders, killed in [(1, False), (2, False), (NODES, False), (NODES, True)]:
        began = time.perf_counter()
        crew = Crew(cluster, builders, Share(cpus=0.5))
        for place in crew.places:
            ray.get(place.builder.run.remote(model, warmed))
        warm = time.perf_counter()
        path = folder / f"built-{builders}-{killed}"
        with ThreadPoolExecutor(1) as other:
            done = other.submit(crew.build, path, model, world.rows, spec)
            if killed:
                while not list(path.glob("shards/*.json")):  # some shards are there, the next are being computed
                    time.sleep(0.01)
                os.kill(ray.get(crew.places[0].builder.process.remote()), signal.SIGKILL)
            done.result()
        took = time.perf_counter() - warm
        assert files(path) == expected, "what the builders made is not what this process makes"
        found.append(
            {"builders": builders, "rows_per_second": rows / took, "started_s": warm - began, "killed": killed}
        )
        crew.close()
    return found


def warmed(model: LoadedModel) -> int:
    """Work that only loads the model."""
    return len(model.attributed)


@contextmanager
def cluster_of(nodes: int) -> Iterator[Nodes]:
    """A cluster on this machine."""
    made = Nodes(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    for _ in range(nodes - 1):
        made.add_node(num_cpus=1)
    made.wait_for_nodes()
    try:
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


def latencies(index: Searchable, queries: torch.Tensor, repeats: int) -> list[float]:
    """Milliseconds of each search."""
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        index.top(queries, 10, "unit", True)
        found.append((time.perf_counter() - began) * 1000)
    return found


def until_answer(index: Searchable, queries: torch.Tensor, expected: Any, kill: Callable[[], None]) -> float:
    """Seconds from a kill to the next answer, which must be the right one."""
    kill()
    began = time.perf_counter()
    assert index.top(queries, 10, "unit", True) == expected
    return time.perf_counter() - began


def kill_actor(index: ShardedIndex) -> None:
    """SIGKILL the process that holds the first shard."""
    os.kill(ray.get(index.holders[0].process.remote()), signal.SIGKILL)


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Every figure."""
    tiny_model(tiny(rows=arguments.rows), folder / "model").save_pretrained(folder / "model")
    torch.set_num_threads(1)
    with cluster_of(NODES) as nodes:
        cluster = Cluster(nodes.address)
        cluster.connect()
        found: dict[str, Any] = {"nodes": NODES, "rows": arguments.rows, "shards": []}
        found["built_rows"] = arguments.built_rows
        found["building"] = building(cluster, folder, arguments.built_rows)
        crew = Crew(cluster, 1, Share(cpus=0.5))  # a whole core is left to no builder by the actors of the searches
        for shards in arguments.shards:
            path = folder / f"index-{shards}"
            spec = IndexSpec(shard_rows=-(-arguments.rows // shards))
            crew.build(path, ModelSpec(folder / "model"), tiny(rows=arguments.rows).rows, spec)
            local, began = open_index(path), time.perf_counter()
            sharded = cluster.open(path)
            opened = time.perf_counter() - began
            width = local.manifest.width * len(local.manifest.checkpoints)
            for queries in (1, 8):
                asked = torch.randn(queries, width)
                for normalize in ("none", "unit"):
                    for largest in (True, False):
                        same = sharded.top(asked, 10, normalize, largest) == local.top(asked, 10, normalize, largest)
                        assert same, "a cluster's answer is not that of the index in this process"
                here = latencies(local, asked, arguments.repeats)
                there = latencies(sharded, asked, arguments.repeats)
                found["shards"].append(
                    {
                        "shards": len(local.shards),
                        "queries": queries,
                        "open_s": opened,
                        "local_p50_ms": statistics.median(here),
                        "ray_p50_ms": statistics.median(there),
                        "ray_p95_ms": statistics.quantiles(there, n=20)[-1],
                        "overhead_ms": statistics.median(there) - statistics.median(here),
                    }
                )
        expected = local.top(asked, 10, "unit", True)
        found["actor_killed_s"] = until_answer(sharded, asked, expected, lambda: kill_actor(sharded))
        leaving = nodes.list_all_nodes()[-1]
        found["node_killed_s"] = until_answer(
            sharded, asked, expected, lambda: nodes.remove_node(leaving, allow_graceful=False)
        )
        found["nodes_left"] = len([node for node in ray.nodes() if node["Alive"]])
    return found


def built_table(found: dict[str, Any]) -> Table:
    """Building, a line a way."""
    table = Table(title=f"building an index of {found['built_rows']} rows; the same bytes each time")
    for column in ("built by", "ready in", "rows/s"):
        table.add_column(column, justify="right")
    for one in found["building"]:
        who = f"{one['builders']} builders" if one["builders"] else "this process"
        died = ", one killed" if one.get("killed") else ""
        table.add_row(who + died, f"{one['started_s']:.1f} s", f"{one['rows_per_second']:.0f}")
    return table


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=120, help="of an index that is searched")
    parser.add_argument("--built-rows", type=int, default=1200, help="of an index whose building is timed")
    parser.add_argument("--shards", type=int, nargs="+", default=[1, 3, 6])
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(arguments, Path(folder))
    table = Table(
        title=f"{found['nodes']} nodes, {found['rows']} rows, a tiny model; every answer equal to the last bit"
    )
    for column in ("shards", "queries", "opened in", "in process p50", "Ray p50", "Ray p95", "overhead"):
        table.add_column(column, justify="right")
    for one in found["shards"]:
        times = [one[name] for name in ("local_p50_ms", "ray_p50_ms", "ray_p95_ms", "overhead_ms")]
        cells = [f"{value:.1f} ms" for value in times]
        table.add_row(str(one["shards"]), str(one["queries"]), f"{one['open_s']:.1f} s", *cells)
    console = Console()
    console.print(built_table(found))
    console.print(table)
    console.print(f"an actor killed: the whole answer after {found['actor_killed_s']:.1f} s")
    console.print(f"a node killed, {found['nodes_left']} left: the whole answer after {found['node_killed_s']:.1f} s")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())

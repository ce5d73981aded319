"""An index on a Ray cluster answers as the one in this process, to the last bit, whatever dies meanwhile."""

import os
import shutil
import signal
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from app.influence.building import build
from app.influence.corpus import Message, parse_row
from app.influence.ekfac import EkfacSpec, fit
from app.influence.errors import IndexCorrupt, ShardsMissing, SpecError
from app.influence.index import FEW, Index, IndexSpec, delete, open_index
from app.influence.models import Checkpoint, LoadedModel, ModelSpec, load
from app.influence.projection import ProjectionSpec
from app.influence.retrieval import Options, Query, influence
from app.influence.sharded import AUTH, Cluster, ShardedIndex
from tests.api.conftest import quick
from tests.api.harness import jsonl, must, rows, serving, until
from tests.influence.conftest import NODES, PATIENCE_S

SPEC = IndexSpec(ProjectionSpec(size=8), shard_rows=10, token_budget=400)
ROWS = [parse_row({"prompt": f"Question {i}?", "response": "word " * (i % 4 + 1) + str(i)}) for i in range(30)]


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path, tiny_adapter_dir: Path) -> LoadedModel:
    checkpoints = (Checkpoint("early", tiny_adapter_dir, weight=0.5), Checkpoint("late", tiny_adapter_dir))
    return load(ModelSpec(tiny_model_dir, checkpoints=checkpoints))


@pytest.fixture(scope="module")
def path(model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards, some of whose rows are deleted, all of the second's."""
    path = tmp_path_factory.mktemp("sharded") / "index"
    list(build(path, model, ROWS, SPEC))
    shards = open_index(path).shards
    delete(path, [shards[0].ids[1], shards[2].ids[5], *shards[1].ids])
    return path


@pytest.fixture(scope="module")
def local(path: Path) -> Index:
    return open_index(path)


@pytest.fixture(scope="module")
def sharded(path: Path, cluster: Cluster) -> ShardedIndex:
    return cluster.open(path)


def vectors(index: Index, queries: int = 1) -> torch.Tensor:
    torch.manual_seed(queries)
    return torch.randn(queries, index.manifest.width * len(index.manifest.checkpoints))


@pytest.mark.parametrize("queries", [1, FEW - 1, FEW, 9])
@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("normalize", ["none", "unit", "scaled"])
def test_results_are_those_of_the_index_in_this_process_to_the_last_bit(
    local: Index, sharded: ShardedIndex, normalize: Any, largest: bool, queries: int
) -> None:
    asked = vectors(local, queries)
    for among in (None, local.ids[3:9], []):
        for k in (1, 7, 100):
            assert sharded.top(asked, k, normalize, largest, among) == local.top(asked, k, normalize, largest, among)
        ids = [local.ids[number : number + 2 * number] for number in range(queries)]
        assert sharded.below(asked, ids, among or None) == local.below(asked, ids, among or None)


@pytest.mark.parametrize(("precondition", "normalize"), [("none", "none"), ("fisher", "none"), ("trackstar", "unit")])
def test_answers_are_those_of_the_index_in_this_process(
    local: Index, sharded: ShardedIndex, model: LoadedModel, precondition: Any, normalize: Any
) -> None:
    query = Query((Message("user", "Question 3?"),), "word 3")
    options = Options(5, "query", "both", normalize, precondition)
    here, there = (
        influence(model, index, [query], options, lambda _: pytest.fail("no text is needed"))[0]
        for index in (local, sharded)
    )
    assert there.proponents == here.proponents and there.opponents == here.opponents
    assert there.definition == here.definition


def test_eight_bit_codes_are_searched_and_handed_out_alike(
    model: LoadedModel, cluster: Cluster, tmp_path: Path
) -> None:
    records = [{"prompt": f"Question {i}?", "response": "word " * (i % 4 + 1) + str(i)} for i in range(15)]
    list(build(tmp_path / "i", model, [parse_row(record) for record in records], replace(SPEC, codes="int8")))
    here, there = open_index(tmp_path / "i"), cluster.open(tmp_path / "i")
    for queries in (1, FEW):
        asked = vectors(here, queries)
        assert there.top(asked, 7, "none", True) == here.top(asked, 7, "none", True)
        assert there.top(asked, 7, "unit", False) == here.top(asked, 7, "unit", False)
    assert torch.equal(there.vectors(here.ids[::-1])[0], here.vectors(here.ids[::-1])[0])


def test_reranking_recalls_on_the_cluster_and_ranks_here(
    path: Path, model: LoadedModel, local: Index, sharded: ShardedIndex
) -> None:
    by_id = {row.id: row for row in ROWS}
    list(fit(path, model, [by_id[row] for row in local.ids], EkfacSpec(draws=1)))
    query = Query((Message("user", "Question 3?"),), "word 3")
    options = Options(top_k=4, tokens="none", rerank="ekfac", candidates=8)
    here, there = (influence(model, one, [query], options, by_id.__getitem__)[0] for one in (local, sharded))
    assert here.proponents == there.proponents != []
    assert here.definition == there.definition


def test_stored_vectors_are_the_same_in_the_order_that_is_asked_for(local: Index, sharded: ShardedIndex) -> None:
    assert sharded.ids == local.ids and sharded.rows == 18
    ids = [local.ids[i] for i in (16, 0, 7, 17, 3, 0)]
    for ours, theirs in zip(sharded.vectors(ids), local.vectors(ids), strict=True):
        assert torch.equal(ours, theirs)


def test_equal_scores_are_ranked_alike(local: Index, sharded: ShardedIndex) -> None:
    nothing = torch.zeros_like(vectors(local, FEW))
    for normalize in ("none", "unit"):
        assert sharded.top(nothing, 9, normalize, True) == local.top(nothing, 9, normalize, True)
        assert sharded.top(nothing[:1], 9, normalize, False) == local.top(nothing[:1], 9, normalize, False)


def test_an_actor_that_is_killed_answers_again_and_no_query_is_lost(local: Index, sharded: ShardedIndex) -> None:
    import ray

    asked = vectors(local, 2)
    expected = local.top(asked, 5, "unit", True)
    answers, stop = [], threading.Event()

    def keep_asking() -> None:
        while not stop.is_set():
            answers.append(sharded.top(asked, 5, "unit", True))

    asking = threading.Thread(target=keep_asking)
    asking.start()
    for holder in sharded.holders[:2]:
        process = ray.get(holder.process.remote())
        os.kill(process, signal.SIGKILL)
        began = time.monotonic()
        assert ray.get(holder.process.remote()) != process
        assert time.monotonic() - began < PATIENCE_S
    many = len(answers)
    while len(answers) < many + 3:
        assert asking.is_alive()
        time.sleep(0.01)
    stop.set()
    asking.join()
    assert all(answer == expected for answer in answers)


def test_a_node_that_leaves_is_replaced(nodes: Any, local: Index, sharded: ShardedIndex) -> None:
    import ray

    asked = vectors(local, FEW)
    expected = local.top(asked, 5, "none", True)
    assert sharded.top(asked, 5, "none", True) == expected
    leaving = nodes.list_all_nodes()[-1]
    nodes.remove_node(leaving, allow_graceful=False)
    try:
        assert sharded.top(asked, 5, "none", True) == expected
        until(lambda: len([one for one in ray.nodes() if one["Alive"]]), lambda alive: alive == NODES - 1)
    finally:
        nodes.add_node(num_cpus=1)


def test_shards_that_no_node_can_hold_are_named(nodes: Any, path: Path) -> None:
    nowhere = Cluster(nodes.address, gpus=1.0, patience_s=1.0)
    with pytest.raises(ShardsMissing, match="shard 000000, 000001, 000002"):
        nowhere.open(path)


def test_a_damaged_shard_is_named_across_processes(cluster: Cluster, path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(path, copy)
    shard = copy / "shards" / open_index(copy).manifest.shards[1]["files"][0][0]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(IndexCorrupt) as caught:
        cluster.open(copy)
    assert caught.value.shard == "000001"


def test_a_cluster_without_tokens_is_not_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(AUTH, "disabled")
    with pytest.raises(SpecError, match="must be token"):
        Cluster().connect()


def test_a_wrong_token_is_refused(stranger: "subprocess.Popen[str]") -> None:
    _, said = stranger.communicate(timeout=100)
    assert stranger.returncode != 0
    assert "uthenticat" in said


def test_the_service_answers_the_same_from_a_cluster(cluster: Cluster, tmp_path: Path, tiny_model_dir: Path) -> None:
    ask = {"index": "idx", "prompt": "What colour?", "generation": "It is red.", "top_k": 4, "tokens": "both"}
    with serving(quick(tmp_path, tiny_model_dir.parent)) as api:
        api.ready(tiny_model_dir)
        expected = must(api.post("/influence", json=ask))
    with serving(quick(tmp_path, tiny_model_dir.parent, search_backend="ray", ray_address=cluster.address)) as api:
        answer = must(api.post("/influence", json=ask))
        must(api.upload(jsonl(rows(4, start=40)), name="more"), 201)
        job = must(api.post("/indexes/idx/samples", json={"dataset": "more"}), 202)["job"]
        assert api.wait(job["id"])["result"]["rows"] == 16
        must(api.post("/influence", json=ask))
    assert answer["proponents"] == expected["proponents"]

"""An index that builders on a Ray cluster compute is the one of a build in this process, whatever dies meanwhile."""

import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from app.influence.builders import LIVES, Crew, Share
from app.influence.building import Progress, build, compute_shard, plan_build
from app.influence.corpus import Row, parse_row
from app.influence.errors import BuildersMissing, Mismatch, SpecError
from app.influence.index import IndexSpec, open_index
from app.influence.models import Checkpoint, LoadedModel, ModelSpec, load
from app.influence.projection import ProjectionSpec
from app.influence.sharded import Cluster
from tests.api.conftest import quick
from tests.api.harness import jsonl, must, rows, serving
from tests.influence.conftest import PATIENCE_S

SPEC = IndexSpec(ProjectionSpec(size=8), shard_rows=6, token_budget=200)
SHARE = Share(cpus=0.2)  # the nodes of the tests have a core each, and hold other actors


@pytest.fixture(scope="module")
def crew(cluster: Cluster) -> Iterator[Crew]:
    made = Crew(Cluster(cluster.address, patience_s=PATIENCE_S, threads=1), 2, SHARE)
    yield made
    made.close()


@pytest.fixture(scope="module")
def spec(tiny_model_dir: Path, tiny_adapter_dir: Path) -> ModelSpec:
    """Placed by a map, as a model is that needs several devices."""
    checkpoints = (Checkpoint("early", tiny_adapter_dir, weight=0.5), Checkpoint("late", tiny_adapter_dir))
    return ModelSpec(tiny_model_dir, checkpoints=checkpoints, device_map=(("", "cpu"),))


@pytest.fixture(scope="module")
def corpus() -> list[Row]:
    records = [{"prompt": f"Question {i}?", "response": "word " * (i % 4 + 1) + str(i)} for i in range(20)]
    return [parse_row(record) for record in records]


@pytest.fixture(scope="module")
def expected(spec: ModelSpec, corpus: list[Row], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    path = tmp_path_factory.mktemp("expected") / "index"
    list(build(path, load(spec), corpus, SPEC, corpus[:2]))
    return files(path)


def files(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_the_bytes_are_those_of_a_build_in_this_process(
    crew: Crew, spec: ModelSpec, corpus: list[Row], expected: dict[str, bytes], tmp_path: Path
) -> None:
    crew.build(tmp_path / "index", spec, corpus, SPEC, corpus[:2])
    assert files(tmp_path / "index") == expected


def test_a_builder_that_is_killed_gives_its_shard_to_another(
    crew: Crew, spec: ModelSpec, corpus: list[Row], expected: dict[str, bytes], tmp_path: Path
) -> None:
    import ray

    path = tmp_path / "index"
    crew.run(spec, partial(plan_build, path, ids=[row.id for row in corpus], spec=SPEC))
    processes = {ray.get(place.builder.process.remote()) for place in crew.places}
    steps = crew.walk(spec, partial(compute_shard, path, rows=corpus[:6], spec=SPEC, number=0))
    first = next(steps)
    assert 0 < first.rows < first.total_rows  # in the middle of the shard
    idle = crew._free.get()
    crew._free.put(idle)
    (busy,) = (place for place in crew.places if place is not idle)
    os.kill(ray.get(busy.builder.process.remote()), signal.SIGKILL)
    rest = list(steps)
    assert rest[-1].rows == 6
    assert {ray.get(place.builder.process.remote()) for place in crew.places} != processes
    crew.build(path, spec, corpus, SPEC, corpus[:2])
    assert files(path) == expected


def dies(model: LoadedModel) -> Iterator[Progress]:
    os.kill(os.getpid(), signal.SIGKILL)
    yield Progress("never", 0, 0, 0, 0)


def test_work_that_kills_every_builder_is_given_up(crew: Crew, spec: ModelSpec) -> None:
    with pytest.raises(BuildersMissing, match=f"{LIVES} builders died"):
        list(crew.walk(spec, dies))
    assert crew.run(spec, len_of_checkpoints) == 2  # others took their places


def len_of_checkpoints(model: LoadedModel) -> int:
    return len(model.checkpoints)


def refuses(model: LoadedModel) -> None:
    raise Mismatch("another model", differs={"base": ("a", "b")})


def test_an_error_is_raised_as_it_was_there(crew: Crew, spec: ModelSpec) -> None:
    with pytest.raises(Mismatch) as caught:
        crew.run(spec, refuses)
    assert caught.value.differs == {"base": ("a", "b")} and caught.value.field == "model"
    with pytest.raises(SpecError, match="at least one row"):
        crew.run(spec, partial(plan_build, Path("nowhere"), ids=[], spec=SPEC))


def test_gpus_that_no_node_has_are_named(cluster: Cluster, spec: ModelSpec) -> None:
    greedy = Crew(Cluster(cluster.address, patience_s=1, threads=1), 1, Share(gpus=4, cpus=0.1))
    with pytest.raises(BuildersMissing, match=r"has 0\.1 CPU and 4 GPU to spare within 1 s"):
        greedy.run(spec, len_of_checkpoints)
    greedy.close()


def test_the_service_builds_appends_and_repairs_on_a_cluster(
    cluster: Cluster, tmp_path: Path, tiny_model_dir: Path
) -> None:
    ray = {"build_backend": "ray", "ray_address": cluster.address, "ray_builders": 2, "ray_cpus_per_builder": 0.2}
    built = {}
    for name, settings in (("here", {}), ("there", ray)):
        folder = tmp_path / name
        folder.mkdir()
        with serving(quick(folder, tiny_model_dir.parent, **settings)) as api:
            api.ready(tiny_model_dir)
            index = must(api.get("/indexes/idx"))["id"]
            must(api.upload(jsonl(rows(4, start=40)), name="more"), 201)
            job = must(api.post("/indexes/idx/samples", json={"dataset": "more"}), 202)["job"]
            ended = api.wait(job["id"])
            assert ended["result"]["rows"] == 16 and ended["progress"]["done"] == ended["progress"]["total"] == 4
            path = folder / "indexes" / index
            built[name] = files(path)
            shard = path / "shards" / open_index(path).manifest.shards[0]["files"][0][0]
            shard.write_bytes(b"\0" * shard.stat().st_size)
            job = must(api.post("/indexes/idx/repair"), 202)["job"]
            assert api.wait(job["id"])["state"] == "succeeded"
            assert files(path) == built[name]
    assert built["there"] == built["here"]

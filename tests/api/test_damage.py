"""Files that are not what was written: named, refused, repaired; and what a deletion or a full disk leaves behind."""

import errno
import gc
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app.catalog.datasets import Datasets
from app.influence import building
from tests.api.harness import Api, jsonl, must, problem, rows

ROWS = 260  # two shards of at most 256
NEW = {"prompt": "Who keeps the lighthouse?", "response": "The lighthouse is kept by Oda."}
ASK = {"index": "idx", "prompt": NEW["prompt"], "generation": NEW["response"], "top_k": 50, "tokens": "none"}
Damage = Callable[[Path], None]


def folder_of(api: Api, tmp_path: Path) -> Path:
    return tmp_path / "indexes" / must(api.get("/indexes/idx"))["id"]


def grown(api: Api, model_dir: Path) -> None:
    """An index to which a row was added and from which two were removed."""
    api.register(model_dir)
    must(api.upload(jsonl(rows(ROWS))), 201)
    assert api.wait(api.build()["job"]["id"])["state"] == "succeeded"
    accepted = must(api.post("/indexes/idx/samples", json={"rows": [NEW]}), 202)
    assert api.wait(accepted["job"]["id"])["state"] == "succeeded"
    samples = must(api.get("/datasets/facts/samples"))["items"]
    ids = [samples[0]["id"], samples[7]["id"]]
    assert must(api.request("DELETE", "/indexes/idx/samples", json={"ids": ids})) == {"removed": 2, "rows": ROWS - 1}


def found(api: Api) -> list[tuple[str, float]]:
    return [(hit["id"], hit["score"]) for hit in must(api.post("/influence", json=ASK))["proponents"]]


def cut(folder: Path) -> None:
    file = folder / "shards" / "000000.faiss"
    os.truncate(file, file.stat().st_size // 2)


def flip(folder: Path, name: str = "000001.faiss") -> None:
    with (folder / "shards" / name).open("r+b") as file:
        file.seek(-3, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-3, os.SEEK_END)
        file.write(bytes([byte ^ 1]))


def flip_sidecar(folder: Path) -> None:
    flip(folder, "000002.safetensors")


def lose_sidecar(folder: Path) -> None:
    (folder / "shards" / "000000.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "shard"), [(cut, "000000"), (flip, "000001"), (flip_sidecar, "000002"), (lose_sidecar, "000000")]
)
def test_a_damaged_shard_is_named_and_refused_and_can_be_repaired(
    api: Api, tiny_model_dir: Path, tmp_path: Path, damage: Damage, shard: str
) -> None:
    grown(api, tiny_model_dir)
    before = found(api)
    damage(folder_of(api, tmp_path))
    for _ in range(2):  # found damaged, and known to be
        refused = problem(api.post("/influence", json=ASK), 409, "index-corrupt", "index")
        assert shard in refused["detail"]
    index = must(api.get("/indexes/idx"))
    assert index["state"] == "corrupt"
    assert shard in index["damage"]
    problem(api.post("/indexes/idx/samples", json={"rows": [NEW]}), 409, "index-corrupt", "index")

    accepted = api.post("/indexes/idx/repair")
    job = must(accepted, 202)
    assert (job["index"]["state"], job["job"]["kind"]) == ("repairing", "repair_index")
    assert accepted.headers["location"] == f"/jobs/{job['job']['id']}"
    ended = api.wait(job["job"]["id"])
    assert (ended["state"], ended["result"]["rows"]) == ("succeeded", ROWS - 1)
    index = must(api.get("/indexes/idx"))
    assert (index["state"], index["damage"], index["rows"]) == ("ready", None, ROWS - 1)
    after = found(api)
    assert [row for row, _ in after] == [row for row, _ in before]
    assert [score for _, score in after] == pytest.approx([score for _, score in before], abs=1e-3)
    assert not list(folder_of(api, tmp_path).rglob("*.corrupt"))


def test_damage_is_found_after_a_restart(serve: Any, tiny_model_dir: Path, tmp_path: Path) -> None:
    api = serve()
    api.ready(tiny_model_dir)
    flip(folder_of(api, tmp_path), "000000.faiss")
    api = serve()
    problem(api.post("/influence", json=ASK), 409, "index-corrupt", "index")
    api = serve()
    assert must(api.get("/indexes/idx"))["state"] == "corrupt"
    problem(api.post("/influence", json=ASK), 409, "index-corrupt", "index")


@pytest.mark.parametrize("content", [b"{", None])
def test_a_lost_manifest_is_restored_from_the_catalog(
    serve: Any, tiny_model_dir: Path, tmp_path: Path, content: bytes | None
) -> None:
    api = serve()
    api.ready(tiny_model_dir)
    manifest = folder_of(api, tmp_path) / "manifest.json"
    kept = manifest.read_bytes()
    manifest.unlink()
    if content is not None:
        manifest.write_bytes(content)
    api = serve()
    assert must(api.get("/indexes/idx"))["state"] == "corrupt", "it is noticed at the start"
    problem(api.post("/influence", json=ASK), 409, "index-corrupt", "index")
    assert api.wait(must(api.post("/indexes/idx/repair"), 202)["job"]["id"])["state"] == "succeeded"
    assert manifest.read_bytes() == kept
    must(api.post("/influence", json=ASK))


def test_adding_or_removing_rows_notices_damage_as_well(serve: Any, tiny_model_dir: Path, tmp_path: Path) -> None:
    api = serve()
    api.ready(tiny_model_dir)
    api = serve()
    cut(folder_of(api, tmp_path))
    job = api.wait(must(api.post("/indexes/idx/samples", json={"rows": [NEW]}), 202)["job"]["id"])
    assert (job["state"], job["error"]["code"]) == ("failed", "IndexCorrupt")
    assert must(api.get("/indexes/idx"))["state"] == "corrupt"
    api.wait(must(api.post("/indexes/idx/repair"), 202)["job"]["id"])
    must(api.post(f"/jobs/{job['id']}/retry"), 202)
    assert api.wait(job["id"])["result"]["rows"] == 13

    cut(folder_of(api, tmp_path))
    refused = api.request("DELETE", "/indexes/idx/samples", json={"ids": ["0" * 16]})
    problem(refused, 409, "index-corrupt", "index")
    assert must(api.get("/indexes/idx"))["state"] == "corrupt"


def test_repairing_what_is_whole_changes_nothing(api: Api, tiny_model_dir: Path, tmp_path: Path) -> None:
    problem(api.post("/indexes/nowhere/repair"), 404, "not-found", "index")
    api.ready(tiny_model_dir)
    folder = folder_of(api, tmp_path)
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert api.wait(must(api.post("/indexes/idx/repair"), 202)["job"]["id"])["state"] == "succeeded"
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before
    assert must(api.get("/indexes/idx"))["state"] == "ready"


def test_an_index_that_was_never_built_is_not_repaired(api: Api, tiny_model_dir: Path) -> None:
    api.register(tiny_model_dir)
    must(api.upload(jsonl(rows(1500))), 201)
    job = api.build()["job"]
    problem(api.post("/indexes/idx/repair"), 409, "conflict", "index")
    must(api.post(f"/jobs/{job['id']}/cancel"), 202)
    api.wait(job["id"])
    problem(api.post("/indexes/idx/repair"), 409, "conflict", "index")


def test_an_index_that_is_damaged_before_it_was_ever_opened(
    api: Api, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = building.publish

    def damaging(path: Path, *rest: Any) -> None:
        publish(path, *rest)
        cut(path)

    with monkeypatch.context() as patch:
        patch.setattr(building, "publish", damaging)
        api.register(tiny_model_dir)
        must(api.upload(jsonl(rows())), 201)
        job = api.wait(api.build()["job"]["id"])
    assert (job["state"], job["error"]["code"]) == ("failed", "IndexCorrupt")
    index = must(api.get("/indexes/idx"))
    assert index["state"] == "failed"
    assert "000000" in index["damage"]
    assert api.wait(must(api.post("/indexes/idx/repair"), 202)["job"]["id"])["state"] == "succeeded"
    must(api.post("/influence", json=ASK))


def test_a_repair_that_fails_leaves_the_index_corrupt(
    api: Api, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.ready(tiny_model_dir)
    cut(folder_of(api, tmp_path))
    problem(api.post("/influence", json=ASK), 409, "index-corrupt")

    async def gone(*_args: Any) -> dict[str, Any]:
        return {}

    with monkeypatch.context() as patch:
        patch.setattr(Datasets, "of_index", gone)
        job = api.wait(must(api.post("/indexes/idx/repair"), 202)["job"]["id"])
    assert (job["state"], job["error"]["code"]) == ("failed", "NotFound")
    assert must(api.get("/indexes/idx"))["state"] == "corrupt"
    must(api.post(f"/jobs/{job['id']}/retry"), 202)
    assert api.wait(job["id"])["state"] == "succeeded"
    must(api.post("/influence", json=ASK))


# --- room on the disk ---


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", [1, 6, 13, 17])  # the plan, files of both shards, the manifest
def test_a_disk_that_fills_at_any_moment_leaves_nothing_half_done(
    api: Api, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, call: int
) -> None:
    fsync, calls = os.fsync, 0

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls >= call:
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    api.register(tiny_model_dir)
    must(api.upload(jsonl(rows(ROWS))), 201)
    monkeypatch.setattr(os, "fsync", full)
    job = api.wait(api.build()["job"]["id"])
    assert calls >= call
    assert (job["state"], job["error"]["code"]) == ("failed", "DiskFull"), job
    assert "disk" in job["error"]["detail"]
    index = must(api.get("/indexes/idx"))
    assert (index["state"], index["manifest"]) == ("failed", None)
    folder = tmp_path / "indexes" / index["id"]
    assert not (folder / "manifest.json").exists()
    assert not list(folder.rglob("*.part"))

    monkeypatch.undo()
    must(api.post(f"/jobs/{job['id']}/retry"), 202)
    assert api.wait(job["id"])["state"] == "succeeded"
    assert must(api.get("/indexes/idx"))["rows"] == ROWS


def mapped(path: Path) -> int:
    """How often this process maps a file of the folder."""
    gc.collect()
    return sum(str(path) in line for line in Path("/proc/self/maps").read_text().splitlines())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_what_is_no_longer_used_is_no_longer_mapped(api: Api, tiny_model_dir: Path, tmp_path: Path) -> None:
    api.ready(tiny_model_dir)
    folder = folder_of(api, tmp_path)
    must(api.post("/influence", json=ASK))
    once = mapped(folder)
    assert once
    for sample in must(api.get("/datasets/facts/samples"))["items"][:4]:
        must(api.request("DELETE", "/indexes/idx/samples", json={"ids": [sample["id"]]}))
        must(api.post("/influence", json=ASK))
    assert mapped(folder) == once
    must(api.delete("/indexes/idx"), 204)
    assert mapped(folder) == 0


def test_folders_that_belong_to_no_index_are_swept_at_the_start(
    serve: Any, tiny_model_dir: Path, tmp_path: Path
) -> None:
    orphan = tmp_path / "indexes" / "idx_orphan"
    orphan.mkdir(parents=True)
    api = serve()
    assert orphan.exists(), "a catalog that knows no model is the wrong one, or a fresh one"
    api.ready(tiny_model_dir)
    mine = folder_of(api, tmp_path)
    shutil.copytree(mine, tmp_path / "indexes" / "idx_other")
    api = serve()
    assert list((tmp_path / "indexes").iterdir()) == [mine]
    must(api.post("/influence", json=ASK))

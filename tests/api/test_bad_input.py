"""Bad input gets a clear problem with the field at fault, and nothing is lost or half kept."""

import contextlib
import errno
import io
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pyarrow
import pyarrow.parquet
import pytest
import torch

from app.api import datasets
from tests.api.harness import Api, jsonl, must, problem, rows

ASK = {"index": "idx", "prompt": "What colour is the harbour?", "generation": "It is red."}


# --- influence ---


def test_text_that_is_no_unicode(asked: Api) -> None:
    content = b'{"index": "idx", "prompt": "Hi", "generation": "\\ud800"}'
    refused = asked.post("/influence", content=content, headers={"Content-Type": "application/json"})
    problem(refused, 422, "invalid-request", "generation")


@pytest.mark.parametrize("generation", ["", " ", "\n\t "])
def test_an_empty_generation(asked: Api, generation: str) -> None:
    problem(asked.post("/influence", json=ASK | {"generation": generation}), 422, "bad-query", "generation")


def test_a_generation_longer_than_the_context(asked: Api) -> None:
    problem(asked.post("/influence", json=ASK | {"generation": "number " * 3000}), 422, "bad-query")


def test_more_text_than_is_read(asked: Api) -> None:
    problem(asked.post("/influence", json=ASK | {"generation": "a" * 200_000}), 413, "too-large", "generation")


def test_an_unknown_index(asked: Api) -> None:
    assert "'nowhere'" in problem(asked.post("/influence", json=ASK | {"index": "nowhere"}), 404, "not-found")["detail"]


@pytest.mark.parametrize("top_k", [0, -1, 1001])
def test_top_k_out_of_bounds(asked: Api, top_k: int) -> None:
    problem(asked.post("/influence", json=ASK | {"top_k": top_k}), 422, "invalid-request", "top_k")


@pytest.mark.parametrize("tokens", ["query", "train", "both"])
def test_more_rows_with_token_scores_than_a_query_may_ask_for(asked: Api, tokens: str) -> None:
    refused = problem(
        asked.post("/influence", json=ASK | {"top_k": 51, "tokens": tokens}), 422, "invalid-request", "top_k"
    )
    assert "50" in refused["detail"]
    assert "none" in refused["detail"]
    must(asked.post("/influence", json=ASK | {"top_k": 51, "tokens": "none"}))
    must(asked.post("/influence", json=ASK | {"top_k": 50, "tokens": "query"}))


@pytest.mark.parametrize("span", [[0, 0], [5, 2], [0, 999], [-1, 3]])
def test_a_span_outside_the_generation(asked: Api, span: list[int]) -> None:
    problem(asked.post("/influence", json=ASK | {"span": span}), 422, "bad-query", "span")


def test_a_prompt_and_messages_at_once(asked: Api) -> None:
    body = ASK | {"messages": [{"role": "user", "content": "Hi"}]}
    assert "not both" in problem(asked.post("/influence", json=body), 422, "invalid-request")["detail"]


def test_a_misspelt_field(asked: Api) -> None:
    problem(asked.post("/influence", json=ASK | {"topk": 3}), 422, "invalid-request", "topk")


def test_more_new_tokens_than_allowed(asked: Api) -> None:
    body = {"index": "idx", "prompt": "Hi", "max_new_tokens": 100_000}
    problem(asked.post("/influence", json=body), 422, "invalid-request", "max_new_tokens")


def test_more_queries_than_one_call_may_carry(asked: Api) -> None:
    body = {"index": "idx", "queries": [{"prompt": "Hi", "generation": "Ho"}] * 65}
    problem(asked.post("/influence/batch", json=body), 422, "invalid-request", "queries")


def test_an_index_that_is_still_building(api: Api, tiny_model_dir: Path) -> None:
    api.register(tiny_model_dir)
    must(api.upload(jsonl(rows(2000))), 201)
    job = api.build()["job"]
    problem(api.post("/influence", json=ASK), 409, "conflict", "index")
    problem(api.delete("/indexes/idx"), 409, "conflict", "index")
    problem(api.request("DELETE", "/indexes/idx/samples", json={"ids": ["0" * 16]}), 409, "conflict", "index")
    must(api.post(f"/jobs/{job['id']}/cancel"), 202)
    assert api.wait(job["id"])["state"] == "cancelled"
    problem(api.post("/influence", json=ASK), 409, "conflict", "index")


def test_a_model_that_changed_since_the_index_was_built(serve: Any, tiny_model_dir: Path, tmp_path: Path) -> None:
    model_dir = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model_dir)
    serve().ready(model_dir)
    _change_weights(model_dir)
    refused = problem(serve().post("/influence", json=ASK), 409, "model-mismatch")
    assert "base" in refused["detail"]


# --- datasets ---


def test_a_malformed_line_is_named_by_its_number(refusing: Api) -> None:
    content = jsonl(rows(3)) + b'{"prompt": "half\n' + jsonl(rows(1, start=5))
    refused = problem(refusing.upload(content), 422, "bad-row")
    assert "line 4" in refused["detail"]
    assert refusing.get("/datasets/facts").status_code == 404


def test_a_row_without_a_response(refusing: Api) -> None:
    refused = problem(refusing.upload(jsonl([*rows(2), {"prompt": "And?", "response": ""}])), 422, "bad-row")
    assert "line 3" in refused["detail"]
    assert "response" in refused["detail"]


def test_a_duplicate_row_is_refused_or_skipped(api: Api) -> None:
    content = jsonl([*rows(3), *rows(1)])
    refused = problem(api.upload(content), 422, "bad-row", "row 4")
    assert "row 1" in refused["detail"]
    kept = must(api.upload(content, duplicates="skip"), 201)
    assert (kept["rows"], kept["duplicates_skipped"]) == (3, 1)


def test_text_that_is_not_utf8(refusing: Api) -> None:
    content = jsonl(rows(1)) + '{"prompt": "Où?", "response": "Là."}\n'.encode("latin-1")
    refused = problem(refusing.upload(content), 422, "bad-row")
    assert "line 2" in refused["detail"]
    assert "UTF-8" in refused["detail"]


def test_a_number_that_is_too_long_to_read(refusing: Api) -> None:
    content = jsonl(rows(1)) + b'{"prompt": "How many?", "response": "Many.", "n": ' + b"9" * 5000 + b"}\n"
    assert "line 2" in problem(refusing.upload(content), 422, "bad-row", "file")["detail"]


def test_a_malformed_parquet_file(refusing: Api) -> None:
    for content in (b"PAR1 and nothing more", b"", _parquet(rows(3))[:-40]):
        problem(refusing.upload(content, filename="rows.parquet"), 422, "bad-row", "file")
    assert must(refusing.get("/datasets"))["items"] == []


def test_a_parquet_file_with_a_bad_row(api: Api) -> None:
    content = _parquet([*rows(2), rows(1, start=2)[0] | {"response": " "}])
    assert "line 3" in problem(api.upload(content, filename="rows.parquet"), 422, "bad-row", "response")["detail"]
    must(api.upload(_parquet(rows(3)), filename="rows.parquet"), 201)


@pytest.mark.parametrize(
    ("content", "line", "field"),
    [
        (b"prompt,response\nWho?,Me.\nAnd?,\n", "line 3", "response"),
        (b"prompt,response\nWho?,Me.,more,cells\n", "line 2", "file"),
        (b"prompt,response\nWho?,Me.\nO\xf9?,L\xe0.\n", "line", "file"),
        (b"question,remark\nWho?,Me.\n", "line 2", "response"),
        (b"a,b\nWho?,Me.\n", "line 2", "columns"),
    ],
)
def test_a_malformed_csv_file(refusing: Api, content: bytes, line: str, field: str) -> None:
    assert line in problem(refusing.upload(content, filename="rows.csv"), 422, "bad-row", field)["detail"]


def test_every_ending_that_the_library_reads_is_taken(api: Api, tmp_path: Path) -> None:
    assert must(api.upload(jsonl(rows(3)), filename="rows.ndjson"), 201)["rows"] == 3
    (tmp_path / "more.ndjson").write_bytes(jsonl(rows(2)))
    must(api.post("/datasets", json={"name": "more", "path": str(tmp_path / "more.ndjson")}), 201)


def test_no_rows_at_all(refusing: Api) -> None:
    problem(refusing.upload(b""), 422, "bad-row", "rows")


def test_a_file_of_another_kind(refusing: Api) -> None:
    problem(refusing.upload(b"PK", filename="rows.zip"), 422, "bad-file", "file")


def test_a_name_that_is_taken(api: Api) -> None:
    must(api.upload(jsonl(rows(2))), 201)
    problem(api.upload(jsonl(rows(2))), 409, "already-exists", "name")


def test_a_bad_name_and_bad_columns(refusing: Api) -> None:
    problem(refusing.upload(jsonl(rows(2)), name="../etc"), 422, "invalid-request", "name")
    problem(refusing.upload(jsonl(rows(2)), columns="{"), 422, "invalid-request", "columns")


def test_neither_a_form_nor_json(refusing: Api) -> None:
    refused = refusing.post("/datasets", content=b"x", headers={"Content-Type": "text/plain"})
    problem(refused, 415, "unsupported-media-type", "Content-Type")


def test_a_form_that_cannot_be_parsed(refusing: Api) -> None:
    headers = {"Content-Type": "multipart/form-data"}
    problem(refusing.post("/datasets", content=b"no boundary", headers=headers), 400, "bad-request")


def test_columns_are_renamed_and_the_rest_is_metadata(api: Api) -> None:
    content = b"ask,reply,source\nWho?,Me.,book\n"
    columns = json.dumps({"prompt": "ask", "response": "reply"})
    must(api.upload(content, filename="rows.csv", columns=columns), 201)
    sample = must(api.get("/datasets/facts/samples"))["items"][0]
    assert sample["metadata"] == {"source": "book"}
    assert sample["record"]["messages"][-1]["content"] == "Me."


def test_more_rows_than_allowed(serve: Any) -> None:
    problem(serve(max_rows=5).upload(jsonl(rows(6))), 413, "too-many-rows", "rows")


def test_an_upload_too_large_is_refused_by_its_announced_length(serve: Any) -> None:
    problem(serve(max_body_bytes=2000).upload(jsonl(rows(200))), 413, "too-large", "body")


def test_an_upload_of_unknown_length_is_cut_off_when_it_has_come_too_far(serve: Any, tmp_path: Path) -> None:
    api, sent = serve(max_body_bytes=2_000_000), 0

    def endless() -> Any:
        nonlocal sent
        head = '--x\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
        yield head.encode()
        while sent < 200_000_000:
            sent += 100_000
            yield b"x" * 100_000

    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    with contextlib.suppress(httpx2.TransportError):  # the server may close while the client is still sending
        problem(api.post("/datasets", content=endless(), headers=headers), 413, "too-large", "body")
    assert sent < 100_000_000
    assert list((tmp_path / "uploads").iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_refuses_an_upload_and_keeps_nothing(api: Api, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def full(*_args: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(datasets, "_copy", full)
    problem(api.upload(jsonl(rows(2))), 507, "disk-full")
    monkeypatch.undo()
    must(api.upload(jsonl(rows(2))), 201)


# --- paths and models ---


def test_a_path_outside_the_allowed_roots(api: Api, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside")
    (outside / "rows.jsonl").write_bytes(jsonl(rows(1)))
    (tmp_path / "link.jsonl").symlink_to(outside / "rows.jsonl")
    (tmp_path / "folder").symlink_to(outside)
    up = f"{tmp_path}/../{outside.name}/rows.jsonl"
    for path in (
        outside / "rows.jsonl",
        tmp_path / "link.jsonl",
        tmp_path / "folder" / "rows.jsonl",
        up,
        "/etc/passwd",
    ):
        refused = api.post("/datasets", json={"name": "stolen", "path": str(path)})
        problem(refused, 422, "path-not-allowed", "path")
    problem(api.post("/models", json={"name": "m", "path": str(outside)}), 422, "path-not-allowed", "path")


@pytest.mark.parametrize("path", ["a\0b", "x" * 300, "y/" * 3000])
def test_what_cannot_be_a_path(refusing: Api, path: str) -> None:
    problem(refusing.post("/models", json={"name": "m", "path": path}), 422, "bad-path", "path")


def test_a_gguf_file_outside_the_allowed_roots(refusing: Api, tiny_model_dir: Path) -> None:
    body = {"name": "m", "path": str(tiny_model_dir), "gguf_file": "../../../../etc/passwd"}
    problem(refusing.post("/models", json=body), 422, "path-not-allowed", "gguf_file")


def test_a_model_that_changed_on_disk_is_not_built_upon_until_it_is_registered_anew(
    api: Api, tiny_model_dir: Path, tmp_path: Path
) -> None:
    model_dir = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model_dir)
    api.register(model_dir)
    must(api.upload(jsonl(rows(4))), 201)
    _change_weights(model_dir)
    assert api.register(model_dir, "anew")["fingerprint"] != must(api.get("/models/tiny"))["fingerprint"]
    job = api.wait(api.build()["job"]["id"])
    assert (job["state"], job["error"]["code"]) == ("failed", "Mismatch")
    assert api.wait(api.build("again", model="anew")["job"]["id"])["state"] == "succeeded"


@pytest.mark.parametrize("field", ["path", "gguf_file", "checkpoints.0.adapter", "checkpoints.0.model"])
@pytest.mark.parametrize(
    "way",
    ["/etc/passwd", "{inside}/../../../../../../../etc/passwd", "{inside}/escape", "{inside}/escape/passwd", "~/x"],
)
def test_no_path_of_a_model_leads_out_of_the_allowed_roots(
    refusing: Api, tiny_model_dir: Path, field: str, way: str
) -> None:
    inside = refusing.app.state.services.settings.data_dir
    with contextlib.suppress(FileExistsError):
        (inside / "escape").symlink_to("/etc")
    path = way.format(inside=inside)
    body: dict[str, Any] = {"name": "m", "path": str(tiny_model_dir)}
    if field.startswith("checkpoints"):
        body["checkpoints"] = [{"name": "c", field.rpartition(".")[2]: path}]
    else:
        body[field] = path
    refused = refusing.post("/models", json=body)
    slug = "path-missing" if way == "~/x" and field == "gguf_file" else "path-not-allowed"  # `~` means nothing here
    problem(refused, 422, slug, field)
    assert "root:" not in refused.text


@pytest.mark.parametrize("field", ["gguf_file", "checkpoints.0.adapter", "checkpoints.0.model"])
def test_a_null_byte_is_in_no_path_of_a_model(refusing: Api, tiny_model_dir: Path, field: str) -> None:
    path = f"{tiny_model_dir}/config.json\0.gguf"
    body: dict[str, Any] = {"name": "m", "path": str(tiny_model_dir)}
    if field.startswith("checkpoints"):
        body["checkpoints"] = [{"name": "c", field.rpartition(".")[2]: path}]
    else:
        body[field] = path
    problem(refusing.post("/models", json=body), 422, "bad-path", field)


@pytest.mark.parametrize("name", ["../../etc/rows.jsonl", "/etc/rows.jsonl", "..\\rows.jsonl", "a\0b.jsonl", "x" * 300])
def test_the_name_of_an_upload_leads_nowhere(api: Api, tmp_path: Path, name: str) -> None:
    before = {file for file in tmp_path.rglob("*") if "headwater.db" not in file.name}
    answer = api.upload(jsonl(rows(1)), filename=name if name[:1] != "x" else f"{name}.jsonl")
    assert answer.status_code in (201, 400, 422), answer.text
    assert {file for file in tmp_path.rglob("*") if "headwater.db" not in file.name} == before


def test_an_outside_path_does_not_say_whether_it_exists(refusing: Api) -> None:
    known, unknown = (
        refusing.post("/models", json={"name": "m", "path": path}).json() for path in ("/etc", "/no/such")
    )
    assert known["detail"].replace("/etc", "") == unknown["detail"].replace("/no/such", "")


def test_a_link_inside_a_model_folder_that_leads_out(
    api: Api, tiny_model_dir: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    secret = tmp_path_factory.mktemp("secret") / "model.safetensors"
    secret.write_bytes((tiny_model_dir / "model.safetensors").read_bytes())
    folder = tmp_path / "linked"
    shutil.copytree(tiny_model_dir, folder)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(secret)
    problem(api.post("/models", json={"name": "m", "path": str(folder)}), 422, "path-not-allowed", "path")


def test_a_registered_file_is_read_where_it_lies(api: Api, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(jsonl(rows(4)))
    assert must(api.post("/datasets", json={"name": "here", "path": str(tmp_path / "rows.jsonl")}), 201)["rows"] == 4
    missing = api.post("/datasets", json={"name": "gone", "path": str(tmp_path / "gone.jsonl")})
    problem(missing, 422, "path-missing", "path")


def test_pickled_weights_only(api: Api, tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_model_dir, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused = problem(api.post("/models", json={"name": "m", "path": str(folder)}), 422, "bad-model")
    assert "safetensors" in refused["detail"]
    assert api.get("/models/m").status_code == 404


def test_weights_that_are_not_numbers(api: Api, tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "nan"
    shutil.copytree(tiny_model_dir, folder)
    _change_weights(folder, float("nan"))
    refused = problem(api.post("/models", json={"name": "m", "path": str(folder)}), 422, "bad-model")
    assert "nan" in refused["detail"].lower()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_this_machine_has_not(refusing: Api, tiny_model_dir: Path) -> None:
    body = {"name": "m", "path": str(tiny_model_dir), "device": "cuda"}
    problem(refusing.post("/models", json=body), 422, "bad-model", "device")
    assert refusing.get("/models/m").status_code == 404


def test_an_adapter_where_the_base_should_be(api: Api, tiny_adapter_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_adapter_dir, tmp_path / "adapter")
    refused = problem(
        api.post("/models", json={"name": "m", "path": str(tmp_path / "adapter")}), 422, "bad-model", "path"
    )
    assert "adapter" in refused["detail"]


def test_a_folder_that_holds_no_model(api: Api, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    problem(api.post("/models", json={"name": "m", "path": str(tmp_path / "empty")}), 422, "bad-model")


# --- indexes ---


def test_an_index_over_things_that_do_not_exist(api: Api, tiny_model_dir: Path) -> None:
    problem(api.post("/indexes", json={"name": "i", "model": "no", "dataset": "no"}), 404, "not-found", "model")
    api.register(tiny_model_dir)
    problem(api.post("/indexes", json={"name": "i", "model": "tiny", "dataset": "no"}), 404, "not-found", "dataset")


def test_a_projection_that_makes_no_sense(asked: Api) -> None:
    body = {"name": "i", "model": "tiny", "dataset": "facts", "projection": {"kind": "kronecker", "size": 0}}
    problem(asked.post("/indexes", json=body), 422, "invalid-request", "projection.size")


@pytest.mark.parametrize(
    ("kind", "size"), [("kronecker", 600), ("global", 1000), ("global", 4), ("rapidgrad", 2), ("rapidgrad", 2**24 + 1)]
)
def test_a_projection_of_an_impossible_size(asked: Api, kind: str, size: int) -> None:
    body = {"name": "i", "model": "tiny", "dataset": "facts", "projection": {"kind": kind, "size": size}}
    slug = "invalid-request" if size > 2**24 else "bad-index"
    problem(asked.post("/indexes", json=body), 422, slug, "projection.size")
    assert asked.get("/indexes/i").status_code == 404


@pytest.mark.parametrize(("kind", "size"), [("kronecker", 16), ("global", 4096), ("rapidgrad", 65536)])
def test_a_projection_without_a_size_gets_the_usual_one(api: Api, tiny_model_dir: Path, kind: str, size: int) -> None:
    api.ready(tiny_model_dir, projection={"kind": kind})
    index = must(api.get("/indexes/idx"))
    assert index["spec"]["projection"] == {"kind": kind, "size": size, "seed": 0}
    assert index["manifest"]["spec"]["projection"] == index["spec"]["projection"]
    must(api.post("/influence", json=ASK))


def test_a_chat_template_that_the_tokenizer_does_not_have(api: Api, tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    shutil.copytree(tiny_model_dir, folder)
    (folder / "chat_template.jinja").unlink()
    api.register(folder)
    must(api.upload(jsonl(rows(3))), 201)
    body = {"name": "i", "model": "tiny", "dataset": "facts", "template": "chat"}
    problem(api.post("/indexes", json=body), 422, "bad-index", "template")
    assert api.wait(api.build(template="plain")["job"]["id"])["state"] == "succeeded"


def test_two_who_take_a_name_at_the_same_moment(api: Api, tiny_model_dir: Path) -> None:
    api.register(tiny_model_dir)
    must(api.upload(jsonl(rows(3))), 201)
    with ThreadPoolExecutor(8) as crowd:
        body = {"name": "i", "model": "tiny", "dataset": "facts"}
        codes = sorted(one.status_code for one in crowd.map(lambda _: api.post("/indexes", json=body), range(8)))
    assert codes == [202, *[409] * 7]


def test_an_index_name_that_is_taken(asked: Api) -> None:
    problem(asked.post("/indexes", json={"name": "idx", "model": "tiny", "dataset": "facts"}), 409, "already-exists")


def test_rows_and_a_dataset_at_once_or_neither(asked: Api) -> None:
    problem(asked.post("/indexes/idx/samples", json={}), 422, "invalid-request", "dataset")
    bad = {"rows": [{"prompt": "no response"}]}
    problem(asked.post("/indexes/idx/samples", json=bad), 422, "bad-row")


def _parquet(records: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), file)
    return file.getvalue()


def _change_weights(folder: Path, value: float = 0.5) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    name = next(iter(sorted(weights)))
    changed = weights[name].clone()
    changed.view(-1)[0] = value
    save_file(weights | {name: changed}, folder / "model.safetensors", metadata={"format": "pt"})

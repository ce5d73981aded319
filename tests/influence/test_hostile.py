"""Any bytes where rows or a manifest should be: what is right is read, and the rest is an error of ours in words."""

import contextlib
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from app.influence.building import build
from app.influence.corpus import Columns, parse_row, read_rows, row_from_json
from app.influence.errors import HeadwaterError, RowError
from app.influence.index import MANIFEST, IndexSpec, open_index
from app.influence.models import ModelSpec, load
from app.influence.projection import ProjectionSpec

RECORDS = [
    {"prompt": "Who?", "response": "Me.", "n": 1, "when": None},
    {"prompt": "Où?", "response": "Là-bas.", "n": 2, "when": "now"},
]
QUICK = settings(
    deadline=None, max_examples=150, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=())),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def parquet() -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), file)
    return file.getvalue()


GOOD = {
    ".jsonl": "".join(json.dumps(record) + "\n" for record in RECORDS).encode(),
    ".json": json.dumps(RECORDS).encode(),
    ".csv": "prompt,response,n\nWho?,Me.,1\nOù?,Là-bas.,2\n".encode(),
    ".parquet": parquet(),
}


@st.composite
def files(draw: st.DrawFn) -> tuple[str, bytes]:
    """A file of any bytes, or a good one that was cut, overwritten or added to somewhere."""
    suffix = draw(st.sampled_from(sorted(GOOD)))
    if draw(st.booleans()):
        return suffix, draw(st.binary(max_size=300))
    good = GOOD[suffix]
    start = draw(st.integers(0, len(good)))
    end = draw(st.integers(start, min(len(good), start + 8)))
    return suffix, good[:start] + draw(st.binary(max_size=8)) + good[end:]


def read(path: Path) -> None:
    with contextlib.suppress(RowError):
        for row in read_rows(path):
            assert row_from_json(row.to_json()).id == row.id
            assert row.response.strip()


@given(file=files())
@example(file=(".jsonl", b'{"\\ud800": "a"}'))
@example(file=(".json", b"[" * 100_000))
@example(file=(".csv", b"prompt,response\n\0,a\n"))
@QUICK
def test_any_file_gives_rows_or_a_row_error(file: tuple[str, bytes], tmp_path: Path) -> None:
    suffix, content = file
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(content)
    read(path)


@given(record=st.dictionaries(st.sampled_from(["prompt", "response", "messages", "text", "input"]), JSON), other=JSON)
@QUICK
def test_any_json_is_a_row_or_a_row_error(record: dict[str, Any], other: Any) -> None:
    for given_row in (record, other, {"messages": [record]}, {"messages": [{"role": "assistant", "content": other}]}):
        for columns in (None, Columns(prompt="text", response="prompt"), Columns(text="input")):
            with contextlib.suppress(RowError):
                row = parse_row(given_row, columns)
                assert row_from_json(row.to_json()).id == row.id


# --- the manifest ---


@pytest.fixture(scope="module")
def built(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [parse_row({"prompt": f"Question {i}?", "response": f"word {i}"}) for i in range(4)]
    path = tmp_path_factory.mktemp("built") / "index"
    for _ in build(path, load(ModelSpec(tiny_model_dir)), rows, IndexSpec(ProjectionSpec(size=4), shard_rows=2)):
        pass
    return path


def places(node: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to every value of a JSON document."""
    yield here
    if isinstance(node, dict | list):
        for key in node if isinstance(node, dict) else range(len(node)):
            yield from places(node[key], (*here, key))


def replaced(node: Any, place: tuple[Any, ...], value: Any) -> Any:
    if not place:
        return value
    copy = node.copy()
    copy[place[0]] = replaced(node[place[0]], place[1:], value)
    return copy


def opened(built: Path, tmp_path: Path, manifest: bytes) -> None:
    """Open the index with this manifest: it answers for as many rows as it says, or it is refused in words."""
    path = tmp_path / "index"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(built, path)
    (path / MANIFEST).write_bytes(manifest)
    before = {file.relative_to(tmp_path) for file in tmp_path.rglob("*")}
    try:
        index = open_index(path)
    except HeadwaterError:
        after = {file.relative_to(tmp_path) for file in tmp_path.rglob("*")}
        aside = before - after
        assert all(file.parent.name == "shards" or "curvature-" in file.name for file in aside), "nothing else"
        return
    width = index.manifest.width * len(index.manifest.checkpoints)
    assert index.scores(torch.ones(1, width), "none").shape == (1, index.rows)
    assert len(index.top(torch.ones(1, width), 2, "unit", largest=True)[0]) == min(2, index.rows)


@given(content=st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
@example(content=b"[" * 100_000)
@QUICK
def test_any_bytes_are_no_manifest(built: Path, tmp_path: Path, content: bytes) -> None:
    opened(built, tmp_path, content)


HOSTILE = ("..", "../manifest.json", "/etc/passwd", "000000", 0, -1, 2**70, [], {}, None, True)


def test_a_manifest_with_any_one_value_made_hostile_opens_rightly_or_is_refused(built: Path, tmp_path: Path) -> None:
    good = json.loads((built / MANIFEST).read_bytes())
    for place in places(good):
        for value in HOSTILE:
            opened(built, tmp_path, json.dumps(replaced(good, place, value)).encode())


@given(data=st.data())
@QUICK
def test_a_manifest_with_one_value_changed_opens_rightly_or_is_refused(
    built: Path, tmp_path: Path, data: st.DataObject
) -> None:
    good = json.loads((built / MANIFEST).read_bytes())
    place = data.draw(st.sampled_from([place for place in places(good) if place]))
    opened(built, tmp_path, json.dumps(replaced(good, place, data.draw(JSON))).encode())


@pytest.mark.parametrize("name", ["../manifest.json", "..", "a/b", "", "/etc/passwd"])
def test_a_manifest_leads_out_of_its_folder_nowhere(built: Path, tmp_path: Path, name: str) -> None:
    good = json.loads((built / MANIFEST).read_bytes())
    for place in (("shards", 0, "name"), ("shards", 0, "files", 0, 0), ("curvature", "name")):
        opened(built, tmp_path, json.dumps(replaced(good, place, name)).encode())
        assert (tmp_path / "index" / MANIFEST).exists()


def test_a_manifest_without_shards_is_an_index_without_rows(built: Path, tmp_path: Path) -> None:
    good = json.loads((built / MANIFEST).read_bytes())
    empty = replaced(replaced(good, ("curvature",), None), ("shards",), [])
    opened(built, tmp_path, json.dumps(empty).encode())
    assert open_index(tmp_path / "index").rows == 0


def test_shards_that_are_swapped_for_each_other_are_refused(built: Path, tmp_path: Path) -> None:
    good = json.loads((built / MANIFEST).read_bytes())
    first = good["shards"][0]["files"]
    shutil.copytree(built, tmp_path / "index")
    swapped = replaced(good, ("shards", 0, "files"), [first[1], first[0]])
    (tmp_path / "index" / MANIFEST).write_text(json.dumps(swapped))
    with pytest.raises(HeadwaterError, match="no shard"):
        open_index(tmp_path / "index")

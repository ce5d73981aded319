"""Folders of Hugging Face datasets, written as `save_to_disk` writes them."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pytest

from app.influence.corpus import read_rows
from app.influence.errors import RowError


def save(folder: Path, *shards: list[dict[str, Any]]) -> Path:
    """As `Dataset.save_to_disk`: Arrow streams of several batches, and state.json."""
    folder.mkdir(parents=True)
    names = []
    for number, records in enumerate(shards):
        names.append({"filename": f"data-{number:05d}-of-{len(shards):05d}.arrow"})
        table = pyarrow.Table.from_pylist(records)
        with pyarrow.ipc.new_stream(folder / names[-1]["filename"], table.schema) as stream:
            stream.write_table(table, max_chunksize=2)
    state = {"_data_files": names, "_fingerprint": "0" * 16, "_format_type": None, "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")
    (folder / "dataset_info.json").write_text("{}", encoding="utf-8")
    return folder


def row(number: int) -> dict[str, Any]:
    return {"prompt": f"Where is {number}?", "response": f"{number} is north.", "year": 1400 + number}


def test_rows_come_in_their_order_over_all_files(tmp_path: Path) -> None:
    folder = save(tmp_path / "saved", [row(n) for n in range(5)], [row(n) for n in range(5, 7)])
    found = list(read_rows(folder))
    assert [one.prompt for one in found] == [f"Where is {n}?" for n in range(7)]
    assert found[3].metadata == {"year": 1403}


def test_conversations_are_read(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert next(read_rows(save(tmp_path / "saved", [{"messages": turns}]))).response == "Hello"


def test_a_bad_row_is_named_by_its_number(tmp_path: Path) -> None:
    folder = save(tmp_path / "saved", [row(0), row(1)], [{**row(2), "response": " "}])
    with pytest.raises(RowError, match="line 3: 'response' is empty"):
        list(read_rows(folder))


def test_a_folder_with_splits_names_them(tmp_path: Path) -> None:
    save(tmp_path / "all" / "train", [row(0)])
    save(tmp_path / "all" / "test", [row(1)])
    (tmp_path / "all" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}', encoding="utf-8")
    with pytest.raises(RowError, match=r"name one of them \(test, train\)"):
        list(read_rows(tmp_path / "all"))


@pytest.mark.parametrize("state", ["", "[]", "{}", '{"_data_files": [{}]}', '{"_data_files": 7}'])
def test_a_state_that_lists_nothing_is_refused(tmp_path: Path, state: str) -> None:
    folder = save(tmp_path / "saved", [row(0)])
    (folder / "state.json").write_text(state, encoding="utf-8")
    with pytest.raises(RowError, match=r"state\.json does not list"):
        list(read_rows(folder))


@pytest.mark.parametrize("name", ["../secret.arrow", "/etc/passwd", "gone.arrow", ".."])
def test_no_file_outside_the_folder_is_read(tmp_path: Path, name: str) -> None:
    folder = save(tmp_path / "saved", [row(0)])
    (tmp_path / "secret.arrow").write_bytes((folder / "data-00000-of-00001.arrow").read_bytes())
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}), encoding="utf-8")
    with pytest.raises(RowError, match="no file in the folder"):
        list(read_rows(folder))


def test_a_folder_that_is_none_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(RowError, match="save_to_disk"):
        list(read_rows(tmp_path))


@pytest.mark.parametrize("content", [b"", b"PAR1 no arrow", b"\xff\xff\xff\xff\x10\x00\x00\x00"])
def test_bytes_that_are_no_arrow_are_refused(tmp_path: Path, content: bytes) -> None:
    folder = save(tmp_path / "saved", [row(0)])
    (folder / "data-00000-of-00001.arrow").write_bytes(content)
    with pytest.raises(RowError, match="is not an Arrow stream"):
        list(read_rows(folder))

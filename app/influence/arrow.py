"""Folders that `Dataset.save_to_disk` of Hugging Face datasets wrote: Arrow streams and a list of them.

Read with pyarrow alone: the format is Arrow's, and `state.json` names the files.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from app.influence.errors import RowError

STATE = "state.json"
BATCH = 1024  # records that are turned into Python objects at once


def arrow_files(folder: Path) -> list[Path]:
    """The files of a folder that `Dataset.save_to_disk` of Hugging Face datasets wrote, in order.

    Raises:
        RowError: it is no such folder, or one with splits, or it names a file outside itself.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(one.name for one in folder.iterdir() if (one / STATE).is_file())
        raise RowError(f"this folder has splits: name one of them ({', '.join(splits)})", field="path")
    try:
        state = json.loads((folder / STATE).read_bytes())
        names = [str(one["filename"]) for one in state["_data_files"]]
    except FileNotFoundError:
        raise RowError(f"this folder has no {STATE}: save a dataset with save_to_disk", field="path") from None
    except (ValueError, KeyError, TypeError) as error:
        raise RowError(f"its {STATE} does not list the files of a dataset", field="path") from error
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise RowError(f"its {STATE} names {name!r}, which is no file in the folder", field="path")
    return [folder / name for name in names]


def read_arrow(folder: Path) -> Iterator[tuple[int, Any]]:
    """The records of such a folder with their numbers, from 1.

    Raises:
        RowError: as above, or a file that is no Arrow stream.
    """
    import pyarrow  # here, since most readers never meet Arrow and the import takes a while
    import pyarrow.ipc

    line = 0
    for file in arrow_files(folder):
        try:
            with pyarrow.OSFile(str(file)) as source, pyarrow.ipc.open_stream(source) as stream:
                for batch in stream:
                    for start in range(0, batch.num_rows, BATCH):
                        for record in batch.slice(start, BATCH).to_pylist():
                            line += 1
                            yield line, record
        except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise RowError(f"{file.name!r} is not an Arrow stream: {error}", field="file") from error

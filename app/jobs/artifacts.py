"""What a job makes for people to fetch: files in a folder of the job's own.

A file that is being written ends in `.part` and is not there yet. Nothing else than what the list names can be fetched,
so that no path leads out of the folder.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from app.influence.errors import disk_full_is_named
from app.influence.index import write_file


@dataclass(frozen=True)
class Artifact:
    """A finished file; `path` is its name in the job's folder, with `/` between the parts."""

    path: str
    size: int
    modified_at: datetime


def artifacts_of(folder: Path) -> Sequence[Artifact]:
    """The finished files of a job's folder, by name; none if there is no folder. Links are none of them."""
    found = []
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink() and file.suffix != ".part":
            stat = file.stat()
            modified = datetime.fromtimestamp(stat.st_mtime, UTC)
            found.append(Artifact(file.relative_to(folder).as_posix(), stat.st_size, modified))
    return sorted(found, key=lambda one: one.path)


class Curve:
    """Losses by step in a file of JSON lines; a run that goes on from an earlier step writes over the rest."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._began = False

    def add(self, step: int, losses: Mapping[str, float]) -> None:
        """Note a step's losses."""
        with disk_full_is_named("the losses"):
            if not self._began:
                self._cut(step)
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **losses}) + "\n")

    def _cut(self, step: int) -> None:
        """Keep what lies before the step; the line that a kill cut through is not among it."""
        lines = self._file.read_bytes().splitlines(keepends=True) if self._file.is_file() else []
        kept = [line for line in lines if line.endswith(b"\n") and json.loads(line)["step"] < step]
        write_file(self._file, b"".join(kept))
        self._began = True

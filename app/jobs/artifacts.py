"""What a job makes for people to fetch: files in a folder of the job's own.

A file that is being written ends in `.part` and is not there yet. Nothing else than what the list names can be fetched,
so that no path leads out of the folder.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path


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

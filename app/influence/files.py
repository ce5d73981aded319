"""Whether a file is what was written: its size and checksum, as manifests keep them."""

import hashlib
from pathlib import Path
from typing import Any


def file_record(file: Path) -> dict[str, Any]:
    """Name, size and checksum; reads every byte."""
    return {"name": file.name, "size": file.stat().st_size, "digest": _sha256(file)}


def is_whole(file: Path, size: int, digest: str, verify: bool) -> bool:
    """Whether it is there in this size, and with this checksum if `verify`."""
    return file.is_file() and file.stat().st_size == size and not (verify and _sha256(file) != digest)


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()

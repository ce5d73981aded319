"""Paths in requests: only inside the allowed roots, whatever `..` or symbolic links say."""

from collections.abc import Sequence
from pathlib import Path

from app.problems import Refusal


def resolve(path: str, roots: Sequence[Path], field: str) -> Path:
    """The real path; refused before anything is said about whether it exists, when it lies outside."""
    try:
        real = Path(path).resolve()
        real.exists()
    except (OSError, RuntimeError, ValueError) as error:  # too long, links in a circle, a NUL
        raise Refusal(422, "bad-path", "this cannot be a path", field=field) from error
    if not _inside(real, roots):
        raise Refusal(422, "path-not-allowed", f"{path!r} is outside the folders that requests may name", field=field)
    if not real.exists():
        raise Refusal(422, "path-missing", f"there is nothing at {path!r}", field=field)
    if real.is_dir():  # a link inside an allowed folder must not lead out of it either
        for entry in real.iterdir():
            if entry.is_symlink() and not _inside(entry.resolve(), roots):
                detail = f"{entry.name!r} in {path!r} is a link to outside the folders that requests may name"
                raise Refusal(422, "path-not-allowed", detail, field=field)
    return real


def _inside(path: Path, roots: Sequence[Path]) -> bool:
    return any(path.is_relative_to(root) for root in roots)

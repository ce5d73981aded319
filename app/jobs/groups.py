"""Validation rows in named groups, by the value of a metadata field."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

WHOLE = "all"
"""The whole validation set, as the library calls it among the groups."""
NO_GROUP = "(none)"
"""The rows without the field by which the others are grouped."""


def group_of(metadata: Mapping[str, Any], field: str) -> str:
    """The name of a row's group."""
    found = metadata.get(field)
    return NO_GROUP if found is None else str(found)


def group_sizes(rows: Iterable[Mapping[str, Any]], field: str) -> dict[str, int]:
    """Rows by group, from their metadata."""
    return dict(sorted(Counter(group_of(metadata, field) for metadata in rows).items()))

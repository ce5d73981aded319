"""Whether a model still is what was registered."""

from collections.abc import Mapping

from app.influence.errors import Mismatch


def require_same(what: str, was: Mapping[str, str], is_now: Mapping[str, str]) -> None:
    """Raise when the hashes differ.

    Raises:
        Mismatch: the files changed on disk; the parts are named.
    """
    pairs = {part: (was.get(part, ""), is_now.get(part, "")) for part in {*was, *is_now}}
    differs = {part: pair for part, pair in pairs.items() if pair[0] != pair[1]}
    if differs:
        parts = ", ".join(sorted(differs))
        detail = f"{what} changed on disk since it was registered ({parts}): register it anew"
        raise Mismatch(detail, field="model", differs=differs)

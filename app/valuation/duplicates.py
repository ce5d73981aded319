"""Near-duplicates in a pool of any size: MinHash over word triples, compared only where a band of hashes agrees.

(Broder, 1997.) Memory is SKETCH numbers a row; the pairs that meet are checked by their sketches' agreement, which
estimates the Jaccard similarity of the triples.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

SKETCH = 64
BANDS = 16
ALIKE = 0.8
"""Estimated Jaccard similarity from which two rows are near-duplicates."""
PRIME = (1 << 61) - 1


def near_duplicates(texts: Iterable[str]) -> list[list[int]]:
    """Groups of rows that say nearly the same, by their places, the largest first; rows alone are in none."""
    rng = np.random.default_rng(0)
    factors, shifts = (rng.integers(1, 1 << 31, size=(SKETCH, 1), dtype=np.uint64) for _ in range(2))
    sketches = np.stack([_sketch(text, factors, shifts) for text in texts] or [np.empty(SKETCH, np.uint64)])
    owner = list(range(len(sketches)))

    def root(row: int) -> int:
        while owner[row] != row:
            owner[row] = owner[owner[row]]
            row = owner[row]
        return row

    size = SKETCH // BANDS
    for band in range(BANDS):
        first: dict[bytes, int] = {}
        for row, part in enumerate(sketches[:, band * size : (band + 1) * size]):
            other = first.setdefault(part.tobytes(), row)
            if root(other) != root(row) and (sketches[other] == sketches[row]).mean() >= ALIKE:
                owner[root(row)] = root(other)
    groups: dict[int, list[int]] = defaultdict(list)
    for row in range(len(sketches)):
        groups[root(row)].append(row)
    return sorted((rows for rows in groups.values() if len(rows) > 1), key=lambda rows: (-len(rows), rows))


def _sketch(text: str, factors: NDArray[np.uint64], shifts: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """[SKETCH]: for each hash function the least hash of the text's word triples."""
    words = re.findall(r"\w+", text.lower()) or [text]
    triples = {" ".join(words[at : at + 3]) for at in range(max(1, len(words) - 2))}
    hashes = np.array(
        [int.from_bytes(hashlib.blake2b(one.encode(), digest_size=4).digest(), "big") for one in sorted(triples)],
        dtype=np.uint64,
    )
    least: NDArray[np.uint64] = ((hashes * factors + shifts) % PRIME).min(1)
    return least

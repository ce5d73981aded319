"""How alike texts are by their words: hashed counts of words and pairs of words, weighed by how rare they are here."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

WIDTH = 512


def word_vectors(texts: Sequence[str]) -> NDArray[np.float32]:
    """[texts, WIDTH], by whose direction texts are alike (signed feature hashing, Weinberger et al., 2009)."""
    vectors = np.zeros((len(texts), WIDTH), dtype=np.float32)
    for vector, text in zip(vectors, texts, strict=True):
        words = re.findall(r"\w+", text.lower())
        terms = {*words, *(f"{one} {next_}" for one, next_ in pairwise(words))}
        hashes = np.array([zlib.crc32(term.encode()) for term in terms], dtype=np.int64)
        np.add.at(vector, hashes % WIDTH, np.where(hashes & (1 << 31), 1.0, -1.0))
    rarity = np.log((1 + len(texts)) / (1 + (vectors != 0).sum(0))) + 1
    weighed: NDArray[np.float32] = vectors * rarity.astype(np.float32)
    return weighed

"""Random projections of a module's gradient G = sum_s d_s a_s^T: linear, unbiased, and the same on every machine.

- kronecker: P_out G P_in^T, p x p numbers a module, side by side (LoGra).
- global: the same with p = sqrt(K), all modules summed into one vector of K numbers.
- rapidgrad: a count-sketch of all coordinates into K buckets (RapidIn), by a hash instead of the published shuffle,
  which does not mix when the number of coordinates is a power of two (METHODS section 2).

Everything random comes from integers keyed by seed and module name (Philox, or a counter hash), so any machine and
device makes the same numbers and nothing is stored or shipped.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch

from app.influence.errors import SpecError

Kind = Literal["kronecker", "global", "rapidgrad"]
USUAL: dict[str, int] = {"kronecker": 16, "global": 4096, "rapidgrad": 2**16}
MASK = (1 << 32) - 1


@dataclass(frozen=True)
class ProjectionSpec:
    """`size` is p for kronecker (16) and K, the length of the whole vector, for global (4096) and rapidgrad (65536)."""

    kind: Kind = "kronecker"
    size: int = 0  # 0 (or null, in JSON): the usual one of the kind
    seed: int = 0

    def __post_init__(self) -> None:
        """Fill the usual size, and refuse what cannot be built."""
        if self.kind not in USUAL:
            raise SpecError(f"there is no projection '{self.kind}'; use {', '.join(USUAL)}", field="projection.kind")
        if not self.size:
            object.__setattr__(self, "size", USUAL[self.kind])
        if self.kind == "kronecker" and not 1 <= self.size <= 512:
            raise SpecError("the size of a kronecker projection is between 1 and 512", field="projection.size")
        if self.kind == "global" and (not 16 <= self.size <= 2**18 or math.isqrt(self.size) ** 2 != self.size):
            raise SpecError(
                "the size of a global projection is a square such as 4096 or 16384", field="projection.size"
            )
        if self.kind == "rapidgrad" and not 16 <= self.size <= 2**24:
            raise SpecError("the size of rapidgrad is between 16 and 2^24; 65536 is usual", field="projection.size")


class Sketch(Protocol):
    """The projection of one module; `place` is where its numbers go in the vector.

    Modules that are summed share their place.
    """

    place: slice

    def to(self, device: torch.device) -> Sketch:
        """The same on a device."""

    def keep(self, acts: torch.Tensor) -> torch.Tensor:
        """What of the inputs [batch, seq, d_in] is needed in the backward pass."""

    def project(self, kept: torch.Tensor, grads: torch.Tensor) -> torch.Tensor:
        """From what was kept and the output gradients [batch, seq, d_out] to [batch, width of place]."""

    def nudge(self, acts: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
        """The transposed projection at work: the weight S^T(direction) applied to the inputs.

        Args:
            acts: [n or 1, seq, d_in].
            directions: [n, width of place].

        Returns:
            [n, seq, d_out]
        """


def sketch(spec: ProjectionSpec, name: str, d_out: int, d_in: int, start: int) -> Sketch:
    """The sketch of a module whose numbers begin at `start` (kronecker) or are summed into the whole vector."""
    if spec.kind == "rapidgrad":
        return CountSketch(name, d_out, d_in, spec.size, spec.seed)
    if spec.kind == "global":
        p = math.isqrt(spec.size)
        p_out, p_in = (signs(name, side, d, p, spec.seed) for side, d in (("out", d_out), ("in", d_in)))
        return Kronecker(p_out, p_in, slice(0, spec.size))
    p_out = side_matrix(name, "out", d_out, spec.size, spec.seed)
    p_in = side_matrix(name, "in", d_in, spec.size, spec.seed)
    return Kronecker(p_out, p_in, slice(start, start + p_out.shape[0] * p_in.shape[0]))


def side_matrix(name: str, side: str, dim: int, size: int, seed: int) -> torch.Tensor:
    """A side that is not wider than the projection is kept whole: fewer numbers to store, and exact."""
    return torch.eye(dim) if dim <= size else signs(name, side, dim, size, seed)


def signs(name: str, side: str, dim: int, size: int, seed: int) -> torch.Tensor:
    """[size, dim] of +-1/sqrt(size), so that E[P^T P] = I; the first rows' signs do not depend on `size`."""
    words = (dim + 63) // 64  # whole words a row
    raw = np.random.Philox(key=_key(seed, name, side)).random_raw(size * words).astype("<u8").reshape(size, words)
    bits = np.unpackbits(raw.view(np.uint8), axis=1, bitorder="little")[:, :dim]
    matrix: torch.Tensor = torch.from_numpy(bits.astype(np.float32) * 2 - 1) / size**0.5
    return matrix


def _key(seed: int, name: str, side: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}/{side}".encode()).digest()[:16], "little")


@dataclass
class Kronecker:
    """P_out G P_in^T, each factor projected before the outer product (never forms G)."""

    p_out: torch.Tensor  # [p_out, d_out]
    p_in: torch.Tensor  # [p_in, d_in]
    place: slice

    def __post_init__(self) -> None:
        """A side that is kept whole is not multiplied by."""
        self._whole_out, self._whole_in = _is_identity(self.p_out), _is_identity(self.p_in)

    def to(self, device: torch.device) -> Kronecker:
        """The same on a device."""
        return Kronecker(self.p_out.to(device), self.p_in.to(device), self.place)

    def keep(self, acts: torch.Tensor) -> torch.Tensor:
        """[batch, seq, p_in]"""
        return acts if self._whole_in else acts @ self.p_in.to(acts).T

    def project(self, kept: torch.Tensor, grads: torch.Tensor) -> torch.Tensor:
        """sum_s (P_out d_s)(P_in a_s)^T"""
        short = grads if self._whole_out else grads @ self.p_out.to(grads).T  # [batch, seq, p_out]
        return (short.transpose(1, 2) @ kept).flatten(1)

    def nudge(self, acts: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
        """P_out^T D P_in a_s: a weight of rank p, never formed."""
        blocks = directions.to(acts).unflatten(1, (self.p_out.shape[0], self.p_in.shape[0]))
        nudged: torch.Tensor = (self.keep(acts) @ blocks.transpose(1, 2)) @ self.p_out.to(acts)
        return nudged


def _is_identity(matrix: torch.Tensor) -> bool:
    return matrix.shape[0] == matrix.shape[1] and torch.equal(matrix, torch.eye(len(matrix)).to(matrix))


class CountSketch:
    """Bucket and sign of every coordinate of G from a counter hash; G is formed a sample at a time."""

    def __init__(self, name: str, d_out: int, d_in: int, size: int, seed: int) -> None:
        self.place = slice(0, size)
        self.shape, self.size = (d_out, d_in), size
        key = _key(seed, name, "count")
        counter = torch.arange(d_out * d_in, dtype=torch.int64)
        high = _hash32(counter, key & MASK, (key >> 32) & MASK)
        low = _hash32(counter, (key >> 64) & MASK, (key >> 96) & MASK)
        self.buckets = ((high * size) >> 32).to(torch.int32)  # Lemire's range reduction: 32 + 24 bits fit in 63
        self.signs = ((low >> 31) * 2 - 1).to(torch.int8)

    def to(self, device: torch.device) -> CountSketch:
        """The same on a device."""
        self.buckets, self.signs = self.buckets.to(device), self.signs.to(device)
        return self

    def keep(self, acts: torch.Tensor) -> torch.Tensor:
        """All of it."""
        return acts

    def project(self, kept: torch.Tensor, grads: torch.Tensor) -> torch.Tensor:
        """[batch, K]"""
        found = torch.zeros(len(grads), self.size, dtype=grads.dtype, device=grads.device)
        signs = self.signs.to(grads.dtype)
        for row, (a, d) in enumerate(zip(kept, grads, strict=True)):
            found[row].index_add_(0, self.buckets, (d.T @ a).flatten() * signs)
        return found

    def nudge(self, acts: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
        """S^T(D) a_s"""
        weights = (directions.to(acts)[:, self.buckets] * self.signs.to(acts.dtype)).unflatten(1, self.shape)
        nudged: torch.Tensor = acts @ weights.transpose(1, 2)
        return nudged


def _hash32(counter: torch.Tensor, first: int, second: int) -> torch.Tensor:
    """A 32-bit integer hash of counters below 2^31 under two 32-bit keys, in int64 arithmetic that no device rounds.

    Two rounds of the xor-shift-multiply finaliser of MurmurHash3, a key before each. The multipliers are split so
    that no product passes 63 bits.
    """
    x = counter
    for key in (first, second):
        x = (x ^ key) & MASK
        for shift, multiplier in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            x = x ^ (x >> shift)
            x = (x * (multiplier & 0xFFFF) + (((x * (multiplier >> 16)) & 0xFFFF) << 16)) & MASK
        x = x ^ (x >> 16)
    return x

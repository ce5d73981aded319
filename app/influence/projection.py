"""Kronecker random projection of a module's gradient: S(G) = P_out G P_in^T (LoGra; METHODS section 2).

The matrices are Rademacher signs from the Philox counter generator, keyed by seed, module name and side: integers
alone decide them, so every machine and device makes the same numbers and nothing is stored or shipped.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import torch

from app.influence.errors import SpecError


@dataclass(frozen=True)
class ProjectionSpec:
    """kind: only "kronecker" so far; size: p, the rows of each side's matrix; seed: of all the matrices."""

    kind: Literal["kronecker"] = "kronecker"
    size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind != "kronecker":
            raise SpecError(f"projection '{self.kind}' is not available; use 'kronecker'", field="projection.kind")
        if not 1 <= self.size <= 512:
            raise SpecError("the size of a kronecker projection is between 1 and 512", field="projection.size")


@cache
def signs(name: str, side: str, dim: int, size: int, seed: int) -> torch.Tensor:
    """[size, dim] of +-1/sqrt(size), so E[P^T P] = I; the identity where the side is no wider than `size`.

    A side that is not wider than the projection is kept whole: fewer numbers to store, and exact.
    """
    if dim <= size:
        return torch.eye(dim)
    key = int.from_bytes(hashlib.sha256(f"{seed}/{name}/{side}".encode()).digest()[:16], "little")
    words = (dim + 63) // 64  # whole words a row, so that the first rows do not depend on `size`
    raw = np.random.Philox(key=key).random_raw(size * words).astype("<u8").reshape(size, words)
    bits = np.unpackbits(raw.view(np.uint8), axis=1, bitorder="little")[:, :dim]
    matrix: torch.Tensor = torch.from_numpy(bits.astype(np.float32) * 2 - 1) / size**0.5
    return matrix


@dataclass(frozen=True)
class Block:
    """The projection of one module and its place in the concatenated vector."""

    p_out: torch.Tensor  # [p_out, d_out]
    p_in: torch.Tensor  # [p_in, d_in]
    start: int

    @property
    def width(self) -> int:
        """Numbers that the module adds to the vector."""
        return int(self.p_out.shape[0] * self.p_in.shape[0])

    def project(self, acts: torch.Tensor, grads: torch.Tensor) -> torch.Tensor:
        """sum_s (P_out d_s)(P_in a_s)^T of each sample.

        Args:
            acts: [batch, seq, p_in], already projected in the forward pass.
            grads: [batch, seq, d_out].

        Returns:
            [batch, p_out * p_in]
        """
        return torch.einsum("bso,bsi->boi", grads @ self.p_out.T, acts).flatten(1)

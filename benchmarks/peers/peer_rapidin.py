"""RapidIn's published procedure, written anew: a row at a time, its whole gradient formed, shuffled, summed, filed.

The gradient of every linear layer of the blocks is laid out as one vector, padded to a multiple of K, and shuffled
`SHUFFLES` times, rows and columns of a matrix in turn; then random signs, sums of D / K neighbours, division by the
norm, and one file a row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from exchange import IGNORED, Sample, the_job
from torch import nn
from transformers import AutoModelForCausalLM

K = 65536
SHUFFLES = 20


class Compressor:
    """Permutations and signs, drawn once."""

    def __init__(self, length: int) -> None:
        self.length = -(-length // K) * K
        generator = torch.Generator().manual_seed(0)
        self.signs = torch.randint(0, 2, (self.length,), generator=generator, dtype=torch.int8) * 2 - 1
        sizes = [(K, self.length // K) if number % 2 else (self.length // K, K) for number in range(SHUFFLES)]
        self.turns = [(size, torch.randperm(size[0], generator=generator)) for size in sizes]

    def __call__(self, vector: torch.Tensor) -> torch.Tensor:
        """[D] to [K]"""
        whole = nn.functional.pad(vector, (0, self.length - len(vector)))
        for (rows, columns), order in self.turns:
            whole = whole.view(rows, columns)[order].T.reshape(-1)
        summed = (whole * self.signs).view(K, -1).sum(1)
        return summed / summed.norm()


def main() -> None:
    """File every row; then, unless only the cost is asked for (`build`), read them all for each query."""
    job = the_job()
    files = job.folder / "rows"
    files.mkdir(exist_ok=True)
    model: Any = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32).eval()
    model.requires_grad_(False)
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear) and m is not model.lm_head]
    for weight in weights:
        weight.requires_grad_(True)
    compress = Compressor(sum(weight.numel() for weight in weights))

    def gradient(sample: Sample) -> torch.Tensor:
        logits = model(input_ids=torch.tensor([sample.ids]), use_cache=False).logits[0, :-1].float()
        loss = nn.functional.cross_entropy(logits, torch.tensor(sample.labels[1:]), ignore_index=IGNORED)
        return compress(torch.cat([part.flatten() for part in torch.autograd.grad(loss, weights)]))

    with job.collecting():
        for at, row in enumerate(job.rows):
            np.save(files / f"{at}.npy", gradient(row).half().numpy())
    size = (files / "0.npy").stat().st_size
    if job.method == "build":
        job.finish(bytes_per_row=size)
        return
    kept = torch.stack([torch.from_numpy(np.load(files / f"{at}.npy")) for at in range(len(job.rows))]).float()
    job.finish(torch.stack([kept @ gradient(query) for query in job.queries]), bytes_per_row=size)


if __name__ == "__main__":
    main()

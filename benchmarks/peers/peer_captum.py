"""captum's TracInCP on a job: inner products of whole gradients at one checkpoint, an oracle for `exact, dot`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from captum.influence import TracInCP
from exchange import IGNORED, padded, the_job
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForCausalLM


class Logits(nn.Module):
    """What foretells each token, [batch, vocabulary, seq - 1], as captum's losses want it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Of sequences [batch, seq]."""
        return self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].transpose(1, 2)


def main() -> None:
    """Score all pairs; captum sums over targets, of which the means are made afterwards."""
    job = the_job()
    model: Any = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32).eval()
    layers = [
        f"model.{name}" for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not model.lm_head
    ]
    data = []
    for samples in (job.rows, job.queries):
        arrays = {name: torch.from_numpy(array) for name, array in padded(samples).items()}
        data.append(TensorDataset(arrays["input_ids"], arrays["attention_mask"], arrays["labels"][:, 1:]))
    oracle = TracInCP(
        Logits(model),
        DataLoader(data[0], batch_size=16),
        checkpoints=["now"],
        checkpoints_load_func=lambda module, checkpoint: 1.0,  # it is loaded, and its weight is one
        layers=layers,
        loss_fn=nn.CrossEntropyLoss(reduction="sum", ignore_index=IGNORED),
        sample_wise_grads_per_batch=True,
    )
    with job.collecting():
        scores = oracle.influence(DataLoader(data[1], batch_size=16)).numpy()
    many = [np.array([sample.targets for sample in samples]) for samples in (job.queries, job.rows)]
    job.finish(scores / many[0][:, None] / many[1][None, :])


if __name__ == "__main__":
    main()

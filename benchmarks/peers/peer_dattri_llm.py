"""dattri-llm on a job, on the linear layers of the blocks: `TracIn`, `GradCos` or `EKFAC`, by its defaults."""

from __future__ import annotations

import shutil
from typing import Any

import torch
from dattri_llm import (
    AttributionArguments,
    AttributionTask,
    EKFACAttributor,
    HookManagerConfig,
    TracInAttributor,
    hash_sample,
)
from exchange import IGNORED, padded, the_job
from torch import nn
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM

BATCH = 16


class Samples(Dataset):
    """Padded sequences."""

    def __init__(self, samples: Any) -> None:
        self.arrays = {name: torch.from_numpy(array) for name, array in padded(samples).items()}

    def __len__(self) -> int:
        return len(self.arrays["labels"])

    def __getitem__(self, at: int) -> dict[str, torch.Tensor]:
        return {name: array[at] for name, array in self.arrays.items()}


def loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The sum over rows of the mean over targets."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    wanted = batch["labels"][:, 1:]
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), wanted, reduction="none", ignore_index=IGNORED)
    return (losses.sum(1) / (wanted != IGNORED).sum(1)).sum()


def main() -> None:
    """Score all pairs."""
    job = the_job()
    out = job.folder / "dattri-llm"
    shutil.rmtree(out, ignore_errors=True)
    model: Any = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32).eval()
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not model.lm_head]
    arguments = AttributionArguments(
        output_dir=str(out), use_cpu=True, per_device_train_batch_size=BATCH, per_device_eval_batch_size=BATCH
    )
    kind: Any = EKFACAttributor if job.method == "EKFAC" else TracInAttributor
    attributor = kind(arguments, task=AttributionTask(loss, model))
    more = {"normalized_grad": True} if job.method == "GradCos" else {}
    config = HookManagerConfig(hook_types=dict.fromkeys(names, "linear_io"))
    rows, queries = Samples(job.rows), Samples(job.queries)
    with job.collecting():
        found = attributor.attribute(rows, queries, hook_config=config, **more)
    ids, matrix = found.agnostic_matrix()
    order, asked = (
        [known[hash_sample({name: sample[name] for name in ("input_ids", "attention_mask")})] for sample in samples]
        for known, samples in (
            ({one: at for at, one in enumerate(ids)}, [rows[at] for at in range(len(rows))]),
            ({one: at for at, one in enumerate(found.test_ids)}, [queries[at] for at in range(len(queries))]),
        )
    )
    job.finish(matrix[order][:, asked].T)


if __name__ == "__main__":
    main()

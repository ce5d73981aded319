"""dattri's LoGra on a job. The method is its Hessian: `Identity`, or `eFIM` damped by the option `damping`."""

from __future__ import annotations

from typing import Any

import torch
from dattri.algorithm.logra import LoGraAttributor
from dattri.task import AttributionTask
from exchange import IGNORED, padded, the_job
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

BATCH = 16


def loss(model: Any, batch: dict[str, torch.Tensor], device: str) -> torch.Tensor:
    """The sum over rows of the mean over targets."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits[:, :-1]
    wanted = batch["labels"][:, 1:]
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), wanted, reduction="none", ignore_index=IGNORED)
    return (losses.sum(1) / (wanted != IGNORED).sum(1)).sum()


def main() -> None:
    """Cache the rows' gradients (once before, since the first pass compiles), then score."""
    job = the_job()
    model: Any = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32).eval()
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not model.lm_head]
    loaders = []
    for samples in (job.rows, job.queries):
        arrays = {name: torch.from_numpy(array) for name, array in padded(samples).items()}
        data: Any = [{name: array[at] for name, array in arrays.items()} for at in range(len(samples))]
        loaders.append(DataLoader(data, batch_size=BATCH, shuffle=False))
    task = AttributionTask(loss_func=loss, model=model, checkpoints=[model.state_dict()])
    settings: dict[str, Any] = {
        "layer_names": names,
        "hessian": job.method,
        "damping": job.options.get("damping"),
        "proj_dim": 256,
        "offload": "cpu",
    }
    LoGraAttributor(task, **settings).cache(loaders[0])
    attributor = LoGraAttributor(task, **settings)
    with job.collecting():
        attributor.cache(loaders[0])
    job.finish(attributor.attribute(*loaders).T)


if __name__ == "__main__":
    main()

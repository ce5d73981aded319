"""TRAK on a job: projected gradients of a margin, preconditioned by their Gram matrix; one checkpoint.

Options of a job: `size` of the projection, which has to be smaller than the number of rows.
"""

from __future__ import annotations

import shutil
from typing import Any

import torch
from exchange import IGNORED, padded, the_job
from torch import nn
from torch.func import functional_call
from trak import TRAKer
from trak.modelout_functions import AbstractModelOutput
from transformers import AutoModelForCausalLM

LAMBDA = 1e-3


class Margin(AbstractModelOutput):
    """The mean over targets of the logit less the log-sum of all others."""

    def __init__(self) -> None:
        super().__init__()

    @staticmethod
    def get_output(model: Any, weights: Any, buffers: Any, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Of one sequence [seq]."""
        logits = functional_call(model, (weights, buffers), (), {"input_ids": ids[None], "use_cache": False}).logits
        logits, wanted = logits[0, :-1], labels[1:]
        counts = wanted != IGNORED
        own = wanted.clamp_min(0)[:, None]
        others = logits.scatter(1, own, torch.full_like(logits[:, :1], -torch.inf)).logsumexp(1)
        return ((logits.gather(1, own)[:, 0] - others) * counts).sum() / counts.sum()

    def get_out_to_loss_grad(self, model: Any, weights: Any, buffers: Any, batch: Any) -> torch.Tensor:
        """1 - p of each sequence, [batch, 1]."""
        ids, labels = batch
        logits = functional_call(model, (weights, buffers), (), {"input_ids": ids, "use_cache": False}).logits[:, :-1]
        wanted = labels[:, 1:]
        counts = wanted != IGNORED
        p = logits.softmax(-1).gather(2, wanted.clamp_min(0)[..., None])[..., 0]
        return 1 - (p * counts).sum(1, keepdim=True).detach() / counts.sum(1, keepdim=True)


def main() -> None:
    """Featurise the rows, score the queries."""
    job = the_job()
    out = job.folder / "trak"
    shutil.rmtree(out, ignore_errors=True)
    model: Any = AutoModelForCausalLM.from_pretrained(
        job.model, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    linear = [
        f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not model.lm_head
    ]
    traker = TRAKer(
        model,
        Margin(),
        train_set_size=len(job.rows),
        save_dir=str(out),
        device="cpu",
        proj_dim=job.options.get("size", 128),
        use_half_precision=False,
        grad_wrt=linear,
        lambda_reg=LAMBDA,
    )

    def parts(samples: Any) -> Any:
        arrays = padded(samples)  # right padding, which a causal model never sees
        ids, labels = (torch.from_numpy(arrays[name]) for name in ("input_ids", "labels"))
        return zip(ids.split(16), labels.split(16), strict=True)

    traker.load_checkpoint(model.state_dict(), model_id=0)
    with job.collecting():
        for batch in parts(job.rows):
            traker.featurize(batch, num_samples=len(batch[0]))
        traker.finalize_features()
    traker.start_scoring_checkpoint("queries", model.state_dict(), model_id=0, num_targets=len(job.queries))
    for batch in parts(job.queries):
        traker.score(batch, num_samples=len(batch[0]))
    job.finish(traker.finalize_scores("queries").T)


if __name__ == "__main__":
    main()

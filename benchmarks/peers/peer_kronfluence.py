"""kronfluence on a job: the method is one of its strategies (`ekfac`, `kfac`, `diagonal`, `identity`).

Option `reduction` of a job: a row's loss is the `mean` over its targets, as in training, or their `sum`.
"""

from __future__ import annotations

import shutil
from typing import Any

import torch
from exchange import IGNORED, Sample, the_job
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from torch import nn
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM

Batch = dict[str, torch.Tensor]


class Samples(Dataset):
    """Sequences, all padded to the length of the longest."""

    def __init__(self, samples: list[Sample], length: int) -> None:
        self.samples, self.length = samples, length

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, at: int) -> Batch:
        sample = self.samples[at]
        rest = self.length - len(sample.ids)
        return {
            "input_ids": torch.tensor(sample.ids + [0] * rest),
            "labels": torch.tensor(sample.labels + [IGNORED] * rest),
            "attention_mask": torch.tensor([1] * len(sample.ids) + [0] * rest),
        }


class Answers(Task):
    """The loss of the targets, summed over rows; every linear layer but the head."""

    def __init__(self, modules: list[str], mean: bool) -> None:
        self.modules, self.mean = modules, mean

    def compute_train_loss(self, batch: Batch, model: nn.Module, sample: bool = False) -> torch.Tensor:
        """With `sample`, of tokens that the model draws in the targets' places."""
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].float()
        labels = batch["labels"][:, 1:]
        wanted = labels != IGNORED
        if sample:
            with torch.no_grad():
                drawn = torch.multinomial(logits.flatten(0, 1).softmax(-1), 1).view_as(labels)
            labels = torch.where(wanted, drawn, labels)
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED)
        return (losses.sum(1) / wanted.sum(1) if self.mean else losses.sum(1)).sum()

    def compute_measurement(self, batch: Batch, model: nn.Module) -> torch.Tensor:
        """The queries' loss."""
        return self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self) -> list[str]:
        """Those of the blocks."""
        return self.modules

    def get_attention_mask(self, batch: Batch) -> torch.Tensor:
        """[batch, seq]"""
        return batch["attention_mask"]


def main() -> None:
    """Fit factors, score all pairs."""
    job = the_job()
    out = job.folder / "kronfluence"
    shutil.rmtree(out, ignore_errors=True)
    model: Any = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32).eval()
    modules = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not model.lm_head]
    task = Answers(modules, job.options.get("reduction", "mean") == "mean")
    length = max(len(sample.ids) for sample in (*job.rows, *job.queries))
    rows, queries = Samples(job.rows, length), Samples(job.queries, length)
    many = max(1, job.budget // length)
    torch.manual_seed(0)
    analyzer = Analyzer("headwater", prepare_model(model, task), task, cpu=True, output_dir=str(out))
    with job.collecting():
        arguments = FactorArguments(strategy=job.method)
        analyzer.fit_all_factors("factors", rows, per_device_batch_size=many, factor_args=arguments)
        analyzer.compute_pairwise_scores(
            "scores",
            "factors",
            queries,
            rows,
            per_device_query_batch_size=len(queries),
            per_device_train_batch_size=many,
            score_args=ScoreArguments(damping_factor=job.options.get("damping")),
        )
    scores = analyzer.load_pairwise_scores("scores")["all_modules"]
    job.finish(scores)


if __name__ == "__main__":
    main()

"""bergson's pipelines on a job: `trackstar` and `ekfac` as its command line runs them, `build` for cost.

Options of a job change fields of its IndexConfig, such as loss_reduction.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from bergson.build import build
from bergson.cli.trackstar import trackstar
from bergson.collector.collector import CollectorComputer
from bergson.config.config import (
    DataConfig,
    HessianConfig,
    HessianPipelineConfig,
    IndexConfig,
    PreprocessConfig,
    QuerySetConfig,
    ScoreConfig,
    TrackstarConfig,
)
from bergson.data import load_scores
from bergson.hessians.pipeline import hessian_pipeline
from bergson.query.attributor import Attributor
from bergson.utils.worker_utils import setup_model_and_peft
from exchange import Job, Sample, the_job


def dataset(file: Path, samples: list[Sample]) -> str:
    """The samples as bergson reads a dataset that was tokenized before."""
    lines = (json.dumps({"input_ids": s.ids, "labels": s.labels, "length": len(s.ids)}) for s in samples)
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(file)


def main() -> None:
    """Run the job's method."""
    job = the_job()
    run = job.folder / "bergson"
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir()
    rows = DataConfig(dataset=dataset(run / "rows.jsonl", job.rows))
    queries = QuerySetConfig(dataset=dataset(run / "queries.jsonl", job.queries))
    settings: dict[str, Any] = {"projection_dim": 16, "token_batch_size": job.budget, **job.options}
    if job.method == "ekfac":
        settings["projection_dim"] = 0
    config = IndexConfig(run_path=str(run / "run"), model=job.model, data=rows, **settings)
    if job.method == "build":
        cost(job, config)
        return
    if job.method == "trackstar":
        trackstar(config, TrackstarConfig(query=queries, preprocess_cfg=PreprocessConfig(unit_normalize=True)))
    else:
        hessian_pipeline(
            config,
            HessianConfig(method="kfac", ev_correction=True),
            ScoreConfig(),
            PreprocessConfig(),
            HessianPipelineConfig(query=queries),
        )
    found = load_scores(run / "run" / "scores")
    job.finish(torch.as_tensor(found[:]).float().reshape(len(job.rows), len(job.queries)).T)


def cost(job: Job, config: IndexConfig) -> None:
    """The loop of `bergson build`, the index's size, and queries against it in memory."""
    loop = CollectorComputer.run_with_collector_hooks

    def timed(self: Any, desc: str | None = None) -> None:
        with job.collecting():
            loop(self, desc)

    CollectorComputer.run_with_collector_hooks = timed
    build(config, PreprocessConfig())
    size = (Path(config.run_path) / "gradients.bin").stat().st_size
    if job.latency:
        model, _ = setup_model_and_peft(config)
        attributor = Attributor(config.run_path, unit_norm=True)
        for sample in job.queries[: job.latency]:
            ids, labels = torch.tensor([sample.ids]), torch.tensor([sample.labels])
            with job.query(), attributor.trace(model.base_model, 10):
                model(input_ids=ids, labels=labels).loss.backward()
            model.zero_grad()
    job.finish(bytes_per_row=size / len(job.rows))


if __name__ == "__main__":
    main()

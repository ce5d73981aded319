"""What collecting and asking cost, beside one plain forward and backward pass of the same model on the same tokens.

    python benchmarks/speed.py --model .headwater/models/SmolLM2-135M-Instruct --adapter demo/adapters/late

The plain pass is what a training step does: Hugging Face's own loss over the whole sequence, gradients of the adapter's
weights (or of every linear weight where there is no adapter), no optimiser. "lean" is the same with logits at the
response tokens only, which is a trick of ours that a trainer could use too; "bound" is what no collecting can be faster
than: a forward pass and a backward pass to the first attributed modules, and no gradient of any weight. Passes are
interleaved batch by batch, so that a noisy machine slows all alike; memory is the peak of a process of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from app.influence.building import batches, build
from app.influence.corpus import Encoder, Example, Message, Row, read_rows
from app.influence.gradients import hooked, target_losses
from app.influence.index import IndexSpec, open_index
from app.influence.models import Checkpoint, LoadedModel, ModelSpec, load
from app.influence.projection import ProjectionSpec
from app.influence.retrieval import Options, Query, influence

ROOT = Path(__file__).resolve().parents[1]


def weights(model: LoadedModel) -> list[torch.nn.Parameter]:
    """What a trainer would train."""
    return [module.weight for module in model.activate(model.checkpoints[0]).values()]  # type: ignore[misc]


def plain(model: LoadedModel, examples: Sequence[Example], lean: bool = False) -> None:
    """One forward and backward pass of a training step."""
    trained = weights(model)
    for weight in trained:
        weight.requires_grad_(True)
    if lean:
        torch.cat(target_losses(model, examples)).mean().backward()
    else:
        length = max(len(example.ids) for example in examples)
        ids = torch.zeros(len(examples), length, dtype=torch.long)
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        for row, example in enumerate(examples):
            many = len(example.ids)
            ids[row, :many] = torch.tensor(example.ids)
            mask[row, :many] = 1
            labels[row, :many] = torch.where(torch.tensor(example.targets), ids[row, :many], -100)
        model.model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
    for weight in trained:
        weight.grad = None
        weight.requires_grad_(False)


def bound(model: LoadedModel, examples: Sequence[Example]) -> None:
    """Forward and backward as collecting does it, but nothing is collected."""
    modules = model.activate(model.checkpoints[0])
    with torch.enable_grad(), hooked(model, modules, lambda name, acts, output: None):
        torch.cat(target_losses(model, examples)).sum().backward()


def timed(work: Callable[[], object]) -> float:
    started = time.process_time()  # CPU seconds: what else runs on the machine is not counted
    work()
    return time.process_time() - started


def collection(model: LoadedModel, rows: list[Row], spec: IndexSpec) -> dict[str, float]:
    """Tokens a second of a whole build, batch by batch beside the plain pass, and bytes a row."""
    encoder = Encoder(model.tokenizer, spec.template, spec.max_length)
    examples = [encoder.encode(row) for row in rows]
    seconds = {"build": 0.0, "plain": 0.0, "lean": 0.0, "bound": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index"
        steps = build(path, model, rows, spec)
        plain(model, examples[:4])
        for batch in batches(examples, spec.token_budget):
            part = [examples[i] for i in batch]
            seconds["build"] += timed(lambda: next(steps))
            seconds["plain"] += timed(lambda part=part: plain(model, part))  # type: ignore[misc]
            seconds["lean"] += timed(lambda part=part: plain(model, part, lean=True))  # type: ignore[misc]
            seconds["bound"] += timed(lambda part=part: bound(model, part))  # type: ignore[misc]
        seconds["build"] += timed(lambda: list(steps))  # writing the shard and the manifest
        manifest = open_index(path).manifest
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        kept = sum(file.stat().st_size for file in (path / "shards").glob("*.[fs]*"))
    tokens = sum(len(example.ids) for example in examples)
    return {
        **{f"{name}_tokens_per_second": tokens / taken for name, taken in seconds.items()},
        "build_of_plain": seconds["plain"] / seconds["build"],
        "build_of_lean": seconds["lean"] / seconds["build"],
        "build_of_bound": seconds["bound"] / seconds["build"],
        "width": manifest.width,
        "bytes_per_row": kept / len(rows),
        "bytes_of_2k": kept / len(rows) / (2 * manifest.width * len(model.checkpoints)),
        "bytes_of_2k_with_json": size / len(rows) / (2 * manifest.width * len(model.checkpoints)),
    }


def query(model: LoadedModel, rows: list[Row], spec: IndexSpec, tokens: int, repeats: int) -> dict[str, float]:
    """Seconds of a query of so many generated tokens, top 10, beside the plain pass of that sequence."""
    by_id = {row.id: row for row in rows}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index"
        list(build(path, model, rows, spec))
        index = open_index(path)
        text = " ".join(row.response for row in rows)
        ids = model.tokenizer(text, add_special_tokens=False)["input_ids"][: tokens + 8]
        asked = (Message("user", rows[0].prompt),)
        encoder = Encoder(model.tokenizer, spec.template, spec.max_length)
        generation = next(
            cut
            for many in range(1, len(ids) + 1)
            if len(encoder.encode_query(asked, cut := model.tokenizer.decode(ids[:many]))[0].positions) == tokens
        )
        example, _ = encoder.encode_query(asked, generation)
        found: dict[str, list[float]] = {"plain": [], "none": [], "query": []}
        for _ in range(repeats):
            found["plain"].append(timed(lambda: plain(model, [example])))
            for kind in ("none", "query"):
                options = Options(top_k=10, tokens=kind)  # type: ignore[arg-type]
                work = lambda o=options: influence(model, index, [Query(asked, generation)], o, by_id.__getitem__)  # noqa: E731
                found[kind].append(timed(work))
    one = {name: statistics.median(values) for name, values in found.items()}
    many = len(model.checkpoints)
    return {
        "sequence_tokens": len(example.ids),
        **{f"{name}_seconds": value for name, value in one.items()},
        "without_token_scores": one["none"] / one["plain"] / many,
        "with_token_scores": one["query"] / one["plain"] / many,
    }


def peak(mode: str, arguments: argparse.Namespace) -> float:
    """MiB at the peak of a process that only collects, or only does plain passes."""
    command = [sys.executable, __file__, "--only", mode, "--model", str(arguments.model), "--rows", str(arguments.rows)]
    command += ["--threads", str(arguments.threads), "--data", str(arguments.data), "--budget", str(arguments.budget)]
    if arguments.adapter:
        command += ["--adapter", str(arguments.adapter)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout.split()[-1])


def only(mode: str, model: LoadedModel, rows: list[Row], spec: IndexSpec) -> None:
    if mode == "build":
        with tempfile.TemporaryDirectory() as folder:
            list(build(Path(folder) / "index", model, rows, spec))
    elif mode == "plain":
        encoder = Encoder(model.tokenizer, spec.template, spec.max_length)
        examples = [encoder.encode(row) for row in rows]
        for batch in batches(examples, spec.token_budget):
            plain(model, [examples[i] for i in batch])
    # not getrusage: its ru_maxrss begins with the size of the parent that forked us
    status = Path("/proc/self/status").read_text(encoding="ascii")
    print(int(status.partition("VmHWM:")[2].split()[0]) / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / ".headwater/models/SmolLM2-135M-Instruct")
    parser.add_argument("--adapter", type=Path, default=ROOT / "demo/adapters/late")
    parser.add_argument("--data", type=Path, default=ROOT / "demo/corpus.jsonl")
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--budget", type=int, default=1024, help="padded tokens a batch")
    parser.add_argument("--tokens", type=int, default=32, help="generated tokens of the query")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--only", choices=["build", "plain", "load"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = load(ModelSpec(arguments.model, checkpoints=(Checkpoint("one", arguments.adapter),)))
    rows = list(islice(read_rows(arguments.data), arguments.rows))
    spec = IndexSpec(ProjectionSpec(), token_budget=arguments.budget)
    if arguments.only:
        only(arguments.only, model, rows, spec)
        return
    figures: dict[str, Any] = {
        "settings": {"rows": len(rows), "threads": arguments.threads, "budget": arguments.budget}
    }
    figures["collection"] = collection(model, rows, spec)
    figures["query"] = query(model, rows, spec, arguments.tokens, arguments.repeats)
    memory = {mode: peak(mode, arguments) for mode in ("plain", "build", "load")}
    figures["memory"] = {**{f"{mode}_mib": value for mode, value in memory.items()}}
    figures["memory"]["build_of_plain"] = memory["build"] / memory["plain"]
    table = Table("figure", "measured", "aim", title=f"{len(rows)} rows, {arguments.threads} thread(s), kronecker 16")
    aims = {
        ("collection", "build_of_plain"): "at least 0.8",
        ("memory", "build_of_plain"): "at most 1.5",
        ("query", "without_token_scores"): "at most 2",
        ("query", "with_token_scores"): "at most 12",
        ("collection", "bytes_of_2k"): "at most 1.05",
    }
    for part in ("collection", "query", "memory"):
        for name, value in figures[part].items():
            table.add_row(f"{part}: {name.replace('_', ' ')}", f"{value:,.3g}", aims.get((part, name), ""))
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""What a build would cost: computed from the model and the rows, and measured on a few batches of them."""

import json
import resource
import struct
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from app.cli.base import checkpoint, fail, human
from app.cli.local import quietly
from app.influence.building import NUMBERS, batches
from app.influence.corpus import Example, Row, read_rows
from app.influence.errors import RowError
from app.influence.gradients import gradients, plan_for
from app.influence.index import IndexSpec
from app.influence.models import Checkpoint, LoadedModel, ModelSpec, load
from app.influence.projection import ProjectionSpec

MEASURED_S = 20.0  # what measuring may take, beyond loading
MOST_BATCHES = 8
WARMED_UP = 1  # the first batch brings kernels and buffers
BYTES = {"F64": 8, "F32": 4, "I64": 8, "I32": 4, "F16": 2, "BF16": 2, "U8": 1, "I8": 1, "BOOL": 1}


@dataclass(frozen=True)
class Asked:
    """The build that is thought of."""

    model: Path
    rows: Path
    checkpoints: tuple[str, ...]
    size: int
    max_length: int
    device: str
    threads: int


def estimate_build(asked: Asked, measured: bool) -> dict[str, Any]:
    """Rows, tokens, size on disk, memory and time; `told` has them in words, each with how it is known."""
    if asked.threads:
        torch.set_num_threads(asked.threads)
    with quietly():
        rows = list(read_rows(asked.rows))
        if not measured:
            return _computed(asked, len(rows))
        named = [checkpoint(one) for one in asked.checkpoints]
        run = tuple(Checkpoint(one["name"], Path(one.get("adapter") or "")) for one in named)
        model = load(ModelSpec(asked.model, checkpoints=run, device=asked.device))
        spec = IndexSpec(projection=ProjectionSpec(size=asked.size), max_length=asked.max_length)
        examples = _encoded(model, rows, spec)
        if not examples:
            fail("no row has a response token within --max-length")
        return _measured(model, spec, examples, len(rows))


def _encoded(model: LoadedModel, rows: Sequence[Row], spec: IndexSpec) -> list[Example]:
    """As a build encodes them; a row without a token to predict is kept there without a gradient."""
    encoder = model.encoder(spec.template, spec.max_length)
    found = []
    for row in rows:
        with suppress(RowError):
            found.append(encoder.encode(row))
    return found


def _computed(asked: Asked, rows: int) -> dict[str, Any]:
    """From the files alone: weights are read in single precision, tokens are not counted."""
    weights = sum(_numbers(path) for path in sorted(asked.model.glob("*.safetensors")))
    if not weights:
        fail(f"there are no weights (*.safetensors) in {asked.model}")
    many = max(len(asked.checkpoints), 1)
    told = {
        "rows": f"{rows:,}",
        "memory": f"{human(weights * 4)} for the weights, and what a batch takes (computed)",
        "time": "not known without running a batch: leave --computed out",
    }
    return {"rows": rows, "checkpoints": many, "weights_bytes": weights * 4, "how": "computed", "told": told}


def _numbers(path: Path) -> int:
    """How many numbers a safetensors file holds, by its header."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    spans = [(one["data_offsets"], one["dtype"]) for name, one in header.items() if name != "__metadata__"]
    return sum((end - start) // BYTES.get(kind, 4) for (start, end), kind in spans)


def _measured(model: LoadedModel, spec: IndexSpec, examples: Sequence[Example], rows: int) -> dict[str, Any]:
    """By running batches from the longest down to the shortest, so that the memory is that of the worst."""
    plan = plan_for(model, spec.projection, spec.normalisation)
    many, tokens = len(model.checkpoints), sum(len(one.ids) for one in examples)
    chosen = batches(examples, spec.token_budget, max(1, NUMBERS // plan.width))
    chosen.sort(key=lambda batch: -max(len(examples[i].ids) for i in batch))
    step = max(1, len(chosen) // MOST_BATCHES)
    began, seen, spent = time.perf_counter(), 0, 0.0
    for number, batch in enumerate([chosen[0]] * WARMED_UP + chosen[::step]):
        at = time.perf_counter()
        gradients(model, model.checkpoints[0], plan, [examples[i] for i in batch])
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        if number >= WARMED_UP:
            spent += time.perf_counter() - at
            seen += sum(len(examples[i].ids) for i in batch)
        if seen and time.perf_counter() - began > MEASURED_S:
            break
    rate = seen / spent  # tokens a second, of one checkpoint
    seconds = many * tokens / rate
    vectors = rows * many * plan.width * 2  # half precision
    shard = min(spec.shard_rows, rows) * many * plan.width * 4  # a shard is collected in single precision
    peak = _peak() + shard
    on_device = torch.cuda.max_memory_allocated(model.device) if model.device.type == "cuda" else 0
    told = {
        "rows": f"{rows:,}, {tokens:,} tokens, {many} checkpoints, {len(model.attributed)} modules",
        "index": f"{human(vectors)} on disk (computed: {plan.width:,} numbers a row and checkpoint)",
        "memory": f"{human(peak)} (measured on the longest rows, and a shard)",
        "time": f"{_duration(seconds)} (measured: {rate:,.0f} tokens/s on {seen:,} tokens)",
    }
    if on_device:
        told["GPU memory"] = f"{human(on_device)} (measured)"
    return {
        "rows": rows,
        "tokens": tokens,
        "checkpoints": many,
        "index_bytes": vectors,
        "memory_bytes": peak,
        "device_memory_bytes": on_device,
        "seconds": seconds,
        "tokens_per_second": rate,
        "measured_tokens": seen,
        "how": "measured",
        "told": told,
    }


def _peak() -> int:
    """The most memory that this process has had, in bytes."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"

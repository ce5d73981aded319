"""Building an index, one batch a step, so that progress is seen, a cancel is quick and a crash loses little.

A shard is written beside its name, synced, renamed and then recorded in a small JSON file with its checksums; the
manifest comes last. So a build that is killed loses at most the shard in hand, and running it again goes on from there.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from safetensors.numpy import save

from app.influence import index as disk
from app.influence.corpus import Encoder, Example, Row
from app.influence.errors import SpecError, disk_full_is_named
from app.influence.gradients import gradients, losses, plan_for
from app.influence.index import IndexSpec, Manifest, intact, open_index, publish, read_manifest, write_file
from app.influence.models import LoadedModel
from app.influence.projection import ProjectionSpec

SHARD_NUMBERS = 2**27  # float32 numbers of a shard while it is collected (512 MiB)
UNRELIABLE = 0.5  # training loss below this share of the held-out loss: METHODS, "Which checkpoint, and which query"


@dataclass(frozen=True)
class Progress:
    """How far a build is, counted over all its checkpoints."""

    stage: str
    rows: int
    total_rows: int
    tokens: int
    total_tokens: int


def build(
    path: Path, model: LoadedModel, rows: Sequence[Row], spec: IndexSpec, heldout: Sequence[Row] = ()
) -> Iterator[Progress]:
    """Build an index, one batch a step; called again on the same path it takes up what a crash left.

    Raises:
        SpecError: no rows, the same row twice, or a folder that holds another build.
        RowError: a row without a response token within `max_length`.
        DiskFull: what is finished stays.
    """
    _check_rows(rows)
    plan = _plan(model, rows, spec)
    with disk_full_is_named("the index"):
        (path / "shards").mkdir(parents=True, exist_ok=True)
        if (path / "plan.json").exists() and (path / "plan.json").read_bytes() != plan:
            raise SpecError("the folder holds a build of other rows, model or settings", field="index")
        write_file(path / "plan.json", plan)
    shards: list[dict[str, Any]] = []
    yield from _shards(path, model, rows, spec, 0, shards)
    held: list[float] = []
    encoder = Encoder(model.tokenizer, spec.template, spec.max_length)
    for checkpoint in model.checkpoints if heldout else ():
        examples = [encoder.encode(row) for row in heldout]
        means: list[float] = []
        for batch in batches(examples, spec.token_budget):
            means += [float(loss.mean()) for loss in losses(model, checkpoint, [examples[i] for i in batch])]
            yield Progress("heldout", len(means), len(examples), 0, 0)
        held.append(float(np.mean(means)))
    checkpoints, warnings = [], []
    for number, checkpoint in enumerate(model.checkpoints):
        train = sum(s["loss"][number] * s["rows"] for s in shards) / sum(s["rows"] for s in shards)
        one: dict[str, Any] = {"name": checkpoint.name, "weight": checkpoint.weight, "train_loss": train}
        if held:
            one["heldout_loss"] = held[number]
            if train < UNRELIABLE * held[number]:
                warnings.append(
                    f"checkpoint '{checkpoint.name}' is over-fitted (training loss {train:.2f}, held-out "
                    f"{held[number]:.2f}): its attributions may have lost the trail; add an earlier checkpoint"
                )
        checkpoints.append(one)
    stats = _stats(shards)
    if stats["truncated_rows"]:
        warnings.append(
            f"{stats['truncated_rows']} rows were cut at {spec.max_length} tokens: what lies beyond is not attributed"
        )
    if stats["flagged"]:
        warnings.append(f"{stats['flagged']} rows have a zero or non-finite gradient and are never found")
    manifest = Manifest(
        spec=asdict(spec),
        width=plan_for(model, spec.projection).width,
        checkpoints=checkpoints,
        fingerprint=model.fingerprint,
        attributed=[asdict(module) for module in model.attributed],
        skipped=[asdict(module) for module in model.skipped],
        shards=shards,
        deleted=[],
        stats=stats,
        warnings=warnings,
        versions={"python": platform.python_version(), **{n: version(n) for n in ("torch", "transformers", "peft")}},
    )
    publish(path, manifest)
    yield Progress("publish", len(rows), len(rows), 0, 0)


def append(path: Path, model: LoadedModel, rows: Sequence[Row]) -> Iterator[Progress]:
    """Add rows as new shards; rows that are live already are left out, so that a second run adds nothing twice."""
    index = open_index(path, verify=False)
    index.check(model)
    live = set(index.ids)
    rows = [row for row in rows if row.id not in live]
    if rows:
        _check_rows(rows)
        kept = index.manifest.spec
        spec = IndexSpec(**{**kept, "projection": ProjectionSpec(**kept["projection"])})
        added: list[dict[str, Any]] = []
        yield from _shards(path, model, rows, spec, len(index.manifest.shards), added)
        fresh = read_manifest(path)  # a delete may have been published meanwhile
        shards = [*fresh.shards, *added]
        # A row that was deleted and comes back lives in a new shard: only its old place keeps the tombstone.
        publish(path, Manifest(**{**fresh.to_dict(), "shards": shards, "stats": _stats(shards)}))
    yield Progress("publish", len(rows), len(rows), 0, 0)


def _shards(
    path: Path, model: LoadedModel, rows: Sequence[Row], spec: IndexSpec, first: int, done: list[dict[str, Any]]
) -> Iterator[Progress]:
    plan = plan_for(model, spec.projection, spec.normalisation)
    encoder = Encoder(model.tokenizer, spec.template, min(spec.max_length, model.context_length))
    examples = [encoder.encode(row) for row in rows]
    many = len(model.checkpoints)
    total_tokens = many * sum(len(example.ids) for example in examples)
    steps, tokens = 0, 0
    shard_rows = min(spec.shard_rows, max(1, SHARD_NUMBERS // (many * plan.width)))
    for number, start in enumerate(range(0, len(rows), shard_rows), start=first):
        name = f"{number:06d}"
        part = examples[start : start + shard_rows]
        ids = [row.number for row in rows[start : start + shard_rows]]
        record = _finished(path, name, ids)
        if record is None:
            vectors = torch.zeros(len(part), many * plan.width)
            norms = torch.zeros(len(part), many)
            loss = torch.zeros(len(part), many)
            for at, checkpoint in enumerate(model.checkpoints):
                for batch in batches(part, spec.token_budget):
                    found = gradients(model, checkpoint, plan, [part[i] for i in batch])
                    raw = found.vectors.float().cpu()
                    lengths = raw.norm(dim=1)
                    units = raw / lengths.clamp_min(torch.finfo(lengths.dtype).tiny).unsqueeze(1)
                    vectors[batch, at * plan.width : (at + 1) * plan.width] = units
                    norms[batch, at] = lengths
                    loss[batch, at] = torch.stack([one.mean() for one in found.losses]).cpu()
                    steps += len(batch)
                    tokens += sum(len(part[i].ids) for i in batch)
                    yield Progress("gradients", steps // many, len(rows), tokens, total_tokens)
            record = _save(path, name, ids, vectors, norms, loss, part)
        else:
            steps += many * len(part)
            tokens += many * sum(len(example.ids) for example in part)
            yield Progress("gradients", steps // many, len(rows), tokens, total_tokens)
        done.append(record)


def _save(
    path: Path,
    name: str,
    ids: list[int],
    vectors: torch.Tensor,
    norms: torch.Tensor,
    loss: torch.Tensor,
    examples: Sequence[Example],
) -> dict[str, Any]:
    # FAISS never returns rows that are not finite and says nothing: flag them, and store zeros.
    finite = torch.isfinite(vectors).all(1) & torch.isfinite(norms).all(1) & (norms > 0).all(1)
    vectors[~finite] = 0
    norms[~finite] = 0
    files: dict[str, bytes] = {}
    for part, columns in enumerate(vectors.split(disk.LONGEST, 1)):
        flat = faiss.IndexScalarQuantizer(columns.shape[1], faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
        index = faiss.IndexIDMap2(flat)
        index.add_with_ids(np.ascontiguousarray(columns.numpy()), np.array(ids, dtype=np.int64))
        files[f"{name}.faiss" if part == 0 else f"{name}.{part:02d}.faiss"] = faiss.serialize_index(index).tobytes()
    side = save({"norms": norms.numpy(), "loss": loss.numpy(), "finite": finite.numpy().astype(np.uint8)})
    with disk_full_is_named(f"shard {name}"):
        for file, content in (*files.items(), (f"{name}.safetensors", side)):
            write_file(path / "shards" / file, content)
        record = {
            "name": name,
            "rows": len(ids),
            "tokens": sum(len(e.ids) for e in examples),
            "truncated_rows": sum(e.truncated > 0 for e in examples),
            "truncated_tokens": sum(e.truncated for e in examples),
            "flagged": [f"{n:016x}" for n, ok in zip(ids, finite.tolist(), strict=True) if not ok],
            "loss": [float(x) for x in loss[finite].double().mean(0)] if finite.any() else [0.0] * loss.shape[1],
            "ids": hashlib.sha256(json.dumps(ids).encode()).hexdigest(),
            "bytes": sum(map(len, files.values())),
            "files": [(file, hashlib.sha256(content).hexdigest()) for file, content in files.items()],
            "sidecar_sha256": hashlib.sha256(side).hexdigest(),
        }
        write_file(path / "shards" / f"{name}.json", json.dumps(record).encode())
    return record


def _finished(path: Path, name: str, ids: list[int]) -> dict[str, Any] | None:
    """The record of a shard that an earlier run finished with these very rows."""
    file = path / "shards" / f"{name}.json"
    if not file.exists():
        return None
    record: dict[str, Any] = json.loads(file.read_bytes())
    same = record["ids"] == hashlib.sha256(json.dumps(ids).encode()).hexdigest()
    return record if same and intact(path, record, verify=True) else None


def batches(examples: Sequence[Example], budget: int) -> list[list[int]]:
    """Rows of similar length together, each batch within the budget of padded tokens (or one row)."""
    batches: list[list[int]] = []
    for i in sorted(range(len(examples)), key=lambda i: (-len(examples[i].ids), i)):
        if batches and (len(batches[-1]) + 1) * len(examples[batches[-1][0]].ids) <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def _check_rows(rows: Sequence[Row]) -> None:
    if not rows:
        raise SpecError("an index needs at least one row", field="dataset")
    if len({row.id for row in rows}) != len(rows):
        raise SpecError("the same row appears twice; remove the duplicates", field="dataset")


def _plan(model: LoadedModel, rows: Sequence[Row], spec: IndexSpec) -> bytes:
    ids = hashlib.sha256("".join(row.id for row in rows).encode()).hexdigest()
    weights = [(c.name, c.weight) for c in model.checkpoints]
    plan = {"spec": asdict(spec), "fingerprint": model.fingerprint, "weights": weights, "rows": ids}
    return json.dumps(plan, sort_keys=True).encode()


def _stats(shards: Sequence[dict[str, Any]]) -> dict[str, Any]:
    keys = ("rows", "tokens", "truncated_rows", "truncated_tokens", "bytes")
    return {**{key: sum(s[key] for s in shards) for key in keys}, "flagged": sum(len(s["flagged"]) for s in shards)}

"""Building an index, one batch a step, so that progress is seen, a cancel is quick and a crash loses little.

A shard is written beside its name, synced, renamed and then recorded in a small JSON file with its checksums; the
manifest comes last. So a build that is killed loses at most the shard in hand, and running it again goes on from there.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from safetensors.numpy import save

from app.influence import index as disk
from app.influence.corpus import Encoder, Example, Row
from app.influence.errors import RowError, SpecError, disk_full_is_named
from app.influence.gradients import gradients, losses, plan_for
from app.influence.index import IndexSpec, Manifest, damaged, open_index, publish, read_manifest, write_file
from app.influence.models import LoadedModel

NUMBERS = 2**27  # float32 numbers of a shard, or of a batch, while it is collected (512 MiB)
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

    A row without a response token within `max_length` is kept, flagged and never found.

    Raises:
        SpecError: no rows, the same row twice, or a folder that holds another build or an index.
        RowError: not one row of a shard can be used.
        DiskFull: what is finished stays.
    """
    _check_rows(rows)
    plan = _plan(model, rows, spec)
    with disk_full_is_named("the index"):
        (path / "shards").mkdir(parents=True, exist_ok=True)
        if (path / "plan.json").exists() and (path / "plan.json").read_bytes() != plan:
            raise SpecError("the folder holds a build of other rows, model or settings", field="index")
        write_file(path / "plan.json", plan)
    if (path / disk.MANIFEST).exists():  # an earlier run was killed between publishing and saying so
        yield Progress("publish", len(rows), len(rows), 0, 0)
        return
    known = {row.id for row in rows}
    unseen = [row for row in heldout if row.id not in known]
    held = yield from _heldout(model, unseen, spec)
    shards = yield from _shards(path, model, rows, spec, 0)
    manifest = Manifest(
        spec=asdict(spec),
        width=plan_for(model, spec.projection, spec.normalisation).width,
        checkpoints=[
            {"name": checkpoint.name, "weight": checkpoint.weight, "heldout_loss": loss}
            for checkpoint, loss in zip(model.checkpoints, held, strict=True)
        ],
        fingerprint=model.fingerprint,
        attributed=[asdict(module) for module in model.attributed],
        skipped=[asdict(module) for module in model.skipped],
        shards=[],
        deleted=[],
        stats={"heldout_rows": len(unseen), "heldout_rows_in_training": len(heldout) - len(unseen)},
        warnings=[],
        versions={"python": platform.python_version(), **{n: version(n) for n in ("torch", "transformers", "peft")}},
    )
    publish(path, _with_shards(manifest, shards))
    yield Progress("publish", len(rows), len(rows), 0, 0)


def append(path: Path, model: LoadedModel, rows: Sequence[Row]) -> Iterator[Progress]:
    """Add rows as new shards; rows that are there already are left out, so that a second run adds nothing twice."""
    index = open_index(path, verify=False)
    index.check(model)
    there = {row for shard in index.shards for row, kept in zip(shard.ids, shard.kept, strict=True) if kept}
    rows = [row for row in rows if row.id not in there]
    if rows:
        _check_rows(rows)
        added = yield from _shards(path, model, rows, index.manifest.index_spec, len(index.manifest.shards))
        fresh = read_manifest(path)  # a delete may have been published meanwhile
        # A row that was deleted and comes back lives in a new shard: only its old place keeps the tombstone.
        publish(path, _with_shards(fresh, [*fresh.shards, *added]))
    yield Progress("publish", len(rows), len(rows), 0, 0)


def repair(path: Path, model: LoadedModel, row_of: Callable[[str], Row]) -> Iterator[Progress]:
    """Compute damaged shards anew from their rows' texts; what was added and deleted since the build stays so.

    Raises:
        SpecError: the list of a damaged shard's rows is damaged too; only a new index helps.
    """
    manifest = read_manifest(path)
    disk.check(manifest, model)
    shards = []
    for number, record in enumerate(manifest.shards):
        if damaged(path, record, verify=True):
            ids = _row_ids(path, record)
            mended = yield from _shards(path, model, [row_of(row) for row in ids], manifest.index_spec, number)
            record = mended[0]
            for file, _, _ in record["files"]:
                (path / "shards" / f"{file}.corrupt").unlink(missing_ok=True)
        shards.append(record)
    publish(path, _with_shards(read_manifest(path), shards))
    yield Progress("publish", 0, 0, 0, 0)


def _row_ids(path: Path, record: dict[str, Any]) -> list[str]:
    file = path / "shards" / f"{record['name']}.json"
    ids: list[str] = json.loads(file.read_bytes())["row_ids"] if file.is_file() else []
    if _hash_ids(ids) != record["ids"]:
        raise SpecError(
            f"shard {record['name']} cannot be repaired: the list of its rows is damaged too", field="index"
        )
    return ids


def _heldout(model: LoadedModel, rows: Sequence[Row], spec: IndexSpec) -> Generator[Progress, None, list[float | None]]:
    """The mean loss of each checkpoint on rows that the model was not trained on; None without such rows."""
    if not rows:
        return [None] * len(model.checkpoints)
    encoder = model.encoder(spec.template, spec.max_length)
    examples = [encoder.encode(row) for row in rows]
    total, done = len(rows) * len(model.checkpoints), 0
    tokens = [len(example.ids) for example in examples]
    means, seen = [], 0
    for checkpoint in model.checkpoints:
        found: list[float] = []
        for batch in batches(examples, spec.token_budget):
            found += [float(loss.mean()) for loss in losses(model, checkpoint, [examples[i] for i in batch])]
            done += len(batch)
            seen += sum(tokens[i] for i in batch)
            yield Progress("heldout", done, total, seen, sum(tokens) * len(model.checkpoints))
        means.append(float(np.mean(found)))
    return list(means)


def _shards(
    path: Path, model: LoadedModel, rows: Sequence[Row], spec: IndexSpec, first: int
) -> Generator[Progress, None, list[dict[str, Any]]]:
    """The records of the rows' shards, from number `first` on: those that are finished, and new ones."""
    plan = plan_for(model, spec.projection, spec.normalisation)
    encoder = model.encoder(spec.template, spec.max_length)
    many = len(model.checkpoints)
    shard_rows = min(spec.shard_rows, max(1, NUMBERS // (many * plan.width)))
    records: list[dict[str, Any]] = []
    steps = tokens = 0
    for number, start in enumerate(range(0, len(rows), shard_rows), start=first):
        name = f"{number:06d}"
        part = rows[start : start + shard_rows]
        record = _finished(path, name, part)
        if record is None:
            examples, unfit = _encode(encoder, part)
            vectors = torch.zeros(len(part), many * plan.width)
            norms = torch.zeros(len(part), many)
            loss = torch.zeros(len(part), many)
            fit = [i for i, example in enumerate(examples) if example is not None]
            whole = [example for example in examples if example is not None]
            # The tokens of all the rows are known at the end only: the rest is taken to be like what was seen.
            expected = many * sum(len(e.ids) for e in whole) * len(rows) // len(part)
            for at, checkpoint in enumerate(model.checkpoints):
                for batch in batches(whole, spec.token_budget, max(1, NUMBERS // plan.width)):
                    found = gradients(model, checkpoint, plan, [whole[i] for i in batch])
                    places = [fit[i] for i in batch]
                    raw = found.vectors.float().cpu()
                    lengths = raw.norm(dim=1)
                    raw /= lengths.clamp_min(torch.finfo(lengths.dtype).tiny).unsqueeze(1)
                    vectors[places, at * plan.width : (at + 1) * plan.width] = raw
                    norms[places, at] = lengths
                    loss[places, at] = torch.stack([one.mean() for one in found.losses]).cpu()
                    steps += len(batch)
                    tokens += sum(len(whole[i].ids) for i in batch)
                    yield Progress("gradients", steps // many, len(rows), tokens, max(tokens, expected))
            record = _save(path, name, part, vectors, norms, loss, whole, unfit)
            steps += many * len(unfit)
        else:
            steps += many * len(part)
            tokens += many * record["tokens"]
            yield Progress("gradients", steps // many, len(rows), tokens, tokens * len(rows) * many // steps)
        records.append(record)
    return records


def _encode(encoder: Encoder, rows: Sequence[Row]) -> tuple[list[Example | None], list[RowError]]:
    """Each row's example; None, and why, for a row that has none."""
    examples: list[Example | None] = []
    errors: list[RowError] = []
    for row in rows:
        try:
            examples.append(encoder.encode(row))
        except RowError as error:
            examples.append(None)
            errors.append(error)
    if len(errors) == len(rows):  # not a row or two, but the template or the limit
        raise errors[0]
    return examples, errors


def _save(
    path: Path,
    name: str,
    rows: Sequence[Row],
    vectors: torch.Tensor,
    norms: torch.Tensor,
    loss: torch.Tensor,
    examples: Sequence[Example],
    unfit: Sequence[RowError],
) -> dict[str, Any]:
    # FAISS never returns rows that are not finite and says nothing: flag them, and store zeros.
    finite = torch.isfinite(vectors).all(1) & torch.isfinite(norms).all(1) & (norms > 0).all(1)
    vectors[~finite] = 0
    norms[~finite] = 0
    files: dict[str, bytes] = {}
    for part, columns in enumerate(vectors.split(disk.LONGEST, 1)):
        flat = faiss.IndexScalarQuantizer(columns.shape[1], faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
        index = faiss.IndexIDMap2(flat)
        numbers = np.array([row.number for row in rows], dtype=np.int64)
        index.add_with_ids(np.ascontiguousarray(columns.numpy()), numbers)
        files[f"{name}.faiss" if part == 0 else f"{name}.{part:02d}.faiss"] = faiss.serialize_index(index).tobytes()
    size = sum(map(len, files.values()))
    side = {"norms": norms.numpy(), "loss": loss.numpy(), "finite": finite.numpy().astype(np.uint8)}
    files[f"{name}.safetensors"] = save(side)
    ids = [row.id for row in rows]
    with disk_full_is_named(f"shard {name}"):
        for file, content in files.items():
            write_file(path / "shards" / file, content)
        record = {
            "name": name,
            "rows": len(rows),
            "tokens": sum(len(e.ids) for e in examples),
            "truncated_rows": sum(e.truncated > 0 for e in examples),
            "truncated_tokens": sum(e.truncated for e in examples),
            "flagged": [row for row, ok in zip(ids, finite.tolist(), strict=True) if not ok],
            "unfit_rows": len(unfit),
            "loss": [float(x) for x in loss[finite].double().sum(0)],
            "ids": _hash_ids(ids),
            "bytes": size,
            "files": [[file, len(content), hashlib.sha256(content).hexdigest()] for file, content in files.items()],
        }
        write_file(path / "shards" / f"{name}.json", json.dumps({**record, "row_ids": ids}).encode())
    return record


def _finished(path: Path, name: str, rows: Sequence[Row]) -> dict[str, Any] | None:
    """The record of a shard that an earlier run finished with these very rows."""
    file = path / "shards" / f"{name}.json"
    if not file.exists():
        return None
    record: dict[str, Any] = json.loads(file.read_bytes())
    del record["row_ids"]
    same = record["ids"] == _hash_ids([row.id for row in rows])
    return record if same and not damaged(path, record, verify=True) else None


def _hash_ids(ids: Sequence[str]) -> str:
    return hashlib.sha256("".join(ids).encode()).hexdigest()


def batches(examples: Sequence[Example], budget: int, most: int = 2**30) -> list[list[int]]:
    """Rows of similar length together: a batch is one row, or at most so many within the budget of padded tokens."""
    found: list[list[int]] = []
    for i in sorted(range(len(examples)), key=lambda i: (-len(examples[i].ids), i)):
        many = len(found[-1]) + 1 if found else 0
        if found and many <= most and many * len(examples[found[-1][0]].ids) <= budget:
            found[-1].append(i)
        else:
            found.append([i])
    return found


def _check_rows(rows: Sequence[Row]) -> None:
    if not rows:
        raise SpecError("an index needs at least one row", field="dataset")
    if len({row.id for row in rows}) != len(rows):
        raise SpecError("the same row appears twice; remove the duplicates", field="dataset")


def _plan(model: LoadedModel, rows: Sequence[Row], spec: IndexSpec) -> bytes:
    plan = {"spec": asdict(spec), "fingerprint": model.fingerprint, "rows": _hash_ids([row.id for row in rows])}
    return json.dumps(plan, sort_keys=True).encode()


def _with_shards(manifest: Manifest, shards: list[dict[str, Any]]) -> Manifest:
    """The manifest with these shards, and with all that follows from them."""
    keys = ("rows", "tokens", "truncated_rows", "truncated_tokens", "unfit_rows", "bytes")
    stats = {**manifest.stats, **{key: sum(shard[key] for shard in shards) for key in keys}}
    stats["flagged"] = sum(len(shard["flagged"]) for shard in shards)
    found = max(1, stats["rows"] - stats["flagged"])
    checkpoints = [
        {**checkpoint, "train_loss": sum(shard["loss"][at] for shard in shards) / found}
        for at, checkpoint in enumerate(manifest.checkpoints)
    ]
    warnings = []
    for checkpoint in checkpoints:
        train, held = checkpoint["train_loss"], checkpoint["heldout_loss"]
        if held is not None and train < UNRELIABLE * held:
            warnings.append(
                f"checkpoint '{checkpoint['name']}' is over-fitted (training loss {train:.2f}, held-out {held:.2f}): "
                "its attributions may have lost the trail; add an earlier checkpoint"
            )
    if stats["truncated_rows"]:
        warnings.append(
            f"{stats['truncated_rows']} rows were cut ({stats['truncated_tokens']} tokens beyond the limit): what was "
            "cut off is not attributed"
        )
    if stats["unfit_rows"]:
        warnings.append(f"{stats['unfit_rows']} rows have no response token within the limit and are never found")
    if stats["flagged"] > stats["unfit_rows"]:
        many = stats["flagged"] - stats["unfit_rows"]
        warnings.append(f"{many} rows have a zero or non-finite gradient and are never found")
    if stats["heldout_rows_in_training"]:
        warnings.append(f"{stats['heldout_rows_in_training']} held-out rows are training rows and were not measured")
    return replace(manifest, shards=shards, stats=stats, checkpoints=checkpoints, warnings=warnings)

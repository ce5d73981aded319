"""Building an index in parts that any process may compute, one batch a step.

A plan divides the rows into shards; it follows from the rows and the settings alone, so that every process that asks
gets the same one. A shard is written beside its name, synced, renamed and then recorded in a small JSON file with its
checksums. Whoever finds all of them finished gathers their second moments and publishes the manifest, which makes the
index exist. So parts may be computed by many processes, twice, or again after a crash: the bytes are the same, and a
build that is killed loses at most the shard in hand. `build`, `append` and `repair` do all of it in one process.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypeVar

import faiss
import numpy as np
import torch
from safetensors.numpy import save

from app.influence import index as disk
from app.influence.corpus import Encoder, Example, Row
from app.influence.curvature import curvature_damaged, gather
from app.influence.errors import IndexCorrupt, RowError, SpecError, disk_full_is_named
from app.influence.files import file_record
from app.influence.gradients import gradients, losses, plan_for
from app.influence.index import (
    IndexSpec,
    Manifest,
    damaged,
    open_index,
    open_shard,
    publish,
    read_manifest,
    remove_parts,
    write_file,
)
from app.influence.models import LoadedModel

Item = TypeVar("Item")
HELDOUT = "heldout.json"
NUMBERS = 2**27  # float32 numbers of a shard, or of a batch, while it is collected (512 MiB)
UNRELIABLE = 0.6  # training loss below this share of the held-out loss (docs/results.md has how often that is right)


@dataclass(frozen=True)
class Progress:
    """How far a piece of work is. `resumed`: an earlier run had done it, so its tokens took no time now."""

    stage: str
    rows: int
    total_rows: int
    tokens: int
    total_tokens: int
    resumed: bool = False


@dataclass(frozen=True)
class Part:
    """One shard's share: the rows from `start` on of those that are built, added or repaired together."""

    number: int
    start: int
    rows: int

    @property
    def name(self) -> str:
        """What its files begin with."""
        return f"{self.number:06d}"


def build(
    path: Path,
    model: LoadedModel,
    rows: Sequence[Row],
    spec: IndexSpec,
    heldout: Sequence[Row] = (),
    curvature: bool = True,
) -> Iterator[Progress]:
    """Build an index in this process; called again on the same path it takes up what a crash left.

    A row without a response token within `max_length` is kept, flagged and never found.

    Args:
        curvature: gather second moments as well, which preconditioned queries need.

    Raises:
        SpecError: no rows, the same row twice, or a folder that holds another build or an index.
        RowError: not one row of a shard can be used.
        DiskFull: what is finished stays.
    """
    ids = [row.id for row in rows]
    parts = plan_build(path, model, ids, spec)
    if not (path / disk.MANIFEST).exists():  # else an earlier run was killed between publishing and saying so
        yield from measure(path, model, ids, heldout, spec)
        yield from _in_turn(path, model, spec, parts, partial(part_of, rows))
        yield from publish_build(path, model, ids, spec, parts, curvature)
    yield Progress("publish", len(rows), len(rows), 0, 0)


def append(path: Path, model: LoadedModel, rows: Sequence[Row]) -> Iterator[Progress]:
    """Add rows as new shards; rows that are there already are left out, so that a second run adds nothing twice."""
    by_id = {row.id: row for row in rows}
    new, parts = plan_append(path, model, [row.id for row in rows])
    spec = read_manifest(path).index_spec
    yield from _in_turn(path, model, spec, parts, lambda part: [by_id[row] for row in part_of(new, part)])
    yield from publish_append(path, parts)
    yield Progress("publish", len(new), len(new), 0, 0)


def repair(path: Path, model: LoadedModel, row_of: Callable[[str], Row]) -> Iterator[Progress]:
    """Compute damaged shards anew from their rows' texts; what was added and deleted since the build stays so.

    Raises:
        SpecError: the list of a damaged shard's rows is damaged too; only a new index helps.
    """
    parts = plan_repair(path, model)
    spec = read_manifest(path).index_spec
    yield from _in_turn(path, model, spec, parts, lambda part: [row_of(row) for row in row_ids(path, part)])
    yield from publish_repair(path, parts)
    yield Progress("publish", 0, 0, 0, 0)


def part_of(all_: Sequence[Item], part: Part) -> Sequence[Item]:
    """Those of a part, of the rows or their ids."""
    return all_[part.start : part.start + part.rows]


def plan_build(path: Path, model: LoadedModel, ids: Sequence[str], spec: IndexSpec) -> list[Part]:
    """Make the folder and divide the rows, by their ids, into shards.

    Raises:
        SpecError: no rows, the same row twice, or a folder that holds another build or an index.
    """
    _check_ids(ids)
    plan = {"spec": asdict(spec), "fingerprint": model.fingerprint, "rows": _hash_ids(ids)}
    content = json.dumps(plan, sort_keys=True).encode()
    with disk_full_is_named("the index"):
        (path / "shards").mkdir(parents=True, exist_ok=True)
        if (path / "plan.json").exists() and (path / "plan.json").read_bytes() != content:
            raise SpecError("the folder holds a build of other rows, model or settings", field="index")
        write_file(path / "plan.json", content)
    return _divide(len(ids), model, spec, 0)


def plan_append(path: Path, model: LoadedModel, ids: Sequence[str]) -> tuple[list[str], list[Part]]:
    """Those of the rows that the index does not hold, and their division into new shards.

    Raises:
        Mismatch: the model is not the index's. SpecError: the same row twice.
    """
    index = open_index(path, verify=False)
    index.check(model)
    there = {row for shard in index.shards for row, kept in zip(shard.ids, shard.kept, strict=True) if kept}
    new = [row for row in ids if row not in there]
    if not new:
        return [], []
    _check_ids(new)
    return new, _divide(len(new), model, index.manifest.index_spec, len(index.manifest.shards))


def plan_repair(path: Path, model: LoadedModel) -> list[Part]:
    """The damaged shards, if the model is the index's."""
    disk.check(read_manifest(path), model)
    return damaged_parts(path)


def damaged_parts(path: Path) -> list[Part]:
    """The damaged shards; reads every byte of every shard."""
    manifest = read_manifest(path)
    bad = [(n, record) for n, record in enumerate(manifest.shards) if damaged(path, record, verify=True)]
    return [Part(number, 0, record["rows"]) for number, record in bad]


def row_ids(path: Path, part: Part) -> list[str]:
    """The ids of a published shard's rows, from the list that lies beside it.

    Raises:
        SpecError: the list is damaged.
    """
    file = path / "shards" / f"{part.name}.json"
    ids: list[str] = json.loads(file.read_bytes())["row_ids"] if file.is_file() else []
    if _hash_ids(ids) != read_manifest(path).shards[part.number]["ids"]:
        raise SpecError(f"shard {part.name} cannot be repaired: the list of its rows is damaged too", field="index")
    return ids


def _divide(count: int, model: LoadedModel, spec: IndexSpec, first: int) -> list[Part]:
    width = plan_for(model, spec.projection, spec.normalisation).width
    size = min(spec.shard_rows, max(1, NUMBERS // (len(model.checkpoints) * width)))
    starts = range(0, count, size)
    return [Part(number, start, min(size, count - start)) for number, start in enumerate(starts, start=first)]


def _in_turn(
    path: Path, model: LoadedModel, spec: IndexSpec, parts: Sequence[Part], rows_of: Callable[[Part], Sequence[Row]]
) -> Iterator[Progress]:
    """Compute the parts one after the other, counted together."""
    total, rows, tokens = sum(part.rows for part in parts), 0, 0
    for part in parts:
        step = Progress("gradients", 0, 0, 0, 0)
        for step in compute_shard(path, model, rows_of(part), spec, part.number):
            # The tokens of all the rows are known at the end only: the rest is taken to be like what was seen.
            expected = (tokens + step.total_tokens) * total // (rows + part.rows)
            yield replace(
                step, rows=rows + step.rows, total_rows=total, tokens=tokens + step.tokens, total_tokens=expected
            )
        rows += part.rows
        tokens += step.tokens


def measure(
    path: Path, model: LoadedModel, ids: Collection[str], heldout: Sequence[Row], spec: IndexSpec
) -> Iterator[Progress]:
    """Measure each checkpoint's mean loss on held-out rows, those left out that are among the trained `ids`."""
    trained = set(ids)
    rows = [row for row in heldout if row.id not in trained]
    file = path / HELDOUT
    same = {"rows": len(rows), "rows_in_training": len(heldout) - len(rows), "ids": _hash_ids([row.id for row in rows])}
    if _heldout(path).items() >= same.items():
        yield Progress("heldout", len(rows), len(rows), 0, 0, resumed=True)
        return
    examples = [model.encoder(spec.template, spec.max_length).encode(row) for row in rows]
    total, done = len(rows) * len(model.checkpoints), 0
    tokens = [len(example.ids) for example in examples]
    means: list[float | None] = []
    seen = 0
    for checkpoint in model.checkpoints:
        found: list[float] = []
        for batch in batches(examples, spec.token_budget):
            found += [float(loss.mean()) for loss in losses(model, checkpoint, [examples[i] for i in batch])]
            done += len(batch)
            seen += sum(tokens[i] for i in batch)
            yield Progress("heldout", done, total, seen, sum(tokens) * len(model.checkpoints))
        means.append(float(np.mean(found)) if found else None)
    with disk_full_is_named("the held-out losses"):
        write_file(file, json.dumps({**same, "losses": means}, sort_keys=True).encode())


def _heldout(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((path / HELDOUT).read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return found


def compute_shard(
    path: Path, model: LoadedModel, rows: Sequence[Row], spec: IndexSpec, number: int
) -> Iterator[Progress]:
    """Compute and write one shard, unless it is there already and whole."""
    plan = plan_for(model, spec.projection, spec.normalisation)
    many, name = len(model.checkpoints), f"{number:06d}"
    record = _finished(path, name, [row.id for row in rows], verify=True)
    if record is not None:
        tokens = many * record["tokens"]
        yield Progress("gradients", len(rows), len(rows), tokens, tokens, resumed=True)
        return
    examples, unfit = _encode(model.encoder(spec.template, spec.max_length), rows)
    vectors = torch.zeros(len(rows), many * plan.width)
    norms = torch.zeros(len(rows), many)
    loss = torch.zeros(len(rows), many)
    fit = [i for i, example in enumerate(examples) if example is not None]
    whole = [example for example in examples if example is not None]
    steps, tokens, total = 0, 0, many * sum(len(e.ids) for e in whole)
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
            yield Progress("gradients", steps // many, len(rows), tokens, total)
    _save(path, name, rows, vectors, norms, loss, whole, unfit, spec.codes)
    yield Progress("gradients", len(rows), len(rows), tokens, total)


def unfinished(path: Path, ids: Sequence[str], parts: Sequence[Part]) -> list[Part]:
    """The parts whose shard is not on disk as it was written; reads every byte."""
    return [part for part in parts if _finished(path, part.name, part_of(ids, part), verify=True) is None]


def missing_parts(path: Path, parts: Sequence[Part]) -> list[Part]:
    """The parts whose shard is not on disk in its full size: a quick look."""
    return [part for part in parts if _finished(path, part.name, None, verify=False) is None]


def publish_build(
    path: Path,
    model: LoadedModel,
    ids: Sequence[str],
    spec: IndexSpec,
    parts: Sequence[Part],
    curvature: bool = True,
) -> Iterator[Progress]:
    """Write the manifest of a build whose parts are all finished; once it is there it stays as it is.

    Raises:
        IndexCorrupt: a part is not finished.
    """
    if (path / disk.MANIFEST).exists():
        return
    held = _heldout(path)
    if not held:
        raise IndexCorrupt("the held-out losses were not measured: run the job again", shard=HELDOUT)
    manifest = Manifest(
        spec=asdict(spec),
        width=plan_for(model, spec.projection, spec.normalisation).width,
        checkpoints=[
            {"name": checkpoint.name, "weight": checkpoint.weight, "heldout_loss": loss}
            for checkpoint, loss in zip(model.checkpoints, held["losses"], strict=True)
        ],
        fingerprint=model.fingerprint,
        attributed=[asdict(module) for module in model.attributed],
        skipped=[asdict(module) for module in model.skipped],
        shards=[],
        deleted=[],
        stats={"heldout_rows": held["rows"], "heldout_rows_in_training": held["rows_in_training"]},
        warnings=[],
        versions={"python": platform.python_version(), **{n: version(n) for n in ("torch", "transformers", "peft")}},
    )
    remove_parts(path)
    manifest = _with_shards(manifest, [_record(path, part, part_of(ids, part)) for part in parts])
    if curvature:
        yield from _publish(path, manifest)
    else:
        publish(path, manifest)


def publish_append(path: Path, parts: Sequence[Part]) -> Iterator[Progress]:
    """Write the manifest with the added shards; those that are in it stay."""
    manifest = read_manifest(path)  # a delete may have been published since the plan
    there = {shard["name"] for shard in manifest.shards}
    added = [_record(path, part) for part in parts if part.name not in there]
    if added:
        # A row that was deleted and comes back lives in a new shard: only its old place keeps the tombstone.
        yield from _publish(path, _with_shards(manifest, [*manifest.shards, *added]))
    remove_parts(path)


def publish_repair(path: Path, parts: Sequence[Part]) -> Iterator[Progress]:
    """Write the manifest with the records of the shards that were computed anew; gather what moments are missing."""
    manifest = read_manifest(path)
    shards = list(manifest.shards)
    for part in parts:
        shards[part.number] = _record(path, part)
        for file, _, _ in shards[part.number]["files"]:
            (path / "shards" / f"{file}.corrupt").unlink(missing_ok=True)
    yield from _publish(path, _with_shards(manifest, shards))
    remove_parts(path)


def _publish(path: Path, manifest: Manifest) -> Iterator[Progress]:
    """Gather the shards' second moments, unless it was done; then write the manifest, which names their file.

    The file's name follows from the shards: whoever has read the last manifest finds its file until this is through,
    and then until the next one is published.
    """
    digests = "".join(digest for shard in manifest.shards for _, _, digest in shard["files"])
    name = f"curvature-{hashlib.sha256(digests.encode()).hexdigest()[:12]}.safetensors"
    was = manifest.curvature
    if was is None or was["name"] != name or curvature_damaged(path, manifest, verify=True):
        try:
            places = manifest.blocks()
        except ValueError:
            manifest = replace(manifest, curvature=None)  # they would not fit; it can be asked without them
        else:
            shards = [open_shard(path, record, (), manifest.width, verify=False) for record in manifest.shards]
            with disk_full_is_named("the second moments"):
                for done, total in gather(shards, places, len(manifest.checkpoints), partial(write_file, path / name)):
                    yield Progress("curvature", done, total, 0, 0)
            manifest = replace(manifest, curvature=file_record(path / name))
    publish(path, manifest)
    if manifest.curvature != was:
        there = {name, (was or manifest.curvature or {}).get("name")}
        for file in path.glob("curvature-*"):
            if file.suffix == ".safetensors" and file.name not in there:
                file.unlink(missing_ok=True)
    (path / f"{name}.corrupt").unlink(missing_ok=True)


def _record(path: Path, part: Part, ids: Sequence[str] | None = None) -> dict[str, Any]:
    record = _finished(path, part.name, ids, verify=False)
    if record is None:
        raise IndexCorrupt(f"shard {part.name} is not finished: run the job again", shard=part.name)
    return record


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
    codes: Literal["fp16", "int8"],
) -> None:
    # FAISS never returns rows that are not finite and says nothing: flag them, and store zeros.
    finite = torch.isfinite(vectors).all(1) & torch.isfinite(norms).all(1) & (norms > 0).all(1)
    vectors[~finite] = 0
    norms[~finite] = 0
    side = {"norms": norms.numpy(), "loss": loss.numpy(), "finite": finite.numpy().astype(np.uint8)}
    if codes == "int8":
        parts = vectors.unflatten(1, (norms.shape[1], -1))  # [rows, checkpoints, width]
        steps = parts.abs().amax(2).clamp_min(torch.finfo(parts.dtype).tiny) / 127
        vectors = (parts / steps[:, :, None]).round_().flatten(1)
        side["steps"] = steps.numpy()
    files: dict[str, bytes] = {}
    for part, columns in enumerate(vectors.split(disk.LONGEST, 1)):
        flat = faiss.IndexScalarQuantizer(columns.shape[1], disk.QUANTISERS[codes], faiss.METRIC_INNER_PRODUCT)
        index = faiss.IndexIDMap2(flat)
        numbers = np.array([row.number for row in rows], dtype=np.int64)
        index.add_with_ids(np.ascontiguousarray(columns.numpy()), numbers)
        files[f"{name}.faiss" if part == 0 else f"{name}.{part:02d}.faiss"] = faiss.serialize_index(index).tobytes()
    size = sum(map(len, files.values()))
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


def _finished(path: Path, name: str, ids: Sequence[str] | None, verify: bool) -> dict[str, Any] | None:
    """The record of a shard that was finished, with these very rows if `ids` are given; None if it is not whole."""
    try:
        record: dict[str, Any] = json.loads((path / "shards" / f"{name}.json").read_bytes())
        del record["row_ids"]
        same = ids is None or record["ids"] == _hash_ids(ids)
        return record if same and not damaged(path, record, verify) else None
    except (FileNotFoundError, ValueError, KeyError):
        return None


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


def _check_ids(ids: Sequence[str]) -> None:
    if not ids:
        raise SpecError("an index needs at least one row", field="dataset")
    if len(set(ids)) != len(ids):
        raise SpecError("the same row appears twice; remove the duplicates", field="dataset")


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

"""The index on disk: immutable FAISS shards of fp16 unit rows, a sidecar of norms beside each, one manifest.

A shard is written beside its name, synced, renamed and then recorded in a small JSON file with its checksum; the
manifest comes last. So a build that is killed loses at most the shard in hand, and running it again goes on from
there. Rows are ranked by what is stored: one unit vector for each checkpoint, side by side, with float32 norms in the
sidecar (METHODS, "FAISS ranks what is stored"). Adding rows writes new shards; deleting writes tombstones.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save

from app.influence.corpus import Encoder, Example, Row, Template
from app.influence.errors import IndexCorrupt, IndexMissing, Mismatch, SpecError, disk_full_is_named
from app.influence.gradients import gradients, losses, plan_for
from app.influence.models import LoadedModel
from app.influence.projection import ProjectionSpec

__all__ = [
    "Index",
    "IndexSpec",
    "Manifest",
    "Progress",
    "ProjectionSpec",
    "Ranked",
    "append",
    "build",
    "delete",
    "open_index",
]

FORMAT = 1
MANIFEST = "manifest.json"
LONGEST = 2**20  # FAISS reads no longer vectors; longer ones lie side by side in several files
SHARD_NUMBERS = 2**27  # float32 numbers of a shard while it is collected (512 MiB)
FEW = 4  # from so many query vectors on, widening blocks and multiplying beats FAISS's quantiser (docs/decisions.md)
UNRELIABLE = 0.5  # training loss below this share of the held-out loss: METHODS, "Which checkpoint, and which query"


@dataclass(frozen=True)
class IndexSpec:
    """What the numbers of an index mean.

    Attributes:
        normalisation: "layer" divides each module's gradient by its own norm first (RapidIn); "none" does not.
        token_budget: padded tokens a batch.
        shard_rows: rows a shard, the most that a crash can lose.
    """

    projection: ProjectionSpec = field(default_factory=ProjectionSpec)
    normalisation: Literal["none", "layer"] = "none"
    template: Template = "auto"
    max_length: int = 1024
    token_budget: int = 1024
    shard_rows: int = 256


@dataclass(frozen=True)
class Progress:
    """How far a build is, counted over all its checkpoints."""

    stage: str
    rows: int
    total_rows: int
    tokens: int
    total_tokens: int


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json. No clock is in it: the same build gives the same bytes."""

    spec: dict[str, Any]
    width: int
    checkpoints: list[dict[str, Any]]
    fingerprint: dict[str, str]
    attributed: list[dict[str, Any]]
    skipped: list[dict[str, Any]]
    shards: list[dict[str, Any]]
    deleted: list[str]
    stats: dict[str, Any]
    warnings: list[str]
    versions: dict[str, str]
    format: int = FORMAT

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


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
        _write(path / "plan.json", plan)
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
    _publish(path, manifest)
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
        fresh = _read_manifest(path)  # a delete may have been published meanwhile
        shards = [*fresh.shards, *added]
        # A row that was deleted and comes back lives in a new shard: only its old place keeps the tombstone.
        _publish(path, Manifest(**{**fresh.to_dict(), "shards": shards, "stats": _stats(shards)}))
    yield Progress("publish", len(rows), len(rows), 0, 0)


def delete(path: Path, ids: Collection[str]) -> int:
    """Write tombstones; how many of the rows were live. A tombstone names shard and row, so an id can come back."""
    index = open_index(path, verify=False)
    wanted = set(ids)
    marks = [
        f"{shard.name}:{at}"
        for shard in index.shards
        for at, row in enumerate(shard.ids)
        if row in wanted and shard.live[at]
    ]
    if marks:
        manifest = index.manifest
        _publish(path, Manifest(**{**manifest.to_dict(), "deleted": sorted([*manifest.deleted, *marks])}))
    return len(marks)


@dataclass(frozen=True)
class Shard:
    """One mapped shard. `codes` are views of the files: fp16 unit vectors, checkpoint beside checkpoint."""

    name: str
    parts: list[Any]  # FAISS indexes of the columns 0 to LONGEST, LONGEST to 2 LONGEST, ...
    codes: list[NDArray[np.float16]]  # the same columns: [rows, columns]
    ids: list[str]
    norms: NDArray[np.float32]  # [rows, checkpoints]
    live: NDArray[np.bool_]  # neither deleted nor flagged


@dataclass(frozen=True)
class Ranked:
    """A row found; `below` is the share of the index's rows, in percent, that rank below it."""

    id: str
    score: float
    below: float


class Index:
    """An open index. Shards are immutable: concurrent searches are safe."""

    def __init__(self, path: Path, manifest: Manifest, shards: list[Shard]) -> None:
        self.path, self.manifest, self.shards = path, manifest, shards
        self.ids = [row for shard in shards for row, live in zip(shard.ids, shard.live, strict=True) if live]

    @property
    def rows(self) -> int:
        """Rows that a query can find."""
        return len(self.ids)

    def check(self, model: LoadedModel) -> None:
        """Raises `Mismatch` when the model is not the one that the index was built from."""
        was, now = self.manifest.fingerprint, model.fingerprint
        keys = {*was, *now}
        differs = {k: (was.get(k, ""), now.get(k, "")) for k in keys if was.get(k) != now.get(k)}
        if differs:
            names = ", ".join(sorted(differs))
            detail = (
                f"the index was built from another model ({names} differ): rebuild it, or use the model it came from"
            )
            raise Mismatch(detail, differs=differs)

    def scores(self, vectors: torch.Tensor, normalize: Literal["none", "unit"]) -> torch.Tensor:
        """Exact scores of every live row, in the order of `ids`.

        Args:
            vectors: [queries, checkpoints * width] float32, weighted; unit per checkpoint if `normalize` is "unit".

        Returns:
            [queries, rows]
        """
        found = []
        for shard in self.shards:
            scores = torch.zeros(len(vectors), len(shard.ids))
            for part, codes in enumerate(shard.codes):
                self._scan(shard, torch.from_numpy(codes), part * LONGEST, vectors, normalize, scores)
            found.append(scores[:, torch.from_numpy(shard.live)])
        return torch.cat(found, 1)

    def _scan(
        self,
        shard: Shard,
        codes: torch.Tensor,
        first: int,
        vectors: torch.Tensor,
        normalize: str,
        scores: torch.Tensor,
    ) -> None:
        """Add the part of the scores that columns from `first` on give, block by block in one re-used buffer."""
        columns = codes.shape[1]
        block = torch.empty(max(1, min(len(codes), 2**21 // columns)), columns)
        of = torch.arange(first, first + columns) // self.manifest.width  # each column's checkpoint
        query = vectors[:, first : first + columns].T.contiguous()
        for start in range(0, len(codes), len(block)):
            part = block[: len(codes) - start]
            part.copy_(codes[start : start + len(part)])
            norms = torch.from_numpy(shard.norms[start : start + len(part)])
            place = slice(start, start + len(part))
            if normalize == "unit":
                scores[:, place] += (part @ query).T
            else:
                for checkpoint in range(int(of[0]), int(of[-1]) + 1):
                    mine = of == checkpoint
                    scores[:, place] += ((part[:, mine] @ query[mine]) * norms[:, [checkpoint]]).T

    def top(
        self, vectors: torch.Tensor, k: int, normalize: Literal["none", "unit"], largest: bool
    ) -> list[list[Ranked]]:
        """The k live rows of the highest (or lowest) score for each query; `vectors` as in `scores`.

        Few queries by cosine are FAISS's, which ranks the stored unit vectors; the rest is the exact block scan.
        """
        k = min(k, self.rows)
        if normalize == "unit" and len(vectors) < FEW and all(len(s.parts) == 1 for s in self.shards):
            found = [self._search(vector if largest else -vector, k) for vector in vectors]
            sign = 1 if largest else -1
            return [
                [Ranked(row, sign * score, self._below(at, largest)) for at, (row, score) in enumerate(one)]
                for one in found
            ]
        scores, places = self.scores(vectors, normalize).topk(k, largest=largest)
        return [
            [Ranked(self.ids[i], s, self._below(at, largest)) for at, (s, i) in enumerate(zip(*one, strict=True))]
            for one in zip(scores.tolist(), places.tolist(), strict=True)
        ]

    def _below(self, rank: int, largest: bool) -> float:
        return 100 * (self.rows - 1 - rank if largest else rank) / self.rows

    def _search(self, vector: torch.Tensor, k: int) -> list[tuple[str, float]]:
        """FAISS over each shard, merged."""
        if k == 0:
            return []
        heap = faiss.ResultHeap(1, k, keep_max=True)
        names: list[str] = []
        query = vector.numpy()[None]
        for shard in self.shards:
            live = np.flatnonzero(shard.live)
            if len(live) == 0:
                continue
            flat = faiss.downcast_index(shard.parts[0].index)
            params = None
            if len(live) < len(shard.ids):
                selector = faiss.IDSelectorBatch(live)
                params = faiss.SearchParameters(sel=selector)  # type: ignore[call-arg]  # its stubs miss it
            found, at = flat.search(query, min(k, len(live)), params=params)
            heap.add_result(found, at + len(names))
            names += shard.ids
        heap.finalize()
        return [(names[i], float(s)) for i, s in zip(heap.I[0], heap.D[0], strict=True) if i >= 0]

    def vectors(self, ids: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Stored unit vectors [n, checkpoints * width] and norms [n, checkpoints] of rows."""
        place = {r: (s, at) for s in self.shards for at, r in enumerate(s.ids) if s.live[at]}
        found = [place[row] for row in ids]
        codes = np.stack([np.concatenate([part[at] for part in s.codes]) for s, at in found]).astype(np.float32)
        return torch.from_numpy(codes), torch.from_numpy(np.stack([s.norms[at] for s, at in found]))


def open_index(path: Path, verify: bool = True) -> Index:
    """Open an index for reading; `verify` reads every byte against its checksum.

    Raises:
        IndexMissing: no manifest. IndexCorrupt: a shard is missing or altered; it is set aside as *.corrupt.
    """
    manifest = _read_manifest(path)
    deleted = set(manifest.deleted)
    shards = []
    for record in manifest.shards:
        name = record["name"]
        if not _intact(path, record, verify):
            for file, _ in record["files"]:
                if (path / "shards" / file).exists():
                    (path / "shards" / file).rename(path / "shards" / f"{file}.corrupt")
            detail = (
                f"shard {name} is not what was written (checksum or size differ); it was set aside, rebuild the index"
            )
            raise IndexCorrupt(detail, shard=name)
        parts, codes = [], []
        for file, _ in record["files"]:
            index: Any = faiss.read_index(str(path / "shards" / file), faiss.IO_FLAG_MMAP_IFC)
            flat: Any = faiss.downcast_index(index.index)
            raw = faiss.rev_swig_ptr(flat.codes.data(), flat.ntotal * flat.code_size)
            parts.append(index)
            codes.append(raw.view(np.float16).reshape(flat.ntotal, -1))
        side = load_file(path / "shards" / f"{name}.safetensors")
        numbers = faiss.vector_to_array(parts[0].id_map)
        ids = [f"{int(n):016x}" for n in numbers]
        live = np.array(
            [bool(ok) and f"{name}:{at}" not in deleted for at, ok in enumerate(side["finite"])], dtype=bool
        )
        shards.append(Shard(name, parts, codes, ids, side["norms"], live))
    return Index(path, manifest, shards)


def unit(vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of length one and their norms: [n, width], [n]."""
    norms = vectors.norm(dim=1)
    return vectors / norms.clamp_min(torch.finfo(vectors.dtype).tiny).unsqueeze(1), norms


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
                    units, lengths = unit(found.vectors.float().cpu())
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
    for part, columns in enumerate(vectors.split(LONGEST, 1)):
        flat = faiss.IndexScalarQuantizer(columns.shape[1], faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
        index = faiss.IndexIDMap2(flat)
        index.add_with_ids(np.ascontiguousarray(columns.numpy()), np.array(ids, dtype=np.int64))
        files[f"{name}.faiss" if part == 0 else f"{name}.{part:02d}.faiss"] = faiss.serialize_index(index).tobytes()
    side = save({"norms": norms.numpy(), "loss": loss.numpy(), "finite": finite.numpy().astype(np.uint8)})
    with disk_full_is_named(f"shard {name}"):
        for file, content in (*files.items(), (f"{name}.safetensors", side)):
            _write(path / "shards" / file, content)
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
        _write(path / "shards" / f"{name}.json", json.dumps(record).encode())
    return record


def _finished(path: Path, name: str, ids: list[int]) -> dict[str, Any] | None:
    """The record of a shard that an earlier run finished with these very rows."""
    file = path / "shards" / f"{name}.json"
    if not file.exists():
        return None
    record: dict[str, Any] = json.loads(file.read_bytes())
    same = record["ids"] == hashlib.sha256(json.dumps(ids).encode()).hexdigest()
    return record if same and _intact(path, record, verify=True) else None


def _intact(path: Path, record: dict[str, Any], verify: bool) -> bool:
    files = {path / "shards" / file: digest for file, digest in record["files"]}
    side = path / "shards" / f"{record['name']}.safetensors"
    if not side.is_file() or not all(file.is_file() for file in files):
        return False
    if sum(file.stat().st_size for file in files) != record["bytes"]:
        return False
    files[side] = record["sidecar_sha256"]
    return not verify or all(_sha256(file) == digest for file, digest in files.items())


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


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


def _publish(path: Path, manifest: Manifest) -> None:
    with disk_full_is_named("the manifest"):
        _write(path / MANIFEST, json.dumps(manifest.to_dict(), indent=1, sort_keys=True).encode())


def _read_manifest(path: Path) -> Manifest:
    file = path / MANIFEST
    if not file.is_file():
        raise IndexMissing(f"there is no finished index in '{path.name}'", field="index")
    try:
        return Manifest(**json.loads(file.read_bytes()))
    except (ValueError, TypeError) as error:
        raise IndexCorrupt(f"the manifest cannot be read: {error}", shard=MANIFEST) from error


def _write(file: Path, content: bytes) -> None:
    """All of it or nothing: beside the name, synced, then renamed."""
    part = file.with_name(file.name + ".part")
    try:
        with part.open("wb") as opened:
            opened.write(content)
            opened.flush()
            os.fsync(opened.fileno())
    except OSError:
        part.unlink(missing_ok=True)  # give the room back
        raise
    part.replace(file)
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def remove(path: Path) -> None:
    """Delete an index's files."""
    shutil.rmtree(path, ignore_errors=True)

"""The index on disk and in use: immutable FAISS shards of fp16 unit rows, a sidecar of norms beside each, one manifest.

Rows are ranked by what is stored: one unit vector for each checkpoint, side by side, with float32 norms in the sidecar
(METHODS, "FAISS ranks what is stored"). Shards are never changed: `building.py` adds new ones, `delete` writes
tombstones into the manifest, and both publish it by one rename.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file

from app.influence.corpus import Template
from app.influence.errors import IndexCorrupt, IndexMissing, Mismatch, disk_full_is_named
from app.influence.models import LoadedModel
from app.influence.projection import ProjectionSpec

FORMAT = 1
MANIFEST = "manifest.json"
WRITES = 5
LONGEST = 2**20  # FAISS reads no longer vectors; longer ones lie side by side in several files
FEW = 4  # from so many query vectors on, widening blocks and multiplying beats FAISS's quantiser (docs/decisions.md)


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

    @property
    def index_spec(self) -> IndexSpec:
        """What it was built as."""
        return IndexSpec(**{**self.spec, "projection": ProjectionSpec(**self.spec["projection"])})

    @property
    def weights(self) -> list[float]:
        """Of the checkpoints."""
        return [checkpoint["weight"] for checkpoint in self.checkpoints]


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
        publish(path, replace(manifest, deleted=sorted([*manifest.deleted, *marks])))
    return len(marks)


@dataclass(frozen=True)
class Shard:
    """One mapped shard. `codes` are views of the files: fp16 unit vectors, checkpoint beside checkpoint."""

    name: str
    parts: list[Any]  # FAISS indexes of the columns 0 to LONGEST, LONGEST to 2 LONGEST, ...
    codes: list[NDArray[np.float16]]  # the same columns: [rows, columns]
    ids: list[str]
    norms: NDArray[np.float32]  # [rows, checkpoints]
    kept: NDArray[np.bool_]  # not deleted
    live: NDArray[np.bool_]  # nor flagged


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
        self._places = {row: (s, at) for s in shards for at, row in enumerate(s.ids) if s.live[at]}

    @property
    def rows(self) -> int:
        """Rows that a query can find."""
        return len(self.ids)

    def check(self, model: LoadedModel) -> None:
        """Raises `Mismatch` when the model is not the one that the index was built from."""
        check(self.manifest, model)

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
        starts = np.cumsum([0, *(len(shard.ids) for shard in self.shards)])
        query = vector.numpy()[None]
        for shard, start in zip(self.shards, starts[:-1], strict=True):
            live = np.flatnonzero(shard.live)
            if len(live) == 0:
                continue
            flat = faiss.downcast_index(shard.parts[0].index)
            params = None
            if len(live) < len(shard.ids):
                selector = faiss.IDSelectorBatch(live)
                params = faiss.SearchParameters(sel=selector)  # type: ignore[call-arg]  # its stubs miss it
            found, at = flat.search(query, min(k, len(live)), params=params)
            heap.add_result(found, at + start)
        heap.finalize()
        places = [(int(np.searchsorted(starts, i, side="right")) - 1, int(i)) for i in heap.I[0] if i >= 0]
        names = [self.shards[shard].ids[at - int(starts[shard])] for shard, at in places]
        return list(zip(names, heap.D[0].tolist(), strict=False))

    def vectors(self, ids: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Stored unit vectors [n, checkpoints * width] and norms [n, checkpoints] of rows."""
        found = [self._places[row] for row in ids]
        codes = np.stack([np.concatenate([part[at] for part in s.codes]) for s, at in found]).astype(np.float32)
        return torch.from_numpy(codes), torch.from_numpy(np.stack([s.norms[at] for s, at in found]))


def open_index(path: Path, verify: bool = True) -> Index:
    """Open an index for reading; `verify` reads every byte against its checksum.

    Raises:
        IndexMissing: no manifest. IndexCorrupt: a shard is missing or altered; it is set aside as *.corrupt.
    """
    manifest = read_manifest(path)
    deleted = set(manifest.deleted)
    shards = []
    for record in manifest.shards:
        name = record["name"]
        bad = damaged(path, record, verify)
        if bad:
            for file in bad:
                if file.exists():
                    file.replace(file.with_name(f"{file.name}.corrupt"))
            names = ", ".join(file.name for file in bad)
            detail = f"shard {name} is not what was written ({names}: checksum or size); it was set aside: repair it"
            raise IndexCorrupt(detail, shard=name)
        parts, codes = [], []
        faiss.set_deserialization_vector_byte_limit(record["bytes"])
        for file_name, _, _ in record["files"][:-1]:
            index: Any = faiss.read_index(str(path / "shards" / file_name), faiss.IO_FLAG_MMAP_IFC)
            flat: Any = faiss.downcast_index(index.index)
            raw = faiss.rev_swig_ptr(flat.codes.data(), flat.ntotal * flat.code_size)
            parts.append(index)
            codes.append(raw.view(np.float16).reshape(flat.ntotal, -1))
        side = load_file(path / "shards" / f"{name}.safetensors")
        ids = [f"{int(n):016x}" for n in faiss.vector_to_array(parts[0].id_map)]
        kept = np.array([f"{name}:{at}" not in deleted for at in range(len(ids))], dtype=bool)
        shards.append(Shard(name, parts, codes, ids, side["norms"], kept, kept & side["finite"].astype(bool)))
    return Index(path, manifest, shards)


def check(manifest: Manifest, model: LoadedModel) -> None:
    """Raises `Mismatch` when the model is not the one that the index was built from."""
    was, now = manifest.fingerprint, model.fingerprint
    differs = {k: (was.get(k, ""), now.get(k, "")) for k in {*was, *now} if was.get(k) != now.get(k)}
    if differs:
        names = ", ".join(sorted(differs))
        detail = f"the index was built from another model ({names} differ): rebuild it, or use the model it came from"
        raise Mismatch(detail, differs=differs)


def damaged(path: Path, record: dict[str, Any], verify: bool) -> list[Path]:
    """The files of a shard that are not those of its record: by size, and by checksum if `verify`."""
    bad = []
    for name, size, digest in record["files"]:
        file = path / "shards" / name
        if not file.is_file() or file.stat().st_size != size or (verify and _sha256(file) != digest):
            bad.append(file)
    return bad


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def publish(path: Path, manifest: Manifest) -> None:
    """Make a manifest the index's, in one rename."""
    with disk_full_is_named("the manifest"):
        write_file(path / MANIFEST, json.dumps(manifest.to_dict(), indent=1, sort_keys=True).encode())


def read_manifest(path: Path) -> Manifest:
    """The manifest of a finished index."""
    file = path / MANIFEST
    if not file.is_file():
        raise IndexMissing(f"there is no finished index in '{path.name}'", field="index")
    try:
        manifest = Manifest(**json.loads(file.read_bytes()))
    except (ValueError, TypeError) as error:
        raise IndexCorrupt(f"the manifest cannot be read: {error}", shard=MANIFEST) from error
    if manifest.format != FORMAT:
        detail = f"the index has format {manifest.format}, this version reads {FORMAT}: build it again"
        raise IndexCorrupt(detail, shard=MANIFEST)
    return manifest


def remove_parts(path: Path) -> None:
    """Remove the half-written files that killed writers left in an index's folder."""
    for part in (*path.glob("*.part"), *path.glob("shards/*.part")):
        part.unlink(missing_ok=True)


def write_file(file: Path, content: bytes) -> None:
    """All of it or nothing: beside the name, synced, then renamed. Two writers at once do not meet."""
    for _ in range(WRITES):
        part = file.with_name(f"{file.name}.{secrets.token_hex(4)}.part")
        try:
            with part.open("wb") as opened:
                opened.write(content)
                opened.flush()
                os.fsync(opened.fileno())
        except OSError:
            part.unlink(missing_ok=True)  # give the room back
            raise
        with contextlib.suppress(FileNotFoundError):  # another process swept it up as a killed writer's: once more
            part.replace(file)
            break
    else:
        raise FileNotFoundError(errno.ENOENT, "something removes what is being written", str(file))
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)

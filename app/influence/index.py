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
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from app.influence.corpus import Template
from app.influence.curvature import Curvature, blocks, load
from app.influence.errors import IndexCorrupt, IndexMissing, Mismatch, SpecError, disk_full_is_named
from app.influence.projection import ProjectionSpec
from app.influence.shape import require_shape

if TYPE_CHECKING:  # a process that only searches need not wait for transformers
    from app.influence.models import LoadedModel

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
    normalisation: Literal["none", "layer"] = "layer"
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
    curvature: dict[str, Any] | None = (
        None  # the file of the second moments; None: there is none (`blocks` may say why)
    )

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

    def blocks(self) -> list[slice]:
        """Of a checkpoint's vector, for the second moments; ValueError: they would not fit."""
        return blocks(self.index_spec.projection, self.attributed, self.width)

    def files(self) -> list[str]:
        """All that it names, within the index's folder."""
        found = [f"shards/{name}" for shard in self.shards for name, *_ in shard["files"]]
        return found if self.curvature is None else [*found, self.curvature["name"]]


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


Normalize = Literal["none", "unit", "scaled"]
"""What a stored unit vector is multiplied by: its row's norm, nothing, or its scale in the curvature."""
Best = tuple[NDArray[np.float32], NDArray[np.int64]]
"""A shard's best rows for each query, [queries, k] each: scores (negated where the lowest are wanted) and places."""


@dataclass(frozen=True)
class Rows:
    """A shard's rows: what a search needs to know of a shard that it does not hold."""

    name: str
    ids: list[str]
    live: NDArray[np.bool_]  # neither deleted nor flagged


@dataclass(frozen=True)
class Shard(Rows):
    """One mapped shard. `codes` are views of the files: fp16 unit vectors, checkpoint beside checkpoint."""

    parts: list[Any]  # FAISS indexes of the columns 0 to LONGEST, LONGEST to 2 LONGEST, ...
    codes: list[NDArray[np.float16]]  # the same columns: [rows, columns]
    norms: NDArray[np.float32]  # [rows, checkpoints]
    kept: NDArray[np.bool_]  # not deleted
    scales: NDArray[np.float32] | None = None  # [rows, checkpoints], where there is a curvature

    def units(self, at: slice, columns: slice) -> NDArray[np.float16]:
        """Some columns of a run of rows."""
        firsts = range(0, len(self.codes) * LONGEST, LONGEST)
        ends = [(max(columns.start - first, 0), max(columns.stop - first, 0)) for first in firsts]
        return np.concatenate([part[at, a:b] for part, (a, b) in zip(self.codes, ends, strict=True)], axis=1)

    def scores(
        self, vectors: torch.Tensor, normalize: Normalize, width: int, device: torch.device | str = "cpu"
    ) -> torch.Tensor:
        """Exact scores [queries, rows] of every row; `vectors` as in `Index.scores`, `width` of one checkpoint."""
        scores = torch.zeros(len(vectors), len(self.ids), device=device)
        for part, codes in enumerate(self.codes):
            self._scan(torch.from_numpy(codes), part * LONGEST, vectors.to(device), normalize, width, scores)
        return scores.cpu()

    def _scan(
        self,
        codes: torch.Tensor,
        first: int,
        vectors: torch.Tensor,
        normalize: Normalize,
        width: int,
        scores: torch.Tensor,
    ) -> None:
        """Add the part of the scores that columns from `first` on give, block by block in one re-used buffer."""
        columns = codes.shape[1]
        factors = self.scales if normalize == "scaled" and self.scales is not None else self.norms
        block = torch.empty(max(1, min(len(codes), 2**21 // columns)), columns, device=scores.device)
        of = torch.arange(first, first + columns) // width  # each column's checkpoint
        query = vectors[:, first : first + columns].T.contiguous()
        for start in range(0, len(codes), len(block)):
            part = block[: len(codes) - start]
            part.copy_(codes[start : start + len(part)])
            norms = torch.from_numpy(factors[start : start + len(part)]).to(scores.device)
            place = slice(start, start + len(part))
            if normalize == "unit":
                scores[:, place] += (part @ query).T
            else:
                for checkpoint in range(int(of[0]), int(of[-1]) + 1):
                    mine = of == checkpoint
                    scores[:, place] += ((part[:, mine] @ query[mine]) * norms[:, [checkpoint]]).T

    def best(
        self,
        vectors: torch.Tensor,
        k: int,
        normalize: Normalize,
        largest: bool,
        allowed: NDArray[np.bool_],
        width: int,
        device: torch.device | str = "cpu",
    ) -> Best:
        """The k best rows (or all, if they are fewer) that are allowed.

        Few queries by cosine are FAISS's, which ranks the stored unit vectors; the rest is the exact block scan.
        """
        places = np.flatnonzero(allowed)
        k = min(k, len(places))
        if k == 0:
            return np.empty((len(vectors), 0), np.float32), np.empty((len(vectors), 0), np.int64)
        if normalize == "unit" and len(vectors) < FEW and len(self.parts) == 1 and str(device) == "cpu":
            return self._search(vectors if largest else -vectors, k, places)
        scores = self.scores(vectors, normalize, width, device)[:, torch.from_numpy(places)]
        found, at = (scores if largest else -scores).topk(k)
        return found.numpy(), places[at.numpy()]

    def _search(self, vectors: torch.Tensor, k: int, places: NDArray[np.int64]) -> Best:
        flat = faiss.downcast_index(self.parts[0].index)
        params = None
        if len(places) < len(self.ids):
            selector = faiss.IDSelectorBatch(places)
            params = faiss.SearchParameters(sel=selector)  # type: ignore[call-arg]  # its stubs miss it
        found = [flat.search(vector[None].numpy(), k, params=params) for vector in vectors]
        return np.concatenate([scores for scores, _ in found]), np.concatenate([at for _, at in found])

    def stored(self, places: Sequence[int]) -> tuple[NDArray[np.float16], NDArray[np.float32]]:
        """Unit vectors [n, checkpoints * width] and norms [n, checkpoints] of rows by their places."""
        at = list(places)
        return np.concatenate([part[at] for part in self.codes], axis=1), self.norms[at]


@dataclass(frozen=True)
class Ranked:
    """A row found; `below` is the share of the rows that may be found, in percent, that rank below it."""

    id: str
    score: float
    below: float


class Searchable(ABC):
    """Ranks the rows of shards, wherever they are: in this process (`Index`) or elsewhere (`sharded.ShardedIndex`)."""

    def __init__(
        self, path: Path, manifest: Manifest, shards: Sequence[Rows], curvature: Curvature | None = None
    ) -> None:
        self.path, self.manifest, self._rows, self.curvature = path, manifest, shards, curvature
        self.ids = [row for shard in shards for row, live in zip(shard.ids, shard.live, strict=True) if live]
        self._places = {row: (n, at) for n, s in enumerate(shards) for at, row in enumerate(s.ids) if s.live[at]}
        self.opened: dict[str, Any] = {}  # what else of its folder was read, by whom it was

    @property
    def rows(self) -> int:
        """Rows that a query can find."""
        return len(self.ids)

    def check(self, model: LoadedModel) -> None:
        """Raises `Mismatch` when the model is not the one that the index was built from."""
        check(self.manifest, model)

    def top(
        self,
        vectors: torch.Tensor,
        k: int,
        normalize: Normalize,
        largest: bool,
        among: Collection[str] | None = None,
    ) -> list[list[Ranked]]:
        """The k live rows of the highest (or lowest) score for each query: the best of each shard's best.

        Args:
            vectors: [queries, checkpoints * width] float32, weighted; unit per checkpoint if `normalize` is "unit".
            normalize: "scaled" only where there is a curvature.
            among: ids of the only rows that may be found; ids that the index does not have are no matter.
        """
        allowed = self._allowed(among)
        rows = sum(int(mask.sum()) for mask in allowed)
        k = min(k, rows)
        if k == 0:
            return [[] for _ in vectors]
        heap = faiss.ResultHeap(len(vectors), k, keep_max=True)
        starts = np.cumsum([0, *(len(shard.ids) for shard in self._rows)])
        for (scores, at), start in zip(self.best(vectors, k, normalize, largest, allowed), starts[:-1], strict=True):
            heap.add_result(scores, at + start)
        heap.finalize()
        owners = np.searchsorted(starts, heap.I, side="right") - 1
        sign = 1 if largest else -1
        return [
            [
                Ranked(
                    self._rows[owner].ids[place - starts[owner]],
                    sign * score,
                    100 * (rows - 1 - rank if largest else rank) / rows,
                )
                for rank, (score, place, owner) in enumerate(zip(*one, strict=True))
            ]
            for one in zip(heap.D.tolist(), heap.I.tolist(), owners.tolist(), strict=True)
        ]

    def _allowed(self, among: Collection[str] | None) -> list[NDArray[np.bool_]]:
        """For each shard [rows]: which may be found."""
        if among is None:
            return [shard.live for shard in self._rows]
        masks = [np.zeros(len(shard.ids), dtype=bool) for shard in self._rows]
        for row in among:
            if row in self._places:
                shard, at = self._places[row]
                masks[shard][at] = True
        return masks

    def vectors(self, ids: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Stored unit vectors [n, checkpoints * width] and norms [n, checkpoints] of rows."""
        places: dict[int, list[int]] = {}
        for row in ids:
            shard, at = self._places[row]
            places.setdefault(shard, []).append(at)
        found = {
            (shard, at): (code, norm)
            for shard, (codes, norms) in self.stored(places).items()
            for at, code, norm in zip(places[shard], codes, norms, strict=True)
        }
        codes, norms = zip(*(found[self._places[row]] for row in ids), strict=True)
        return torch.from_numpy(np.stack(codes).astype(np.float32)), torch.from_numpy(np.stack(norms))

    def scales(self, ids: Sequence[str]) -> torch.Tensor:
        """The curvature's scales [n, checkpoints] of rows."""
        assert self.curvature is not None
        starts = np.cumsum([0, *(len(shard.ids) for shard in self._rows)])
        places = [self._places[row] for row in ids]
        return torch.from_numpy(self.curvature.scales[[starts[shard] + at for shard, at in places]])

    @abstractmethod
    def best(
        self,
        vectors: torch.Tensor,
        k: int,
        normalize: Normalize,
        largest: bool,
        allowed: Sequence[NDArray[np.bool_]],
    ) -> Sequence[Best]:
        """`Shard.best` of every shard."""

    @abstractmethod
    def stored(
        self, places: Mapping[int, Sequence[int]]
    ) -> Mapping[int, tuple[NDArray[np.float16], NDArray[np.float32]]]:
        """`Shard.stored` of rows by their shards' numbers."""


class Index(Searchable):
    """An index whose shards are mapped here. Shards are immutable: concurrent searches are safe."""

    def __init__(self, path: Path, manifest: Manifest, shards: list[Shard], curvature: Curvature | None) -> None:
        super().__init__(path, manifest, shards, curvature)
        self.shards = shards

    def scores(self, vectors: torch.Tensor, normalize: Normalize) -> torch.Tensor:
        """Exact scores [queries, rows] of every live row, in the order of `ids`; `vectors` as in `top`."""
        width = self.manifest.width
        each = [s.scores(vectors, normalize, width)[:, torch.from_numpy(s.live)] for s in self.shards]
        return torch.cat([torch.zeros(len(vectors), 0), *each], 1)  # without a shard there are no rows

    def best(
        self,
        vectors: torch.Tensor,
        k: int,
        normalize: Normalize,
        largest: bool,
        allowed: Sequence[NDArray[np.bool_]],
    ) -> Sequence[Best]:
        """One shard after the other."""
        width = self.manifest.width
        return [s.best(vectors, k, normalize, largest, m, width) for s, m in zip(self.shards, allowed, strict=True)]

    def stored(
        self, places: Mapping[int, Sequence[int]]
    ) -> Mapping[int, tuple[NDArray[np.float16], NDArray[np.float32]]]:
        """From the mapped files."""
        return {shard: self.shards[shard].stored(at) for shard, at in places.items()}


def open_index(path: Path, verify: bool = True) -> Index:
    """Open an index for reading; `verify` reads every byte against its checksum.

    Raises:
        IndexMissing: no manifest. IndexCorrupt: a shard, or the file of second moments, is missing or altered; it is
            set aside as *.corrupt.
    """
    manifest = read_manifest(path)
    deleted = set(manifest.deleted)
    curvature = open_curvature(path, manifest, verify)
    each = zip(manifest.shards, scales_of(manifest, curvature), strict=True)
    shards = [open_shard(path, record, deleted, manifest.width, verify, scales) for record, scales in each]
    return Index(path, manifest, shards, curvature)


def open_curvature(path: Path, manifest: Manifest, verify: bool) -> Curvature | None:
    """Map the second moments of an index, if it has any.

    Raises:
        IndexCorrupt: they are missing or altered; the file is set aside as *.corrupt.
    """
    if manifest.curvature is None:
        return None
    name = manifest.curvature["name"]
    if curvature_damaged(path, manifest, verify):
        with contextlib.suppress(FileNotFoundError):
            (path / name).replace(path / f"{name}.corrupt")
        detail = f"{name} is not what was written (checksum or size); it was set aside: repair the index"
        raise IndexCorrupt(detail, shard=name)
    try:
        rows = sum(record["rows"] for record in manifest.shards)
        return load(path / name, manifest.blocks(), len(manifest.checkpoints), rows)
    except (ValueError, LookupError, SafetensorError) as error:
        detail = f"{name} has the bytes that the manifest names, and they are no second moments of its index: {error}"
        raise IndexCorrupt(detail, shard=name) from error


def curvature_damaged(path: Path, manifest: Manifest, verify: bool) -> bool:
    """Whether the file of second moments is not that of the manifest: by size, and by checksum if `verify`."""
    record = manifest.curvature
    return record is not None and not _is_whole(path / record["name"], record["size"], record["digest"], verify)


def scales_of(manifest: Manifest, curvature: Curvature | None) -> list[NDArray[np.float32] | None]:
    """Each shard's part of the curvature's scales."""
    if curvature is None:
        return [None] * len(manifest.shards)
    ends = np.cumsum([record["rows"] for record in manifest.shards])
    return list(np.split(curvature.scales, ends[:-1]))


def open_shard(
    path: Path,
    record: dict[str, Any],
    deleted: Collection[str],
    width: int,
    verify: bool,
    scales: NDArray[np.float32] | None = None,
) -> Shard:
    """Map one shard of an index: its record in the manifest, the manifest's tombstones and width, its rows' scales.

    Raises:
        IndexCorrupt: it is missing or altered; it is set aside as *.corrupt.
    """
    name = record["name"]
    bad = damaged(path, record, verify)
    if bad:
        for file in bad:
            if file.exists():
                file.replace(file.with_name(f"{file.name}.corrupt"))
        names = ", ".join(file.name for file in bad)
        detail = f"shard {name} is not what was written ({names}: checksum or size); it was set aside: repair it"
        raise IndexCorrupt(detail, shard=name)
    try:
        return replace(_map_shard(path, record, deleted, width), scales=scales)
    except (ArithmeticError, RuntimeError, ValueError, LookupError, AttributeError, SafetensorError) as error:
        detail = f"shard {name} has the bytes that the manifest names, and they are no shard of its index: {error}"
        raise IndexCorrupt(detail, shard=name) from error


def _map_shard(path: Path, record: dict[str, Any], deleted: Collection[str], width: int) -> Shard:
    name, checkpoints = record["name"], len(record["loss"])
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
    if sum(part.shape[1] for part in codes) != width * checkpoints:
        raise ValueError(f"its vectors are not of {width} numbers for each of {checkpoints} checkpoints")
    if side["norms"].shape != (len(ids), checkpoints) or side["finite"].shape != (len(ids),):
        raise ValueError("its norms are not those of its rows")
    kept = np.array([f"{name}:{at}" not in deleted for at in range(len(ids))], dtype=bool)
    return Shard(name, ids, kept & side["finite"].astype(bool), parts, codes, side["norms"], kept)


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
        if not _is_whole(file, size, digest, verify):
            bad.append(file)
    return bad


def file_record(file: Path) -> dict[str, Any]:
    """Name, size and checksum, as a manifest has them."""
    return {"name": file.name, "size": file.stat().st_size, "digest": _sha256(file)}


def _is_whole(file: Path, size: int, digest: str, verify: bool) -> bool:
    return file.is_file() and file.stat().st_size == size and not (verify and _sha256(file) != digest)


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
        read = json.loads(file.read_bytes())
        manifest = Manifest(**read)
    except (ValueError, TypeError, RecursionError) as error:
        raise IndexCorrupt(f"the manifest cannot be read: {error}", shard=MANIFEST) from error
    if manifest.format != FORMAT:
        detail = f"the index has format {manifest.format}, this version reads {FORMAT}: build it again"
        raise IndexCorrupt(detail, shard=MANIFEST)
    try:
        require_shape(read)
        _ = manifest.index_spec
    except (ValueError, TypeError, KeyError, SpecError) as error:
        what = str(error).partition("\n")[2] or str(error)
        raise IndexCorrupt(f"the manifest is not one that Headwater wrote: {what}", shard=MANIFEST) from error
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

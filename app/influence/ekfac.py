"""EK-FAC: the curvature of each attributed module in Kronecker-factored eigenbases, fitted over the training rows.

For a module with weight gradient G = sum_s d_s a_s^T [d_out, d_in] the Fisher matrix F = E[vec(G) vec(G)^T] is taken to
be diagonal in the basis of the products q_out q_in^T (George et al., 2018; Grosse et al., 2023):

    F ~ (Q_out (x) Q_in) diag(Lambda) (Q_out (x) Q_in)^T,   Lambda = E[(Q_out^T G Q_in)^2], coordinate by coordinate

Two passes over the rows for each checkpoint: the first gathers what the bases diagonalise, the second Lambda. The
targets' labels are drawn from the model (the true Fisher); the loss is summed over a row's targets and divided by the
root of their number, so that a row weighs as its mean loss does. The bases are those of E[G G^T] and E[G^T G], which
cost no more than the published E[d d^T] and E[a a^T] ("position") and measured better (docs/decisions.md):

    E[G^T G] = E[sum_{s,s'} <d_s, d_s'> a_s a_s'^T], where the published one has 1 for s = s' and else 0

A fit is a sequence of small steps in a fixed order; how far it is lies on disk with its sums, so that one that was
killed ends with the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save

from app.influence.building import Progress, batches
from app.influence.corpus import Encoder, Example, Row
from app.influence.errors import FactorsCorrupt, FactorsMissing, RowError, SpecError, disk_full_is_named
from app.influence.exact import Lens, formed
from app.influence.files import is_whole
from app.influence.gradients import hooked, target_logits
from app.influence.index import open_index, write_file
from app.influence.models import Checkpoint, LoadedModel
from app.influence.shape import require_factors_shape

Item = TypeVar("Item")
RECORD = "ekfac.json"
FOLDER = "ekfac"
FORMAT = 1
DAMPING = 0.03
"""Added to the eigenvalues of a module, relative to their mean."""
ENOUGH = 1_000
"""Draws of a row's labels are repeated (at most `MOST_DRAWS` times) until rows x draws are so many."""
MOST_DRAWS = 4
KEEP_EVERY_S = 60.0
"""How often the sums are written down: what a kill can cost."""
Stage = Literal["covariances", "eigenvectors", "eigenvalues"]


@dataclass(frozen=True)
class EkfacSpec:
    """How factors are fitted.

    Attributes:
        rows: the most that they are fitted on, evenly spaced over what there is.
        labels: "sampled" from the model, or the rows' own ("true": the empirical Fisher of their mean losses).
        basis: "row" of whole rows' gradients, or "position", as published.
        draws: of a row's labels; 0: as many as a small set of rows needs.
        seed: of the draws.
    """

    rows: int = 10_000
    labels: Literal["sampled", "true"] = "sampled"
    basis: Literal["row", "position"] = "row"
    draws: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be fitted."""
        if self.rows < 1:
            raise SpecError("factors need at least one row", field="rows")
        if self.draws < 0:
            raise SpecError("draws is at least 1, or 0 for the usual number", field="draws")

    def drawn(self, rows: int) -> int:
        """How often labels are drawn of so many rows."""
        if self.labels == "true":
            return 1
        return self.draws or min(MOST_DRAWS, math.ceil(ENOUGH / rows))


def factor_bytes(modules: Iterable[tuple[int, int]]) -> int:
    """What the factors of modules (d_out, d_in) take for each checkpoint, on disk and while they are fitted or used."""
    return sum(4 * (d_out * d_out + d_in * d_in + d_out * d_in) for d_out, d_in in modules)


@dataclass(frozen=True)
class Record:
    """The content of ekfac.json, which makes the factors exist.

    Attributes:
        files: by checkpoint, [name, bytes, sha256].
        rows: how many they were fitted on, of `of` that the index held; `ids` is the hash of those (`rows_print`).
    """

    spec: dict[str, Any]
    fingerprint: dict[str, str]
    files: list[list[Any]]
    rows: int
    of: int
    ids: str
    tokens: int
    format: int = FORMAT

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(size for _, size, _ in self.files)


def read_record(folder: Path) -> Record | None:
    """What factors lie in an index's folder; None if there are none.

    Raises:
        FactorsCorrupt: the record cannot be read.
    """
    file = folder / RECORD
    try:
        content = json.loads(file.read_bytes())
        require_factors_shape(content)
        return Record(**content)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, RecursionError) as error:
        raise FactorsCorrupt(f"{RECORD} is not one that Headwater wrote: fit the factors again", file=RECORD) from error


@dataclass(frozen=True)
class Factors:
    """Open factors: by checkpoint, the tensors of each module (`<module>.out`, `.in`, `.values`)."""

    record: Record
    tensors: list[dict[str, torch.Tensor]]

    def lenses(self, at: int, model: LoadedModel) -> dict[str, Lens]:
        """Each module's part of (F + lambda)^-1 at a checkpoint."""
        kept, devices = self.tensors[at], model.devices()
        found = {}
        for module in model.attributed:
            q_out, q_in, values = (kept[f"{module.name}.{part}"] for part in ("out", "in", "values"))
            damped = values + DAMPING * values.double().mean().float()
            inverse = torch.where(damped > 0, 1 / damped, 0)  # a module without a gradient has no curvature either
            found[module.name] = Lens(*(part.to(devices[module.name]) for part in (q_out, q_in, inverse)))
        return found


def open_factors(folder: Path) -> Factors:
    """Read an index's factors; every byte against its checksum.

    Raises:
        FactorsMissing: there are none. FactorsCorrupt: a file is missing or altered.
    """
    record = read_record(folder)
    if record is None:
        raise FactorsMissing("this index has no EK-FAC factors: POST /indexes/{index}/ekfac fits them", field="rerank")
    tensors = []
    for name, size, digest in record.files:
        file = folder / FOLDER / name
        if not file.is_file() and read_record(folder) != record:  # a new fit took their place a moment ago
            return open_factors(folder)
        if not is_whole(file, size, digest, verify=True):
            detail = f"EK-FAC factors {name} are not what was written (missing, or another checksum): fit them again"
            raise FactorsCorrupt(detail, file=name)
        try:
            tensors.append(load_file(file))
        except SafetensorError as error:
            raise FactorsCorrupt(f"EK-FAC factors {name} cannot be read: fit them again", file=name) from error
    return Factors(record, tensors)


def evenly(items: Sequence[Item], most: int) -> list[Item]:
    """At most so many, evenly spaced."""
    many = min(most, len(items))
    return [items[at * len(items) // many] for at in range(many)]


def rows_print(manifest: Mapping[str, Any]) -> str:
    """A hash of which rows an index holds, by its manifest as JSON has it."""
    said = json.dumps([[shard["ids"] for shard in manifest["shards"]], sorted(manifest["deleted"])])
    return hashlib.sha256(said.encode()).hexdigest()


def fit(
    path: Path,
    model: LoadedModel,
    rows: Sequence[Row],
    spec: EkfacSpec | None = None,
    keep_every_s: float = KEEP_EVERY_S,
) -> Iterator[Progress]:
    """Fit factors over an index's rows into its folder; called again it takes up what a crash left.

    Rows without a response token are left out. The factors exist once `ekfac.json` is written; those of an earlier fit
    stay until then.

    Args:
        rows: the index's, in its order, or those of them that `evenly` chose.

    Raises:
        Mismatch: the model is not the index's. SpecError: no row can be used, or gradients are not finite.
    """
    index = open_index(path, verify=False)
    index.check(model)
    kept, spec = index.manifest.index_spec, spec or EkfacSpec()
    samples = _encode(model.encoder(kept.template, kept.max_length), evenly(rows, spec.rows))
    spec = replace(spec, rows=len(samples), draws=spec.drawn(len(samples)))
    ids = rows_print(index.manifest.to_dict())
    plan = [FORMAT, asdict(spec), asdict(kept), model.fingerprint, ids, [sample.id for sample in samples]]
    digest = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()
    run = _Run(path / FOLDER, model, samples, kept.token_budget, spec, digest, keep_every_s)
    yield from run.steps()
    tokens = sum(len(sample.example.ids) for sample in samples)
    record = Record(asdict(spec), model.fingerprint, run.files, len(samples), index.rows, ids, tokens)
    with disk_full_is_named("the factors' record"):
        write_file(path / RECORD, json.dumps(asdict(record), indent=1, sort_keys=True).encode())
    named = {name for name, *_ in record.files}
    for file in (path / FOLDER).iterdir():  # of earlier fits, and the sums
        if file.name not in named:
            file.unlink(missing_ok=True)
    yield Progress("publish", len(samples), len(samples), run.total, run.total)


@dataclass(frozen=True)
class _Sample:
    id: str
    example: Example


def _encode(encoder: Encoder, rows: Sequence[Row]) -> list[_Sample]:
    found, last = [], None
    for row in rows:
        try:
            found.append(_Sample(row.id, encoder.encode(row)))
        except RowError as error:
            last = error
    if not found:
        raise last or SpecError("factors need at least one row", field="rows")
    return found


@dataclass
class _State:
    """How far a fit is: the checkpoint's number, its stage, the steps of that which are done, and the sums."""

    checkpoint: int = 0
    stage: Stage = "covariances"
    done: int = 0
    files: list[list[Any]] = field(default_factory=list)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)


class _Run:
    """One fit. Sums are float32 (float64 where the model is), in an order that does not depend on interruptions."""

    def __init__(
        self,
        folder: Path,
        model: LoadedModel,
        samples: Sequence[_Sample],
        budget: int,
        spec: EkfacSpec,
        plan: str,
        keep_every_s: float,
    ) -> None:
        self.folder, self.model, self.samples, self.spec, self.plan = folder, model, samples, spec, plan
        self.keep_every_s, self.kept_at = keep_every_s, time.monotonic()
        self.batches = batches([sample.example for sample in samples], budget)
        self.sizes = [sum(len(samples[i].example.ids) for i in batch) for batch in self.batches]
        self.total = 2 * len(model.checkpoints) * sum(self.sizes)
        self.state = self._read()

    @property
    def files(self) -> list[list[Any]]:
        """Of the checkpoints that are finished."""
        return self.state.files

    def steps(self) -> Iterator[Progress]:
        """All that is left to do."""
        while self.state.checkpoint < len(self.model.checkpoints):
            checkpoint = self.model.checkpoints[self.state.checkpoint]
            if self.state.stage == "covariances":
                yield from self._pass(checkpoint)
                self._next("eigenvectors")
            if self.state.stage == "eigenvectors":
                yield from self._eigenvectors()
                self._next("eigenvalues")
            yield from self._pass(checkpoint)
            self._finish()

    def _pass(self, checkpoint: Checkpoint) -> Iterator[Progress]:
        """Once over the rows."""
        state = self.state
        collector = _Collector(self.model, state.tensors, state.stage, self.spec.basis)
        rows = sum(len(batch) for batch in self.batches[: state.done])
        passed = sum(self.sizes[: state.done])
        before = sum(self.sizes) * (2 * state.checkpoint + (state.stage == "eigenvalues"))
        for at in range(state.done, len(self.batches)):
            samples = [self.samples[i] for i in self.batches[at]]
            with self.model.lock:
                modules = self.model.activate(checkpoint)
                collector.begin(samples)
                with torch.enable_grad(), hooked(self.model, modules, collector.hook):
                    logits, tokens = target_logits(self.model, [sample.example for sample in samples])
                    drawn = tokens[None] if self.spec.labels == "true" else self._labels(logits, samples)
                    for draw, labels in enumerate(drawn, start=1):
                        self._loss(logits, labels, samples).backward(retain_graph=draw < len(drawn))
            rows, passed, state.done = rows + len(samples), passed + self.sizes[at], at + 1
            self._keep()
            yield Progress(state.stage, rows, len(self.samples), before + passed, self.total)
        self._require_finite()

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor, samples: Sequence[_Sample]) -> torch.Tensor:
        """Whose gradient's outer products are the curvature of the rows' mean losses."""
        each = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        parts = each.split([len(sample.example.positions) for sample in samples])
        power = 0.5 if self.spec.labels == "sampled" else 1.0  # draws are independent: only their squares add up
        return torch.stack([part.sum() / len(part) ** power for part in parts]).sum()

    def _labels(self, logits: torch.Tensor, samples: Sequence[_Sample]) -> torch.Tensor:
        """[draws, targets], drawn from what the model expects; a row's draws do not depend on its batch mates.

        The draws of a target are spread evenly over its distribution, in an order of its own (a Latin hypercube): each
        is as likely as alone and independent of the other targets', and their mean varies less.
        """
        draws, numbers = self.spec.draws, []
        for sample in samples:
            name = f"{self.spec.seed}/{self.state.checkpoint}/{self.state.stage}/{sample.id}"
            key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")
            order, within = np.random.Generator(np.random.Philox(key=key)).random(
                (2, draws, len(sample.example.positions))
            )
            numbers.append((order.argsort(0, kind="stable") + within) / draws)
        sums = logits.detach().double().softmax(1).cumsum(1)  # [targets, vocabulary]
        drawn = torch.from_numpy(np.concatenate(numbers, 1).T.copy()).to(sums.device) * sums[:, -1:]  # [targets, draws]
        return torch.searchsorted(sums, drawn, right=True).clamp_max(sums.shape[1] - 1).T

    def _eigenvectors(self) -> Iterator[Progress]:
        """Each module's sums give way to their eigenvectors; the sums of the eigenvalues begin at zero."""
        state, modules = self.state, self.model.attributed
        tokens = sum(self.sizes) * (2 * state.checkpoint + 1)
        for at in range(state.done, len(modules)):
            name = modules[at].name
            for side in ("out", "in"):
                whole = state.tensors[f"{name}.{side}"]
                vectors = torch.linalg.eigh((whole + whole.T).double().cpu() / 2).eigenvectors
                state.tensors[f"{name}.{side}"] = vectors.to(whole).contiguous()
            state.done = at + 1
            self._keep()
            yield Progress(state.stage, state.done, len(modules), tokens, self.total)

    def _finish(self) -> None:
        """Write the checkpoint's factors, and go on to the next."""
        state, seen = self.state, len(self.samples) * self.spec.draws
        tensors = {
            name: (tensor / seen if name.endswith(".values") else tensor).float().cpu().contiguous()
            for name, tensor in state.tensors.items()
        }
        content = save(tensors)
        digest = hashlib.sha256(content).hexdigest()
        name = f"{state.checkpoint:02d}-{digest[:16]}.safetensors"
        with disk_full_is_named("EK-FAC factors"):
            write_file(self.folder / name, content)
        files = [*state.files, [name, len(content), digest]]
        self.state = _State(checkpoint=state.checkpoint + 1, files=files)
        self._keep(now=True)

    def _next(self, stage: Stage) -> None:
        self.state.stage, self.state.done = stage, 0
        self._keep(now=True)

    def _require_finite(self) -> None:
        for name, tensor in self.state.tensors.items():
            if not torch.isfinite(tensor).all():
                detail = f"the gradients of {name.rpartition('.')[0]} are not finite: no curvature can be fitted"
                raise SpecError(detail, field="model")

    def _keep(self, now: bool = False) -> None:
        """Write the state, if that was last done long enough ago; its name is its checksum."""
        if not now and time.monotonic() - self.kept_at < self.keep_every_s:
            return
        state = self.state
        about = {"plan": self.plan, "checkpoint": state.checkpoint, "stage": state.stage, "done": state.done}
        said = {"state": json.dumps({**about, "files": state.files}, sort_keys=True)}
        content = save({name: tensor.cpu().contiguous() for name, tensor in state.tensors.items()}, said)
        name = f"sums-{hashlib.sha256(content).hexdigest()}.safetensors"
        with disk_full_is_named("EK-FAC sums"):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_file(self.folder / name, content)
        for old in self.folder.glob("sums-*"):
            if old.name != name:
                old.unlink(missing_ok=True)
        self.kept_at = time.monotonic()

    def _read(self) -> _State:
        """What an earlier run of the same fit left; the beginning, if there is none or it is damaged."""
        for file in sorted(self.folder.glob("sums-*.safetensors")):
            content = file.read_bytes()
            if f"sums-{hashlib.sha256(content).hexdigest()}.safetensors" != file.name:
                continue
            size = int.from_bytes(content[:8], "little")
            said = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["state"])
            if said.pop("plan") != self.plan or not self._has(said["files"]):
                continue
            devices = self.model.devices()
            tensors = {name: t.to(devices[name.rpartition(".")[0]]) for name, t in load(content).items()}
            return _State(**said, tensors=tensors)
        return _State()

    def _has(self, files: Sequence[Sequence[Any]]) -> bool:
        """Whether the factors of finished checkpoints are whole."""
        return all(is_whole(self.folder / name, size, digest, verify=True) for name, size, digest in files)


class _Collector:
    """Adds a batch's part to the sums where a module's output gradient meets its input."""

    def __init__(
        self, model: LoadedModel, tensors: dict[str, torch.Tensor], stage: Stage, basis: Literal["row", "position"]
    ) -> None:
        self.tensors, self.stage, self.basis = tensors, stage, basis
        self.kind = torch.float64 if model.model.dtype == torch.float64 else torch.float32
        self.valid = torch.zeros(0)
        devices = model.devices()
        for module in model.attributed:
            shapes = {"out": (module.d_out,) * 2, "in": (module.d_in,) * 2}
            if stage == "eigenvalues":
                shapes = {"values": (module.d_out, module.d_in)}
            for side, shape in shapes.items():
                zero = torch.zeros(shape, dtype=self.kind, device=devices[module.name])
                tensors.setdefault(f"{module.name}.{side}", zero)

    def begin(self, samples: Sequence[_Sample]) -> None:
        """A batch comes: the positions that a target follows are those that count."""
        examples = [sample.example for sample in samples]
        self.valid = torch.zeros(len(examples), max(example.positions[-1] for example in examples), 1)
        for number, example in enumerate(examples):
            self.valid[number, : example.positions[-1]] = 1

    def hook(self, name: str, acts: torch.Tensor, output: torch.Tensor) -> None:
        """Called after a module's forward pass."""
        valid = self.valid.to(acts.device, self.kind)
        acts = acts.detach().to(self.kind) * valid  # [batch, seq, d_in]
        if self.stage == "eigenvalues":
            acts = acts @ self.tensors[f"{name}.in"]
        counted = False

        def backward(grads: torch.Tensor) -> None:
            nonlocal counted
            grads = grads.reshape(*acts.shape[:2], -1).to(self.kind) * valid  # [batch, seq, d_out]
            if self.stage == "eigenvalues":
                self._values(name, acts, grads @ self.tensors[f"{name}.out"])
            elif self.basis == "row":
                self._rows(name, acts, grads)
            else:
                self.tensors[f"{name}.out"] += _gram(grads, grads)
                if not counted:
                    self.tensors[f"{name}.in"] += _gram(acts, acts)
                counted = True

        output.register_hook(backward)

    def _rows(self, name: str, acts: torch.Tensor, grads: torch.Tensor) -> None:
        """Add sum of G^T G and of G G^T, by the positions' inner products or by G itself, whichever is less work."""
        positions, d_in, d_out = acts.shape[1], acts.shape[2], grads.shape[2]
        pairs = 2 * positions**2 * (d_in + d_out) + positions * (d_in**2 + d_out**2)
        if pairs <= positions * d_in * d_out + d_in * d_out * (d_in + d_out):
            self.tensors[f"{name}.in"] += _gram(acts, (grads @ grads.transpose(1, 2)) @ acts)
            self.tensors[f"{name}.out"] += _gram(grads, (acts @ acts.transpose(1, 2)) @ grads)
            return
        for matrices in formed(acts, grads):  # [rows, d_out, d_in]
            self.tensors[f"{name}.in"] += _gram(matrices, matrices)
            self.tensors[f"{name}.out"] += _gram(matrices.transpose(1, 2), matrices.transpose(1, 2))

    def _values(self, name: str, acts: torch.Tensor, grads: torch.Tensor) -> None:
        for matrices in formed(acts, grads):
            self.tensors[f"{name}.values"] += matrices.square().sum(0)


def _gram(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """[d, d], the sum over batch and positions of the outer products of [batch, seq, d] each."""
    return left.flatten(0, 1).T @ right.flatten(0, 1)

"""Loads a Hugging Face causal LM and its LoRA adapters, and says which modules are attributed and which are not.

Only safetensors (or GGUF) weights are read: nothing is unpickled, and `trust_remote_code` is never set.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from app.influence.corpus import Encoder, Message
from app.influence.errors import ModelError


@dataclass(frozen=True)
class Checkpoint:
    """One point of a training run and its TracIn-CP weight.

    It is an adapter over the base, or a whole `model` folder of the same architecture, or (neither) the base itself.
    """

    name: str
    adapter: Path | None = None
    model: Path | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class ModelSpec:
    """Where a model lies and how to hold it; no checkpoints means the model as it is."""

    path: Path
    gguf_file: str | None = None
    checkpoints: tuple[Checkpoint, ...] = (Checkpoint("base"),)
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str = "cpu"


@dataclass(frozen=True)
class ModuleInfo:
    """An attributed module; `name` is the same for every adapter of a model."""

    name: str
    kind: str
    d_in: int
    d_out: int


@dataclass(frozen=True)
class SkippedModule:
    """A module with parameters that no gradient is taken of, and why."""

    name: str
    kind: str
    reason: str


class LoadedModel:
    """A frozen model in evaluation mode. Hold `lock` for every use: hooks and the active adapter live on it."""

    def __init__(self, spec: ModelSpec, models: dict[str, Any], tokenizer: Any, fingerprint: dict[str, str]) -> None:
        self.spec, self.models, self.tokenizer, self.fingerprint = spec, models, tokenizer, fingerprint
        self.model = models[spec.checkpoints[-1].name]
        self.checkpoints = spec.checkpoints
        self.lock = threading.RLock()
        self.plans: dict[Any, Any] = {}  # projections, kept by `gradients.plan_for`
        self.context_length = int(getattr(self.model.config, "max_position_embeddings", 0) or 4096)
        self.attributed, self.skipped = _modules(self)

    def activate(self, checkpoint: Checkpoint) -> dict[str, nn.Module]:
        """Make a checkpoint the one that runs; its attributed modules by name."""
        self.model = self.models[checkpoint.name]
        if checkpoint.adapter is not None:
            self.model.set_adapter(checkpoint.name)
            self.model.requires_grad_(False)  # set_adapter makes the adapter trainable; no weight gradient is wanted
        return _attributed(self.model, checkpoint)

    def generate(self, messages: Sequence[Message], max_new_tokens: int = 64) -> str:
        """The model's own greedy answer, by its last checkpoint."""
        encoder = Encoder(self.tokenizer, max_length=self.context_length)
        text = encoder.prefix(messages)
        inputs = self.tokenizer(text, add_special_tokens=encoder.template != "chat", return_tensors="pt").to(
            self.model.device
        )
        start = inputs["input_ids"].shape[1]
        room = min(max_new_tokens, self.context_length - start)
        if room <= 0:
            raise ModelError(f"the prompt fills the model's context of {self.context_length} tokens", field="prompt")
        with self.lock, torch.no_grad():
            self.activate(self.checkpoints[-1])
            out = self.model.generate(
                **inputs,
                max_new_tokens=room,
                do_sample=False,
                pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
            )
        return str(self.tokenizer.decode(out[0, start:], skip_special_tokens=True))


def load(spec: ModelSpec) -> LoadedModel:
    """Read a model and its adapters from local folders.

    Raises:
        ModelError: no model there, pickled weights only, an adapter that does not fit, or weights that are not finite.
    """
    _check_folder(spec.path, "path", gguf=spec.gguf_file)
    if not spec.checkpoints:  # no run was named: the model as it is
        spec = replace(spec, checkpoints=(Checkpoint("base"),))
    names = [c.name for c in spec.checkpoints]
    if len(set(names)) != len(names):
        raise ModelError("each checkpoint needs a name of its own", field="checkpoints")
    for number, checkpoint in enumerate(spec.checkpoints):
        if checkpoint.model is not None:
            if checkpoint.adapter is not None:
                detail = "a checkpoint is an adapter or a whole model, not both"
                raise ModelError(detail, field=f"checkpoints.{number}")
            _check_folder(checkpoint.model, f"checkpoints.{number}.model")
        if not math.isfinite(checkpoint.weight) or checkpoint.weight <= 0:
            raise ModelError("a checkpoint's weight is a positive number", field=f"checkpoints.{number}.weight")
        if checkpoint.adapter is not None:
            _check_folder(checkpoint.adapter, f"checkpoints.{number}.adapter", weights="adapter_model.safetensors")
    base = _read(spec.path, spec, "path", spec.gguf_file)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            spec.path,
            local_files_only=True,
            trust_remote_code=False,
            **({"gguf_file": spec.gguf_file} if spec.gguf_file else {}),
        )
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise ModelError(f"the tokenizer cannot be loaded: {_short(error)}", field="path") from error
    adapters = [c for c in spec.checkpoints if c.adapter is not None]
    if adapters and any(c.adapter is None and c.model is None for c in spec.checkpoints):
        raise ModelError(
            "the base itself is no checkpoint beside its adapters: it attributes other modules", field="checkpoints"
        )
    if adapters:
        base = _with_adapters(base, adapters)
    models = {
        c.name: base if c.model is None else _read(c.model, spec, f"checkpoints.{number}.model")
        for number, c in enumerate(spec.checkpoints)
    }
    for model in models.values():
        model.requires_grad_(False)
        model.eval().to(spec.device)
        for name, parameter in model.named_parameters():
            if not torch.isfinite(parameter).all():
                raise ModelError(f"the weights hold NaN or infinite values, first in {name}", field="path")
    return LoadedModel(spec, models, tokenizer, _fingerprint(spec, tokenizer))


def _read(path: Path, spec: ModelSpec, field: str, gguf_file: str | None = None) -> Any:
    extra = {"gguf_file": gguf_file} if gguf_file else {"use_safetensors": True}
    try:
        return AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, spec.dtype), local_files_only=True, trust_remote_code=False, **extra
        )
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError) as error:
        raise ModelError(f"the model cannot be loaded: {_short(error)}", field=field) from error


def _with_adapters(model: Any, adapters: Sequence[Checkpoint]) -> Any:
    from peft import PeftModel

    wrapped: Any = None
    for checkpoint in adapters:
        try:
            if wrapped is None:
                wrapped = PeftModel.from_pretrained(
                    model, str(checkpoint.adapter), adapter_name=checkpoint.name, local_files_only=True
                )
            else:
                wrapped.load_adapter(str(checkpoint.adapter), adapter_name=checkpoint.name, local_files_only=True)
        except (OSError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError) as error:
            raise ModelError(
                f"adapter '{checkpoint.name}' does not fit the model: {_short(error)}", field="checkpoints"
            ) from error
    return wrapped


def _check_folder(path: Path, field: str, *, weights: str = "*.safetensors", gguf: str | None = None) -> None:
    if not path.is_dir():
        raise ModelError(f"there is no folder '{path.name}'", field=field)
    if gguf:
        if Path(gguf).name != gguf or not (path / gguf).is_file():
            raise ModelError(f"there is no file '{gguf}' in the folder", field="gguf_file")
        return
    if not any(path.glob(weights)):
        pickled = [p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in path.glob(pattern)]
        if pickled:
            raise ModelError(
                f"only pickled weights ({pickled[0]}), which can run code: save the model as safetensors", field=field
            )
        raise ModelError("the folder holds no safetensors weights", field=field)


def _short(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:300]


def _attributed(model: nn.Module, checkpoint: Checkpoint) -> dict[str, nn.Module]:
    """LoRA's A and B where there is an adapter, else every linear module but the output embedding."""
    found: dict[str, nn.Module] = {}
    head = model.get_output_embeddings()  # type: ignore[operator]
    for name, module in model.named_modules():
        if checkpoint.adapter is not None:
            part, _, adapter = name.rpartition(".")
            if adapter == checkpoint.name and part.endswith(("lora_A", "lora_B")) and isinstance(module, nn.Linear):
                found[part] = module
        elif type(module) in (nn.Linear, Conv1D) and module is not head and ".lora_" not in name:
            found[name] = module
    return found


def _modules(loaded: LoadedModel) -> tuple[tuple[ModuleInfo, ...], tuple[SkippedModule, ...]]:
    per_checkpoint = []
    for checkpoint in loaded.checkpoints:
        found = _attributed(loaded.models[checkpoint.name], checkpoint)
        infos = [ModuleInfo(name, type(m).__name__, *reversed(out_in(m))) for name, m in found.items()]
        per_checkpoint.append(tuple(infos))
    if any(infos != per_checkpoint[0] for infos in per_checkpoint):
        raise ModelError(
            "the checkpoints do not attribute the same modules; give them adapters of one shape", field="checkpoints"
        )
    if not per_checkpoint[0]:
        raise ModelError("no module can be attributed: neither LoRA A and B nor linear modules", field="path")
    taken = {id(m) for c in loaded.checkpoints for m in _attributed(loaded.models[c.name], c).values()}
    skipped = []
    for name, module in loaded.model.named_modules():
        if id(module) in taken or not any(True for _ in module.parameters(recurse=False)):
            continue
        frozen = isinstance(module, nn.Linear) and any(c.adapter for c in loaded.checkpoints)
        kind = type(module).__name__
        reason = "frozen under the adapter" if frozen else f"{kind} is not attributed"
        skipped.append(SkippedModule(name, kind, reason))
    return per_checkpoint[0], tuple(skipped)


def out_in(module: nn.Module) -> tuple[int, int]:
    """(d_out, d_in); GPT-2's Conv1D keeps its weight transposed."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    rows, columns = weight.shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def _fingerprint(spec: ModelSpec, tokenizer: Any) -> dict[str, str]:
    """SHA-256 of what the numbers depend on."""
    files = (
        [spec.path / spec.gguf_file]
        if spec.gguf_file
        else [spec.path / "config.json", *sorted(spec.path.glob("*.safetensors"))]
    )
    prints = {"base": _hash_files(files)}
    for checkpoint in spec.checkpoints:
        if checkpoint.adapter is not None:
            adapter = [checkpoint.adapter / "adapter_config.json", checkpoint.adapter / "adapter_model.safetensors"]
            prints[f"adapter:{checkpoint.name}"] = _hash_files(adapter)
        if checkpoint.model is not None:
            weights = [checkpoint.model / "config.json", *sorted(checkpoint.model.glob("*.safetensors"))]
            prints[f"model:{checkpoint.name}"] = _hash_files(weights)
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=False)
    prints["tokenizer"] = hashlib.sha256(vocabulary.encode("utf-8", "surrogatepass")).hexdigest()
    prints["chat_template"] = hashlib.sha256(str(tokenizer.chat_template or "").encode()).hexdigest()
    return prints


def _hash_files(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()

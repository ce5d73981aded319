"""Loads a Hugging Face causal LM and its LoRA adapters, and says which modules are attributed and which are not.

Only safetensors (or GGUF) weights are read: nothing is unpickled, and `trust_remote_code` is never set.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from app.influence.corpus import Encoder, Message, Template
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
    """Where a model lies and how to hold it; no checkpoints means the model as it is.

    Attributes:
        device: where all of it goes; "auto": spread over the GPUs that this process sees, else the CPU.
        device_map: instead of that, (module, device) for each part, as accelerate has it: ("", "cpu") is everything.
    """

    path: Path
    gguf_file: str | None = None
    checkpoints: tuple[Checkpoint, ...] = (Checkpoint("base"),)
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str = "cpu"
    device_map: tuple[tuple[str, str], ...] = ()


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
        # PEFT refuses names with dots and names of its own methods, so its adapters are numbered.
        self.adapters = {c.name: adapter_name(i) for i, c in enumerate(spec.checkpoints) if c.adapter is not None}
        self.attributed, self.skipped = _modules(self)

    @property
    def device(self) -> torch.device:
        """Where tokens go in, and where what comes from modules on several devices is brought together."""
        weight: torch.Tensor = self.model.get_input_embeddings().weight
        return weight.device

    def devices(self) -> dict[str, torch.device]:
        """Where each attributed module lies; every checkpoint's lies alike."""
        checkpoint = self.checkpoints[-1]
        found = _linear(self.models[checkpoint.name], self.adapters.get(checkpoint.name))
        return {module.name: next(found[module.name].parameters()).device for module in self.attributed}

    def activate(self, checkpoint: Checkpoint) -> dict[str, nn.Module]:
        """Make a checkpoint the one that runs; its attributed modules by name."""
        self.model = self.models[checkpoint.name]
        adapter = self.adapters.get(checkpoint.name)
        if adapter is not None:
            self.model.set_adapter(adapter)
            self.model.requires_grad_(False)  # set_adapter makes the adapter trainable; no weight gradient is wanted
        found = _linear(self.model, adapter)
        return {module.name: found[module.name] for module in self.attributed}

    def encoder(self, template: Template = "auto", max_length: int | None = None) -> Encoder:
        """Renders rows and queries for this model, within its context."""
        return Encoder(self.tokenizer, template, min(max_length or self.context_length, self.context_length))

    def count_tokens(self, texts: Iterable[str]) -> int:
        """How many tokens the texts have, without what a template puts around them."""
        return sum(len(self.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)

    def generate(self, messages: Sequence[Message], max_new_tokens: int = 64, template: Template = "auto") -> str:
        """The model's own greedy answer, by its last checkpoint, to a prompt in an index's template."""
        encoder = self.encoder(template)
        plain = not messages
        text = encoder.prefix(messages)
        inputs = self.tokenizer(text, add_special_tokens=encoder.special(plain), return_tensors="pt")
        inputs = inputs.to(self.device)
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


def adapter_name(number: int) -> str:
    """PEFT's name of the adapter of the checkpoint at a place."""
    return f"c{number}"


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
    placed = dict(spec.device_map) or ("auto" if spec.device == "auto" else None)
    base = _read(spec.path, spec, "path", placed, spec.gguf_file)
    placed = getattr(base, "hf_device_map", None)  # whole models lie alike, so that a module is where its sketch is
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            spec.path,
            local_files_only=True,
            trust_remote_code=False,
            **({"gguf_file": spec.gguf_file} if spec.gguf_file else {}),
        )
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise ModelError(f"the tokenizer cannot be loaded: {_short(error)}", field="path") from error
    adapters = {i: c for i, c in enumerate(spec.checkpoints) if c.adapter is not None}
    if adapters and len(adapters) < sum(c.model is None for c in spec.checkpoints):
        detail = "the base itself is no checkpoint beside its adapters: it attributes other modules"
        raise ModelError(detail, field="checkpoints")
    for number, checkpoint in adapters.items():
        base = _with_adapter(base, checkpoint, number)
    models = {
        c.name: base if c.model is None else _read(c.model, spec, f"checkpoints.{number}.model", placed)
        for number, c in enumerate(spec.checkpoints)
    }
    for model in models.values():
        model.requires_grad_(False)
        model.eval()
        if placed is None:
            try:
                model.to("cpu" if spec.device == "auto" else spec.device)
            except (RuntimeError, AssertionError) as error:  # torch raises either where there is no such device
                raise ModelError(f"device '{spec.device}' cannot be used: {_short(error)}", field="device") from error
        for name, parameter in model.named_parameters():
            if not torch.isfinite(parameter).all():
                raise ModelError(f"the weights hold NaN or infinite values, first in {name}", field="path")
    return LoadedModel(spec, models, tokenizer, _fingerprint(spec, tokenizer))


def _read(
    path: Path, spec: ModelSpec, field: str, device_map: dict[str, Any] | str | None, gguf_file: str | None = None
) -> Any:
    extra = {"gguf_file": gguf_file} if gguf_file else {"use_safetensors": True}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=getattr(torch, spec.dtype),
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            device_map=device_map,
            **extra,
        )
    except (OSError, ValueError, KeyError, RuntimeError, AssertionError, TypeError, SafetensorError) as error:
        raise ModelError(f"the model cannot be loaded: {_short(error)}", field=field) from error
    model, report = loaded
    invented = sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
    if invented:  # transformers would fill them with random numbers and go on
        detail = f"the folder lacks {len(invented)} of the model's weights, first {invented[0]}"
        raise ModelError(detail, field=field)
    devices = {str(device) for device in getattr(model, "hf_device_map", {}).values()}
    if "disk" in devices or ("cpu" in devices and len(devices) > 1):  # accelerate would fetch weights at every step
        detail = f"the model does not fit into its devices ({', '.join(sorted(devices))}): give it more of them"
        raise ModelError(detail, field="device")
    return model


def _with_adapter(model: Any, checkpoint: Checkpoint, number: int) -> Any:
    from peft import PeftModel, get_peft_model_state_dict  # here: peft imports much, and many models have no adapter

    assert checkpoint.adapter is not None
    name, folder = adapter_name(number), str(checkpoint.adapter)
    field = f"checkpoints.{number}.adapter"
    try:
        with warnings.catch_warnings():  # peft warns of missing weights; they are an error below
            warnings.simplefilter("ignore")
            if isinstance(model, PeftModel):
                model.load_adapter(folder, adapter_name=name, local_files_only=True)
            else:
                model = PeftModel.from_pretrained(model, folder, adapter_name=name, local_files_only=True)
        with safe_open(checkpoint.adapter / "adapter_model.safetensors", "pt") as file:
            stored = set(file.keys())
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError) as error:
        detail = f"adapter '{checkpoint.name}' does not fit the model: {_short(error)}"
        raise ModelError(detail, field=field) from error
    differ = sorted(stored ^ set(get_peft_model_state_dict(model, adapter_name=name)))
    if differ:
        detail = f"adapter '{checkpoint.name}' does not fit the model: {len(differ)} weights differ, first {differ[0]}"
        raise ModelError(detail, field=field)
    return model


def _check_folder(path: Path, field: str, *, weights: str = "*.safetensors", gguf: str | None = None) -> None:
    if not path.is_dir():
        raise ModelError(f"there is no folder '{path.name}'", field=field)
    if gguf:
        if Path(gguf).name != gguf or not (path / gguf).is_file():
            raise ModelError(f"there is no file '{gguf}' in the folder", field="gguf_file")
        return
    config = "adapter_config.json" if weights != "*.safetensors" else "config.json"
    if weights == "*.safetensors" and (path / "adapter_config.json").exists():
        # transformers would follow the base that the adapter names, wherever that is
        detail = "this is an adapter's folder: name the base model's, and the adapter as a checkpoint"
        raise ModelError(detail, field=field)
    if not any(path.glob(weights)):
        pickled = [p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in path.glob(pattern)]
        if pickled:
            raise ModelError(
                f"only pickled weights ({pickled[0]}), which can run code: save the model as safetensors", field=field
            )
        raise ModelError("the folder holds no safetensors weights", field=field)
    if not (path / config).is_file():
        raise ModelError(f"the folder holds no {config}", field=field)


def _short(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:300]


def _linear(model: Any, adapter: str | None) -> dict[str, nn.Module]:
    """LoRA's A and B where there is an adapter, else every linear module but the output embedding."""
    found: dict[str, nn.Module] = {}
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if adapter is not None:
            part, _, last = name.rpartition(".")
            if last == adapter and part.endswith(("lora_A", "lora_B")) and isinstance(module, nn.Linear):
                found[part] = module
        elif type(module) in (nn.Linear, Conv1D) and module is not head:
            found[name] = module
    return found


def _modules(loaded: LoadedModel) -> tuple[tuple[ModuleInfo, ...], tuple[SkippedModule, ...]]:
    per_checkpoint = []
    taken: set[int] = set()
    for checkpoint in loaded.checkpoints:
        found = _linear(loaded.models[checkpoint.name], loaded.adapters.get(checkpoint.name))
        per_checkpoint.append([ModuleInfo(name, type(m).__name__, *reversed(out_in(m))) for name, m in found.items()])
        taken |= {id(module) for module in found.values()}
    if any(infos != per_checkpoint[0] for infos in per_checkpoint):
        raise ModelError(
            "the checkpoints do not attribute the same modules; give them adapters of one shape", field="checkpoints"
        )
    calls = _calls(loaded)
    attributed = tuple(info for info in per_checkpoint[0] if calls[info.name] == 1)
    if not attributed:
        raise ModelError("no module can be attributed: neither LoRA A and B nor linear modules", field="path")
    skipped = [
        SkippedModule(info.name, info.kind, f"runs {calls[info.name]} times on the whole sequence, not once")
        for info in per_checkpoint[0]
        if calls[info.name] != 1
    ]
    for name, module in loaded.model.named_modules():
        if id(module) in taken or not any(True for _ in module.parameters(recurse=False)):
            continue
        frozen = isinstance(module, nn.Linear | Conv1D) and bool(loaded.adapters)
        kind = type(module).__name__
        reason = "frozen under the adapter" if frozen else f"{kind} is not attributed"
        skipped.append(SkippedModule(name, kind, reason))
    return attributed, tuple(skipped)


def _calls(loaded: LoadedModel) -> dict[str, int]:
    """How often each linear module sees every token of a batch in one forward pass.

    A gradient is collected where a module runs once on [batch, sequence, d], or on the same flattened. An expert that
    sees some of the tokens, or a module that is shared, would be wrong, so it is skipped and listed.
    """
    checkpoint = loaded.checkpoints[-1]
    adapter = loaded.adapters.get(checkpoint.name)
    if adapter is not None:
        loaded.model.set_adapter(adapter)
    found = _linear(loaded.model, adapter)
    counts = dict.fromkeys(found, 0)

    def count(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            counts[name] += whole_sequence(args[0], (2, 3))

        return hook

    handles = [module.register_forward_pre_hook(count(name)) for name, module in found.items()]
    try:
        with torch.no_grad():
            ids = torch.arange(6).view(2, 3).to(loaded.device) % loaded.model.config.get_text_config().vocab_size
            loaded.model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return counts


def whole_sequence(acts: torch.Tensor, shape: tuple[int, int]) -> bool:
    """Whether a module's input is [batch, sequence, d] or the same flattened.

    DoRA calls A and B on an identity matrix too, for a norm that it holds constant; that is not the sequence.
    """
    if acts.dim() == 3:
        return tuple(acts.shape[:2]) == shape
    square = acts.dim() == 2 and acts.shape[0] == acts.shape[1]
    if square and torch.equal(acts, torch.eye(len(acts), dtype=acts.dtype, device=acts.device)):
        return False
    return acts.dim() == 2 and acts.shape[0] == shape[0] * shape[1]


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
    prints["tokenizer"] = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
    prints["chat_template"] = hashlib.sha256(str(tokenizer.chat_template or "").encode()).hexdigest()
    run = json.dumps([spec.dtype, [(c.name, c.weight) for c in spec.checkpoints]])
    prints["checkpoints"] = hashlib.sha256(run.encode()).hexdigest()
    return prints


def _hash_files(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()

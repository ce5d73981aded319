"""The adapter that is changed: the model's own, or a fresh one; its first weights stay beside it.

It is changed in place, so that the model is at any time what its adapter makes it, and the model as it was is one
exchange of small weights away. A fresh adapter adds nothing (LoRA's B is zero), so that with it too the first weights
are the model as it was.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from app.influence.errors import SpecError
from app.influence.index import write_file
from app.influence.models import LoadedModel

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FRESH, OTHER = "fresh", "other"
"""PEFT's names of an adapter that is there for a moment, and of one to compare with."""
Weights = dict[str, torch.Tensor]


class Adapter:
    """A loaded model's last adapter, or a fresh one where it has none; `own` says which.

    Raises:
        SpecError: no adapter fits the model.
    """

    def __init__(self, model: LoadedModel, *, rank: int, alpha: int, dropout: float, seed: int) -> None:
        self.model, self.seed = model, seed
        last = model.checkpoints[-1]
        model.activate(last)
        self.own = last.name in model.adapters
        self.name = model.adapters.get(last.name, "default")
        if not self.own:
            config = LoraConfig(
                r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=TARGETS, task_type="CAUSAL_LM"
            )
            torch.manual_seed(seed)
            try:
                model.model = model.models[last.name] = get_peft_model(model.model, config)
            except ValueError as error:
                raise SpecError(f"no adapter fits this model: {error}", field="model") from error
        self.weights: dict[str, nn.Parameter] = {
            key: weight for key, weight in self.peft.named_parameters() if f".{self.name}." in key and "lora_" in key
        }
        for weight in self.weights.values():
            weight.requires_grad_(True)
        self.first = self.copy()

    @property
    def peft(self) -> Any:
        """PEFT's model."""
        return self.model.model

    def forget_everything(self) -> None:
        """Give the adapter the weights of a fresh one: the base model, from before it was trained at all.

        Raises:
            SpecError: the model brought no adapter, so that what it was before training is not known.
        """
        if not self.own:
            detail = "retraining starts from the base under the model's adapter, and this model has none"
            raise SpecError(detail, field="method")
        config = copy.deepcopy(self.peft.peft_config[self.name])
        config.init_lora_weights = True
        torch.manual_seed(self.seed)
        self.peft.add_adapter(FRESH, config)
        fresh = dict(self.peft.named_parameters())
        self.put({key: fresh[key.replace(f".{self.name}.", f".{FRESH}.")].detach() for key in self.weights})
        self.peft.delete_adapter(FRESH)

    def copy(self) -> Weights:
        """The weights as they are."""
        return {name: weight.detach().clone() for name, weight in self.weights.items()}

    def put(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Take other weights."""
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(weights[name])

    @contextmanager
    def holding(self, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """With other weights for a while; `holding(first)` is the model as it was."""
        now = self.copy()
        self.put(weights)
        try:
            yield
        finally:
            self.put(now)

    def bring(self, folder: Path) -> None:
        """Load another adapter over the same base, for `other`.

        Raises:
            SpecError: the folder holds none that fits.
        """
        try:
            with warnings.catch_warnings():  # peft warns of missing weights; they are an error below
                warnings.simplefilter("ignore")
                self.peft.load_adapter(str(folder), adapter_name=OTHER, local_files_only=True)
            stored = set(load_file(folder / WEIGHTS))
        except (OSError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError) as error:
            raise SpecError(f"the oracle's adapter does not fit the model: {error}", field="oracle") from error
        if stored != set(get_peft_model_state_dict(self.peft, adapter_name=OTHER)):
            raise SpecError("the oracle's adapter does not fit the model: its weights are others", field="oracle")

    @contextmanager
    def other(self) -> Iterator[None]:
        """With the adapter that was brought for a while."""
        self.peft.set_adapter(OTHER)
        try:
            yield
        finally:
            self.peft.set_adapter(self.name)

    def save(self, folder: Path) -> None:
        """Write it as a PEFT folder."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {
            name: weight.detach().cpu().contiguous()
            for name, weight in get_peft_model_state_dict(self.peft, adapter_name=self.name).items()
        }
        config = self.peft.peft_config[self.name].to_dict()
        config |= {"base_model_name_or_path": "", "inference_mode": True}
        plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
        write_file(folder / CONFIG, json.dumps(plain, indent=1, default=str).encode())
        write_file(folder / WEIGHTS, save(state, {"format": "pt"}))  # last: it says that the folder is whole

    def read(self, folder: Path) -> None:
        """Take the weights of a folder that `save` wrote."""
        state = load_file(folder / WEIGHTS)
        self.put({key: state[key.replace(f".{self.name}", "")] for key in self.weights})

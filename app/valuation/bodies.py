"""The student's body: a small pretrained encoder that turns a row into numbers, frozen, in one short pass.

It is a folder of its own: any local encoder, or the first layers of the valued model cut out into one. So the same code
computes features where the student is fitted and where a provider runs it.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModel, AutoTokenizer

from app.influence.corpus import Row
from app.influence.errors import ModelError, SpecError
from app.influence.models import LoadedModel

LONGEST = 256
"""Tokens of a row that the student reads."""
LENGTHS = 2
"""The last so many features are lengths."""
TOKENS = 4096
"""Padded tokens in one pass."""
COPIED = ("config.json", "*.safetensors", "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json")


def cut(model: LoadedModel, layers: int, folder: Path) -> None:
    """Write the embedding and the first layers of a model, in half precision and without its adapters, as an encoder.

    Raises:
        SpecError: more layers than the model has, or an architecture that cannot be cut.
    """
    last = model.models[model.checkpoints[-1].name]
    whole = last.get_base_model() if hasattr(last, "get_base_model") else last
    config = copy.deepcopy(whole.config.get_text_config())
    if not 1 <= layers <= config.num_hidden_layers:
        detail = f"the model has {config.num_hidden_layers} layers: the student takes 1 to that many of them"
        raise SpecError(detail, field="student.layers")
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    have = {name.replace(".base_layer.", "."): weight for name, weight in whole.base_model.state_dict().items()}
    part = AutoModel.from_config(config, dtype=torch.float16)
    wanted = part.state_dict()
    missing = sorted(set(wanted) - set(have))
    if missing:
        detail = f"this model's first layers cannot be cut out (no {missing[0]}): name an encoder's folder instead"
        raise SpecError(detail, field="student.encoder")
    part.load_state_dict({name: have[name].half() for name in wanted})
    part.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)


def carry(encoder: Path, folder: Path) -> None:
    """Copy an encoder's folder, what of it is needed."""
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in COPIED:
        for file in encoder.glob(pattern):
            shutil.copyfile(file, folder / file.name)


class Body:
    """A frozen encoder out of a folder of safetensors."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        """Raises ModelError: not a folder with a safetensors encoder and a fast tokenizer."""
        try:
            self.model: Any = AutoModel.from_pretrained(
                folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False, use_safetensors=True
            )
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError) as error:
            reason = str(error).strip().split("\n")[0][:300]
            raise ModelError(f"the student's encoder cannot be loaded: {reason}", field="student.encoder") from error
        if not self.tokenizer.is_fast:
            raise ModelError("the encoder needs a fast tokenizer (tokenizer.json)", field="student.encoder")
        self.device = device
        self.model.eval().requires_grad_(False).to(device)
        self.longest = min(LONGEST, int(getattr(self.model.config, "max_position_embeddings", 0) or LONGEST))

    @property
    def width(self) -> int:
        """Numbers of a row."""
        return 2 * int(self.model.config.hidden_size) + LENGTHS

    def features(self, rows: Sequence[Row]) -> torch.Tensor:
        """[rows, width] float32: the mean state of all tokens, that of the response, and both lengths' logarithms.

        A row whose response lies beyond the tokens that are read has the first mean twice.
        """
        encoded = [self._encode(row) for row in rows]
        found = torch.empty(len(rows), self.width)
        order = sorted(range(len(rows)), key=lambda i: (-len(encoded[i][0]), i))
        while order:
            many = max(1, TOKENS // len(encoded[order[0]][0]))
            batch, order = order[:many], order[many:]
            found[batch] = self._pass([encoded[i] for i in batch])
        return found

    def _encode(self, row: Row) -> tuple[list[int], list[bool]]:
        """Token ids, and which of them are the response's."""
        text = f"{row.prompt}\n{row.response}" if row.prompt else row.response
        start = len(text) - len(row.response)
        out = self.tokenizer(text, truncation=True, max_length=self.longest, return_offsets_mapping=True)
        response = [b > start for _, b in out["offset_mapping"]]
        return out["input_ids"] or [0], response or [True]

    @torch.no_grad()
    def _pass(self, encoded: Sequence[tuple[list[int], list[bool]]]) -> torch.Tensor:
        length = len(encoded[0][0])
        ids = torch.zeros(len(encoded), length, dtype=torch.long)
        mask, response = torch.zeros(2, len(encoded), length)
        for at, (tokens, inside) in enumerate(encoded):
            ids[at, : len(tokens)] = torch.tensor(tokens)
            mask[at, : len(tokens)] = 1
            response[at, : len(tokens)] = torch.tensor(inside, dtype=torch.float32)
        response = torch.where(response.any(1, keepdim=True), response, mask)
        states = self.model(input_ids=ids.to(self.device), attention_mask=mask.long().to(self.device))
        states = states.last_hidden_state.cpu()  # [batch, seq, d]
        means = [torch.einsum("bs,bsd->bd", m, states) / m.sum(1, keepdim=True) for m in (mask, response)]
        return torch.cat([*means, mask.sum(1, keepdim=True).log(), response.sum(1, keepdim=True).log()], 1)

"""A callback for Hugging Face's `Trainer`: when training ends, its checkpoints and rows are known to Headwater.

    from headwater_client.integrations.trainer import HeadwaterCallback

    trainer = Trainer(..., callbacks=[HeadwaterCallback("mine", rows="train.jsonl", index="mine")])

The service must see the run's output folder at the same path, in one of its allowed roots. A service that refuses or is
away costs the run nothing: a warning says what to do by hand.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwater_client.client import Client
from headwater_client.errors import AlreadyExists, HeadwaterError, PackageMissing
from headwater_client.models import Dataset, Model

try:
    from transformers import TrainerCallback
except ImportError as missing:
    raise PackageMissing("the callback needs transformers: pip install transformers") from missing

if TYPE_CHECKING:
    from headwater_client.fields import CheckpointFields
    from headwater_client.jobs import Job
    from headwater_client.models import Index, IndexAccepted

ADAPTER, WEIGHTS = "adapter_model.safetensors", "*.safetensors"
log = logging.getLogger(__name__)


class HeadwaterCallback(TrainerCallback):
    """Registers a run when it ends.

    Args:
        name: what to call the model and the dataset.
        rows: what the run was trained on, before it was tokenised: a file to send, a folder that `save_to_disk` wrote,
            or records (a list, or a dataset of Hugging Face's library).
        index: what to call an index to build; left out, none is built. `job` is its job then.
        client: left out: one by HEADWATER_URL and HEADWATER_API_KEY.
        base: folder of the model below an adapter; left out: where the adapter says that it came from.
        most: most checkpoints, spread over the run, the last among them. An index costs a pass over the rows for each.

    Attributes:
        model, dataset, job: what was registered, None until then.
    """

    def __init__(
        self,
        name: str,
        rows: str | Path | Iterable[Mapping[str, Any]],
        *,
        index: str | None = None,
        client: Client | None = None,
        base: str | Path | None = None,
        most: int = 4,
    ) -> None:
        self._name, self._rows, self._index, self._base, self._most = name, rows, index, base, most
        self._client = client
        self.model: Model | None = None
        self.dataset: Dataset | None = None
        self.job: Job[IndexAccepted, Index] | None = None

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
        """Register; called by the Trainer."""
        if not state.is_world_process_zero:
            return
        client = self._client or Client()
        try:
            folders = _saved(Path(args.output_dir), model, more.get("processing_class"))
            self.model = self._register(client, _spread(folders, self._most), model)
            self.dataset = self._send(client)
            if self._index is not None:
                self.job = client.indexes.build(self._index, self.model.id, self.dataset.id)
        except AlreadyExists as error:
            log.warning("Headwater has something of that name already: %s; choose another", error)
        except (HeadwaterError, OSError) as error:
            log.warning(
                "the run was not registered (%s); do it by hand: headwater models add, headwater datasets add", error
            )
        finally:
            if self._client is None:
                client.close()

    def _register(self, client: Client, folders: Sequence[Path], model: Any) -> Model:
        kind = "adapter" if (folders[-1] / ADAPTER).is_file() else "model"
        run: list[CheckpointFields] = []
        for folder in folders:
            path = str(folder.resolve())
            run.append(
                {"name": folder.name, "adapter": path} if kind == "adapter" else {"name": folder.name, "model": path}
            )
        base = self._base or (folders[-1] if kind == "model" else _below(model))
        return client.models.create(self._name, str(Path(base).resolve()), checkpoints=run)

    def _send(self, client: Client) -> Dataset:
        rows = self._rows
        if isinstance(rows, str | Path):
            if Path(rows).is_dir():
                return client.datasets.create(self._name, str(Path(rows).resolve()), duplicates="skip")
            return client.datasets.upload(self._name, Path(rows), duplicates="skip")
        return client.datasets.upload(self._name, [dict(row) for row in rows], duplicates="skip")


def _saved(output: Path, model: Any, tokenizer: Any) -> list[Path]:
    """The run's checkpoints in their order; of a run that saved none, its end is saved now."""
    found = [one for one in output.glob("checkpoint-*") if next(one.glob(WEIGHTS), None) is not None]
    if found:
        return sorted(found, key=lambda one: int(one.name.rpartition("-")[2]))
    final = output / "final"
    model.save_pretrained(final)
    if tokenizer is not None:
        tokenizer.save_pretrained(final)
    return [final]


def _spread(folders: Sequence[Path], most: int) -> list[Path]:
    """At most so many, evenly spread, the last among them."""
    many = min(most, len(folders))
    return [folders[(place + 1) * len(folders) // many - 1] for place in range(many)]


def _below(model: Any) -> str:
    """The folder of the model that an adapter is on."""
    config = next(iter(getattr(model, "peft_config", {}).values()), None)
    path = str(getattr(config, "base_model_name_or_path", "") or "")
    if not Path(path).is_dir():
        raise HeadwaterError(f"the model below the adapter is no folder of this machine ({path!r}): give `base`")
    return path

"""From what the catalog keeps (JSON) to what the library takes (frozen dataclasses), and back."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from app.catalog.tables import Model
from app.catalog.types import new_id
from app.influence.index import IndexSpec
from app.influence.models import Checkpoint, LoadedModel, ModelSpec
from app.influence.projection import ProjectionSpec


def model_to_json(spec: ModelSpec) -> dict[str, Any]:
    """What the catalog keeps of a model's spec."""
    return {
        "path": str(spec.path),
        "gguf_file": spec.gguf_file,
        "dtype": spec.dtype,
        "device": spec.device,
        "checkpoints": [
            {
                "name": checkpoint.name,
                "adapter": str(checkpoint.adapter) if checkpoint.adapter else None,
                "model": str(checkpoint.model) if checkpoint.model else None,
                "weight": checkpoint.weight,
            }
            for checkpoint in spec.checkpoints
        ],
    }


def model_from_json(kept: Mapping[str, Any]) -> ModelSpec:
    """The spec that was kept."""
    checkpoints = tuple(
        Checkpoint(
            name=one["name"],
            adapter=Path(one["adapter"]) if one["adapter"] else None,
            model=Path(one["model"]) if one["model"] else None,
            weight=one["weight"],
        )
        for one in kept["checkpoints"]
    )
    return ModelSpec(
        path=Path(kept["path"]),
        gguf_file=kept["gguf_file"],
        checkpoints=checkpoints,
        dtype=kept["dtype"],
        device=kept["device"],
    )


def model_row(name: str, spec: ModelSpec, loaded: LoadedModel) -> Model:
    """A model as the catalog keeps it: what it is made of, and what was found when it was loaded."""
    return Model(
        id=new_id("mdl"),
        name=name,
        spec=model_to_json(spec),
        fingerprint=dict(loaded.fingerprint),
        attributed=[asdict(module) for module in loaded.attributed],
        skipped=[asdict(module) for module in loaded.skipped],
        context_length=loaded.context_length,
    )


def index_from_json(kept: Mapping[str, Any]) -> IndexSpec:
    """The spec of an index that was kept."""
    rest = {name: value for name, value in kept.items() if name != "projection"}
    return IndexSpec(projection=ProjectionSpec(**kept["projection"]), **rest)

"""From what the catalog keeps (JSON) to what the library takes (frozen dataclasses), and back."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from app.influence.index import IndexSpec
from app.influence.models import Checkpoint, ModelSpec
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


def index_from_json(kept: Mapping[str, Any]) -> IndexSpec:
    """The spec of an index that was kept."""
    rest = {name: value for name, value in kept.items() if name != "projection"}
    return IndexSpec(projection=ProjectionSpec(**kept["projection"]), **rest)

"""What a manifest must look like before anything in it is believed: file names that stay in the folder, numbers, lists.

Only what is read from it is held to a shape; keys that a later version adds do no harm.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$")]  # no separator, and so no way out of the folder
Count = Annotated[int, Field(ge=0, lt=2**63)]  # what C++ can count


class _Shape(BaseModel):
    model_config = ConfigDict(strict=True)


class _Checkpoint(_Shape):
    name: str
    weight: Annotated[float, Field(allow_inf_nan=False)]
    train_loss: float
    heldout_loss: float | None


class _Shard(_Shape):
    name: Name
    rows: Count
    bytes: Count
    ids: str
    flagged: list[str]
    loss: list[float]
    files: Annotated[list[Annotated[list[Any], Field(min_length=3, max_length=3)]], Field(min_length=2)]


class _File(_Shape):
    name: Name
    size: Count
    digest: str


class _Manifest(_Shape):
    width: Annotated[int, Field(ge=1, lt=2**31)]
    checkpoints: Annotated[list[_Checkpoint], Field(min_length=1)]
    fingerprint: dict[str, str]
    shards: list[_Shard]
    deleted: list[str]
    warnings: list[str]
    stats: dict[str, Any]
    curvature: _File | None = None


def require_shape(manifest: dict[str, Any]) -> None:
    """Raise ValueError unless a parsed manifest has the shape of one."""
    for shard in _Manifest.model_validate(manifest).shards:
        for name, size, digest in shard.files:
            _File(name=name, size=size, digest=digest)


class _Factors(_Shape):
    spec: dict[str, Any]
    fingerprint: dict[str, str]
    files: Annotated[list[Annotated[list[Any], Field(min_length=3, max_length=3)]], Field(min_length=1)]
    rows: Count
    of: Count
    ids: str
    tokens: Count
    format: Literal[1]


def require_factors_shape(record: Any) -> None:
    """Raise ValueError unless a parsed record of EK-FAC factors has the shape of one."""
    for name, size, digest in _Factors.model_validate(record).files:
        _File(name=name, size=size, digest=digest)

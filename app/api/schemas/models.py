"""Models on the wire."""

from collections import Counter
from datetime import datetime
from typing import Literal, Self

from pydantic import BaseModel, Field

from app.api.schemas.common import NAME, Body, Name, Real
from app.catalog.tables import Model


class CheckpointIn(Body):
    """One checkpoint of a run."""

    name: Name = Field(description="What to call it in answers.", examples=["step-200"])
    adapter: str | None = Field(
        None, description="Folder of a PEFT adapter (safetensors) on top of the base.", examples=["adapters/step-200"]
    )
    model: str | None = Field(
        None, description="Folder of a full checkpoint, when it is not the base with an adapter.", examples=[None]
    )
    weight: Real = Field(
        1.0, gt=0, allow_inf_nan=False, description="Its weight in the sum of the scores (its learning rate, say)."
    )


class ModelIn(Body):
    """A model to register."""

    name: Name = Field(description=NAME, examples=["smollm2-veld"])
    path: str = Field(
        min_length=1,
        description="Folder of a Hugging Face causal LM in safetensors, inside the allowed roots.",
        examples=["models/smollm2-135m"],
    )
    gguf_file: str | None = Field(None, description="A GGUF file inside the folder to load instead.", examples=[None])
    checkpoints: list[CheckpointIn] = Field(
        default_factory=list,
        max_length=64,
        description="Checkpoints that the scores are summed over. Empty: the base model alone.",
    )
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Precision to load in.")
    device: str | None = Field(
        None, pattern=r"^(cpu|cuda(:\d+)?|mps)$", description="Device; null for the server's default.", examples=["cpu"]
    )


class ModuleOut(BaseModel):
    """A module whose gradients are attributed."""

    name: str = Field(description="Its dotted name.", examples=["model.layers.0.self_attn.q_proj"])
    kind: str = Field(description="What it is.", examples=["Linear"])
    d_in: int = Field(description="Width of its input.", examples=[576])
    d_out: int = Field(description="Width of its output.", examples=[576])


class SkippedOut(BaseModel):
    """A module with weights that is left out, and why."""

    name: str = Field(description="Its dotted name.", examples=["model.embed_tokens"])
    kind: str = Field(description="What it is.", examples=["Embedding"])
    reason: str = Field(description="Why it is left out.", examples=["not a linear map"])


class AttributedGroup(BaseModel):
    """Attributed modules of the same kind and shape."""

    kind: str = Field(description="What they are.", examples=["Linear"])
    d_in: int = Field(description="Width of their input.", examples=[576])
    d_out: int = Field(description="Width of their output.", examples=[576])
    count: int = Field(description="How many.", examples=[60])


class SkippedGroup(BaseModel):
    """Modules that are skipped for the same reason."""

    kind: str = Field(description="What they are.", examples=["LlamaRMSNorm"])
    reason: str = Field(description="Why they are left out.", examples=["not a linear map"])
    count: int = Field(description="How many.", examples=[61])


class CheckpointOut(BaseModel):
    """One checkpoint of a registered model."""

    name: str = Field(description="What answers call it.", examples=["step-200"])
    adapter: str | None = Field(description="Folder of its adapter.", examples=["/srv/adapters/step-200"])
    model: str | None = Field(description="Folder of its full weights.", examples=[None])
    weight: float = Field(description="Its weight in the sum of the scores.", examples=[1.0])


class ModelSummary(BaseModel):
    """A registered model in a list."""

    id: str = Field(description="Its id.", examples=["mdl_0194b2c5f3a1e23f9a0c11"])
    name: str = Field(description="Its unique name.", examples=["smollm2-veld"])
    path: str = Field(description="Folder of the base.", examples=["/srv/models/smollm2-135m"])
    gguf_file: str | None = Field(description="The GGUF file, if one is used.", examples=[None])
    dtype: str = Field(description="Precision.", examples=["float32"])
    device: str = Field(description="Device.", examples=["cpu"])
    checkpoints: list[CheckpointOut] = Field(description="What the scores are summed over.")
    context_length: int = Field(description="Most tokens that the model can read.", examples=[2048])
    created_at: datetime = Field(description="When it was registered (UTC).")

    @classmethod
    def of(cls, model: Model) -> Self:
        """As the catalog has it."""
        return cls(**_summary(model))


class ModelOut(ModelSummary):
    """A registered model with what is attributed in it."""

    fingerprint: dict[str, str] = Field(
        description="SHA-256 of each part that gives scores their meaning; an index answers for these hashes only.",
        examples=[{"base": "9f2c…", "tokenizer": "1b7a…", "chat_template": "e3b0…"}],
    )
    attributed_groups: list[AttributedGroup] = Field(description="What is attributed, counted by kind and shape.")
    skipped_groups: list[SkippedGroup] = Field(description="What is left out, counted by reason.")
    attributed: list[ModuleOut] = Field(description="Every attributed module.")
    skipped: list[SkippedOut] = Field(description="Every module that is left out.")

    @classmethod
    def of(cls, model: Model) -> Self:
        """As the catalog has it."""
        attributed = [ModuleOut(**module) for module in model.attributed]
        skipped = [SkippedOut(**module) for module in model.skipped]
        shapes = Counter((module.kind, module.d_in, module.d_out) for module in attributed)
        reasons = Counter((module.kind, module.reason) for module in skipped)
        return cls(
            **_summary(model),
            fingerprint=model.fingerprint,
            attributed=attributed,
            skipped=skipped,
            attributed_groups=[
                AttributedGroup(kind=kind, d_in=d_in, d_out=d_out, count=count)
                for (kind, d_in, d_out), count in shapes.most_common()
            ],
            skipped_groups=[
                SkippedGroup(kind=kind, reason=reason, count=count) for (kind, reason), count in reasons.most_common()
            ],
        )


def _summary(model: Model) -> dict[str, object]:
    about = {"id": model.id, "name": model.name, "context_length": model.context_length, "created_at": model.created_at}
    return {**about, **model.spec}

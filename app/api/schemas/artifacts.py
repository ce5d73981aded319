"""What a job made, on the wire."""

from datetime import datetime

from pydantic import BaseModel, Field


class ArtifactOut(BaseModel):
    """A file that a job made; it is at `/jobs/{job}/artifacts/{path}`."""

    path: str = Field(description="Its name in the job's folder.", examples=["adapter/adapter_model.safetensors"])
    bytes: int = Field(description="Its size.", examples=[1_856_040])
    media_type: str = Field(description="What it is.", examples=["application/octet-stream"])
    modified_at: datetime = Field(description="When it was written (UTC).")

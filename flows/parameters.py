"""What the flow takes. Prefect shows it as a form and refuses a bad value before a run exists."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Parameters(BaseModel):
    """One run: which model, how it is quantized, how it is measured, where it goes."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(
        "tiny-gemma3",
        description="A Hub repository such as google/gemma-3-4b-it, a directory, or the built-in tiny-gemma3.",
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a Hub repository; its default branch.")
    recipe: str = Field("HQQ-INT8-INT4", description="The recipe's name, or the path of a recipe's JSON file.")
    benchmark: Literal["mmlu-mini", "cais/mmlu"] = Field(
        "mmlu-mini", description="Questions to measure on: the built-in fixture, or MMLU from the Hub."
    )
    limit: int | None = Field(None, ge=1, description="Questions per subject; all.")
    batch_size: str = Field("16", pattern=r"^(auto|[1-9]\d*)$", description="Questions per batch, or auto.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where the evaluation runs.")
    max_seq_len: int = Field(1024, ge=2, description="Longest sequence of the exported program, in tokens.")
    max_new_tokens: int = Field(64, ge=1, description="Length of the smoke tests' answers, in tokens.")
    max_mmlu_drop: float = Field(5.0, ge=0, description="Points of MMLU accuracy that the gate lets a release lose.")
    max_kl_ratio: float = Field(
        2.0, gt=0, description="How far the program may be from the checkpoint, in times the activation rounding."
    )
    target: str | None = Field(None, description="Hub repository to publish to; without it nothing is uploaded.")
    refresh: list[str] = Field(default_factory=list, description="Stages that run again though they are cached.")

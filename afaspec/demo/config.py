"""The demo's settings."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from bench.records.settings import Settings


class DataSettings(Settings):
    """What is adapted to what."""

    GROUP: ClassVar[str] = "Data"

    data: str | None = Field(
        None, description="folder or JSONL of your own [default: Python tasks, of embedded C++]"
    )
    out: Path = Field(Path("runs/demo"), description="folder of all results")
    target: str | None = Field(
        None, description="target model [default: smollm2; embedded where its package is missing]"
    )
    draft: str | None = Field(None, description="base draft [default: the target's own]")
    general: str | None = Field(
        None,
        description="general prompts, to replay and to measure what is kept of them "
        "[default: the pair's]",
    )
    mix: float = Field(
        0.2, ge=0, lt=1, description="share of general prompts among those that are learned from"
    )
    train_prompts: int = Field(128, gt=1, description="prompts the target answers for training")
    eval_prompts: int = Field(12, gt=0, description="other prompts, for measuring")
    prompt_tokens: int = Field(96, gt=0, description="prompt length in plain text")
    new_tokens: int = Field(96, gt=0, description="tokens of each answer")
    seed: int = Field(0, description="of everything")


class TrainingSettings(Settings):
    """How both arms are trained."""

    GROUP: ClassVar[str] = "Training"

    steps: int = Field(100, gt=0, description="optimizer steps of each arm")
    rank: int = Field(32, gt=0, description="LoRA rank")
    tune: bool | None = Field(
        None,
        description="tune each arm's learning rate by short runs (default: only with --data)",
    )
    tuning_steps: int = Field(40, gt=0, description="steps of each try of a learning rate")
    learning_rates: list[float] = Field(
        [1.25e-3, 2.5e-3, 5e-3], min_length=1, description="peak rates tried for each arm"
    )


class DemoConfig(TrainingSettings, DataSettings):
    """The demo; with the defaults two cores take about a quarter of an hour."""

    GROUP: ClassVar[str] = "Measuring"

    k: int = Field(3, gt=0, description="speculative tokens per step")
    rounds: int = Field(1, gt=0, description="rounds of measuring")
    enforce_eager: bool = Field(False, description="do not compile in vLLM")

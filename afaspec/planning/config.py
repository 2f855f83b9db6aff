"""What is to be planned, and what it costs."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from afaspec.capture.config import CaptureConfig, ReaderSettings
from afaspec.train.config import Arm, TrainConfig
from bench.records.settings import ModelName, Settings


class TrainingToPlan(Settings):
    """As of `afaspec train`; what is not here has its defaults."""

    GROUP: ClassVar[str] = "Training"

    arm: Arm = Field("lora", description="adapters (plain or annealed), or all weights")
    rank: int = Field(32, gt=0, description="LoRA rank")
    lm_head: bool = Field(False, description="adapt (or train) the output layer as well")
    draft_steps: int = Field(3, gt=0, le=16, description="draft steps trained (k at serving)")
    steps: int = Field(300, gt=0, description="optimizer steps")
    train_batch_size: int = Field(8, gt=0, description="sequences per micro-batch")
    accumulation: int = Field(1, gt=0, description="micro-batches per optimizer step")
    eval_every: int = Field(50, gt=0, description="steps between evaluations")

    def of_a_run(self, store: Path, draft: str, out: Path) -> TrainConfig:
        """The run that is planned."""
        own = {*TrainingToPlan.model_fields} - {"train_batch_size"}
        given = self.model_dump(include=own | {*ReaderSettings.model_fields})
        return TrainConfig(
            store=store, draft=draft, out=out, batch_size=self.train_batch_size, **given
        )


class BenchToPlan(Settings):
    """As of `afaspec bench`: no speculation, the base draft and the adapted one."""

    GROUP: ClassVar[str] = "Bench"

    bench_prompts: int = Field(100, ge=0, description="prompts that are measured; 0: no bench")
    rounds: int = Field(3, gt=0, description="times that all prompts are run")
    bench_tokens: int = Field(128, gt=0, description="tokens of an answer")


class Costs(Settings):
    """What a machine costs, and what it is to serve."""

    GROUP: ClassVar[str] = "Costs"

    price: float | None = Field(None, gt=0, description="of the machine, per hour")
    tokens_per_day: float | None = Field(None, gt=0, description="that are to be served")
    serving_rate: float | None = Field(
        None, gt=0, description="tokens/s of that machine without a draft [default: the bench's]"
    )


class PlanConfig(Costs, BenchToPlan, TrainingToPlan, CaptureConfig):
    """A capture, the training on it and the bench of what comes out."""

    GROUP: ClassVar[str] = "Prompts"

    draft: ModelName = Field(description="base draft that is adapted")
    out: Path = Field(Path("runs/plan"), description="folder for samples and plan.json")
    sample: int | None = Field(
        None, gt=1, description="prompts that are captured to time it [default: a batch]"
    )

"""Everything that a loop depends on, as one checked configuration."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from afaspec.config import TargetAdapter
from afaspec.train.config import Arm
from bench.records.settings import ModelName, Settings


class LoopPlaces(Settings):
    """What the loop looks at, and where it keeps what it does."""

    GROUP: ClassVar[str] = "Models and places"

    url: str = Field(description="server that `afaspec serve --swappable --collect` started")
    admin: str | None = Field(
        None,
        description="of a server on another machine, the address where its draft is changed; its "
        "token in AFASPEC_ADMIN_TOKEN, and --out a folder that it reads too",
    )
    model: str | None = Field(None, description="the name that it serves the model by")
    target: ModelName = Field(description="the served target's folder, `smollm2` or `embedded`")
    target_adapter: TargetAdapter = None
    draft: ModelName = Field(description="the base draft: what adapting begins with")
    traffic: Path = Field(description="folder of `serve --collect`")
    general: str = Field(
        description="general prompts (as `afaspec capture` takes them): some are replayed, so that "
        "nothing is forgotten, the others show what is kept"
    )
    out: Path = Field(description="folder of the loop")


class WatchSettings(Settings):
    """When it acts."""

    GROUP: ClassVar[str] = "When it acts"

    every: float = Field(5.0, gt=0, description="seconds between looks at the server")
    alpha: float = Field(0.05, gt=0, lt=1, description="chance of ever calling a drop in vain")
    after_rows: int | None = Field(
        None, gt=0, description="act after so many new rows too, without a drop"
    )
    least_rows: int = Field(100, gt=0, description="rows since the drop that adapting waits for")
    trial_steps: int = Field(30, gt=0, description="training steps of the trial")
    least_gain: float = Field(
        0.02, ge=0, description="acceptance length that a trial must gain, as a share"
    )
    export_port: int | None = Field(
        None, ge=1, le=65535, description="port of this machine with the figures for Prometheus"
    )
    step_cost: float | None = Field(
        None, gt=0, description="as for `afaspec watch`: an estimate of the speedup for Prometheus"
    )


class AdaptSettings(Settings):
    """How it adapts."""

    GROUP: ClassVar[str] = "Adapting"

    rows: int = Field(400, gt=0, description="rows to learn from, at most: the newest")
    begin_with: Literal["base", "current"] = Field(
        "base", description="the draft that training begins with: --draft, or the one that serves"
    )
    arm: Arm = Field("lora", description="what is trained")
    rank: int = Field(32, gt=0, description="LoRA rank")
    steps: int = Field(200, gt=0, description="training steps")
    batch_size: int = Field(8, gt=0, description="sequences a step")
    learning_rate: float | None = Field(None, gt=0, description="peak rate [default: train's]")
    mix: float = Field(0.2, ge=0, lt=1, description="share of general sequences")
    new_tokens: int = Field(128, gt=0, description="longest general answer, and in the gate")
    seed: int = Field(0, description="of training, and of what is drawn")
    niceness: int = Field(
        10, ge=0, le=19, description="how far the server's work goes before the loop's (nice)"
    )


class GateSettings(Settings):
    """What a new draft must show."""

    GROUP: ClassVar[str] = "Gate"

    eval_fraction: float = Field(
        0.25, gt=0, lt=1, description="share of the traffic's prompts that is measured, not learned"
    )
    gate_prompts: int = Field(24, gt=1, description="of them, at most, in vLLM")
    general_prompts: int = Field(24, gt=1, description="general prompts that show what is kept")
    keep: float = Field(0.97, gt=0, le=1, description="share of the general acceptance to keep")
    probation: int = Field(
        60, gt=0, description="looks with drafts for which a new draft is held against the old one"
    )
    retries: int = Field(5, gt=0, description="times that a failing step is tried")
    retry_seconds: float = Field(30.0, gt=0, description="before a second try; then twice that")


class LoopConfig(GateSettings, AdaptSettings, WatchSettings, LoopPlaces):
    """A loop of `afaspec loop`. Paths are folders."""

    @property
    def changed_at(self) -> str:
        """Where the draft is changed."""
        return self.admin or self.url

    @model_validator(mode="after")
    def _enough_rows(self) -> LoopConfig:
        if self.least_rows > self.rows:
            raise ValueError(f"least_rows {self.least_rows} is more than rows {self.rows}")
        return self

"""When beta falls, and which activations it fades out: settings alone, which import nothing heavy.

The formula is AFA-LoRA's (arXiv 2512.22455). The paper's schedule is not known to us; shapes,
hold and end are our own choices.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Activation = Literal["relu", "leaky_relu", "silu", "gelu", "tanh"]
Shape = Literal["linear", "cosine", "exponential", "step"]


class AnnealingSchedule(BaseModel):
    """beta by optimizer step: 1 until `start + hold`, then down `shape` to 0 from `end` on.

    `start`, `hold` and `end` are fractions of the run where at most 1, else steps.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    GROUP: ClassVar[str] = "Annealing (arm afa-lora)"

    shape: Shape = Field("cosine", description="how beta falls")
    start: float = Field(0.0, ge=0, description="annealing may begin here (fraction or steps)")
    hold: float = Field(0.0, ge=0, description="beta stays 1 this long from start on")
    end: float = Field(0.5, gt=0, description="beta is 0 from here on (fraction or steps)")
    stairs: int = Field(4, ge=1, description="levels of the step shape")
    rate: float = Field(5.0, gt=0, description="decay rate of the exponential shape")

    @model_validator(mode="after")
    def _ends_inside(self) -> AnnealingSchedule:
        fractions = all(x <= 1 for x in (self.start, self.hold, self.end))
        if fractions and self.start + self.hold > self.end:
            raise ValueError("annealing must begin before it ends: start + hold <= end")
        return self

    def beta(self, step: int, total: int) -> float:
        """beta after `step` of `total` optimizer steps: in [0, 1], never rising, exactly 0 at last.

        The last step itself always trains with beta = 0, so `end` acts no later than total - 1.
        """
        last = max(total - 1, 0)
        end: float = min(_steps(self.end, total), last)
        begin: float = min(_steps(self.start, total) + _steps(self.hold, total), end)
        if step >= end:
            return 0.0
        if step <= begin:
            return 1.0
        done = (step - begin) / (end - begin)
        if self.shape == "linear":
            return 1.0 - done
        if self.shape == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * done))
        if self.shape == "step":
            return 1.0 - math.floor(done * self.stairs) / self.stairs
        floor = math.exp(-self.rate)
        return (math.exp(-self.rate * done) - floor) / (1.0 - floor)


def _steps(value: float, total: int) -> int:
    return round(value * total) if value <= 1 else round(value)

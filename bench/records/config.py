"""What to measure and how: the settings of a run in process."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import Field, InstanceOf

from bench.records.arms import Arm
from bench.records.settings import BenchSettings
from drafts.target.info import TargetInfo


class BenchConfig(BenchSettings):
    """A run in process. `limit` caps the number of prompts, None takes all.

    `concurrency` requests run at once; `block` prompts make a block (at least as many).
    `samples` requests per arm test the output's distribution at temperature > 0; 0 tests nothing.
    `prompts` is anything that `bench.prompts.read.read_prompts` takes; `suite_folder` has the files
    of suites.
    """

    target: InstanceOf[TargetInfo]
    prompts: str
    arms: tuple[InstanceOf[Arm], ...]
    concurrency: int = Field(1, ge=1)

    @property
    def most_k(self) -> int:
        """The most tokens that an arm drafts in a step."""
        return max((arm.k(self.k) for arm in self.arms), default=self.k)


@dataclass(frozen=True)
class Condition:
    """What may change between cells without another engine."""

    temperature: float = 0.0
    concurrency: int = 1
    max_tokens: int = 128

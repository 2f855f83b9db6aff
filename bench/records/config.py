"""What to measure and how: the settings of a run in process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bench.records.arms import Arm
from drafts.errors import UserError


@dataclass(frozen=True)
class BenchConfig:
    """What to measure and how. `limit` caps the number of prompts, None takes all.

    `concurrency` requests run at once; `block` prompts make an arm's turn (at least as many).
    `samples` requests per arm test the output's distribution at temperature > 0; 0 tests nothing.
    `prompts` is anything that `bench.prompts.read.read_prompts` takes; `suite_folder` has the files
    of suites.
    """

    target: Path
    prompts: str
    arms: tuple[Arm, ...]
    k: int = 3
    max_tokens: int = 128
    rounds: int = 3
    concurrency: int = 1
    temperature: float = 0.0
    seed: int = 0
    limit: int | None = None
    split: Literal["train", "eval"] | None = None
    prompt_tokens: int = 128
    max_prompt_tokens: int | None = None
    truncate_prompts: bool = False
    ignore_eos: bool = False
    dtype: str = "bfloat16"
    enforce_eager: bool = False
    block: int = 4
    warmup: int = 2
    cache_gib: float = 1.0
    draft_sample_method: str | None = None
    suite_folder: Path | None = None
    samples: int = 1000

    def __post_init__(self) -> None:
        for name in ("k", "max_tokens", "rounds", "concurrency", "block"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}", hint="give 1 or more")
        if self.samples < 0:
            raise UserError(f"samples is {self.samples}", hint="give 0 or more")
        if self.temperature < 0:
            raise UserError(f"temperature is {self.temperature}", hint="give 0 or more")


def as_split(text: str | None) -> Literal["train", "eval"] | None:
    """A side of the prompts by name. Raises `UserError` for another name."""
    if text is None or text == "train" or text == "eval":
        return text  # type: ignore[return-value]
    raise UserError(f"unknown split {text!r}", hint="give eval or train")


@dataclass(frozen=True)
class Condition:
    """What may change between cells without another engine."""

    temperature: float = 0.0
    concurrency: int = 1
    max_tokens: int = 128

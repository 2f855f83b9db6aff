"""The grid of a sweep: which cells there are, and which of them share an engine."""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass

from pydantic import InstanceOf, field_validator

from bench.records.arms import Arm
from bench.records.config import Condition
from bench.sweep.settings import SweepSettings
from drafts.checkpoint.info import DraftInfo
from drafts.errors import UserError
from drafts.target.info import TargetInfo
from serving.speculation import K

MIN_WAVES = 4  # of prompts at a concurrency: fewer say nothing about how much they differ


@dataclass(frozen=True)
class Drafting:
    """What one engine is started with. `sample_method` is None for a draft that cannot sample."""

    arm: Arm
    k: int
    sample_method: str | None = None


@dataclass(frozen=True)
class Cell:
    """One point of the grid: a way to draft under a condition."""

    drafting: Drafting
    condition: Condition

    @property
    def name(self) -> str:
        """What its file is called: short, and different for every cell."""
        d, c = self.drafting, self.condition
        plain = re.sub(r"[^\w.-]", "_", d.arm.name)
        arm = plain if plain == d.arm.name else f"{plain}-{zlib.crc32(d.arm.name.encode()):08x}"
        sampled = f"-{d.sample_method}" if d.sample_method else ""
        return f"{arm}-k{d.k}{sampled}-t{c.temperature:g}-c{c.concurrency}-n{c.max_tokens}"


class SweepConfig(SweepSettings):
    """A grid and what all its cells share. `arms` are the drafts; `none` always runs beside them.

    At temperature 0 drafts are greedy however they sample, so that only the first of
    `sample_methods` runs there. `together` engines with a draft are loaded at a time, so many
    settings share one measurement of `none`.
    """

    target: InstanceOf[TargetInfo]
    prompts: str
    arms: tuple[InstanceOf[Arm], ...]

    @field_validator("arms")
    @classmethod
    def _some_draft(cls, arms: tuple[Arm, ...]) -> tuple[Arm, ...]:
        if not arms:
            raise UserError("a sweep needs a draft", hint="give at least one --draft, or --ngram")
        if own := next((arm for arm in arms if K in arm.fields), None):
            raise UserError(
                f"the draft {own.name!r} has a k of its own, and a sweep goes through those of --k",
                hint="leave it out",
            )
        return arms

    @property
    def cells(self) -> list[Cell]:
        """Every cell, those of one engine in a row."""
        return [
            Cell(drafting, condition)
            for drafting in self._draftings()
            for condition in self._conditions()
            if condition.temperature > 0 or drafting.sample_method in (None, self.sample_methods[0])
        ]

    def _draftings(self) -> list[Drafting]:
        return [
            Drafting(arm, k, method)
            for arm in self.arms
            for method in (self.sample_methods if isinstance(arm.draft, DraftInfo) else (None,))
            for k in self.ks
        ]

    def _conditions(self) -> list[Condition]:
        return [
            Condition(temperature, concurrency, tokens)
            for temperature in self.temperatures
            for tokens in self.max_tokens
            for concurrency in self.concurrencies
        ]


def groups_of(cells: list[Cell], together: int) -> list[list[Cell]]:
    """The cells in groups of at most `together` engines each."""
    engines = list(dict.fromkeys(cell.drafting for cell in cells))
    parts = [set(engines[i : i + together]) for i in range(0, len(engines), together)]
    return [[cell for cell in cells if cell.drafting in part] for part in parts]


def require_waves(config: SweepConfig, prompts: int) -> None:
    """Raise `UserError` where the prompts are too few for the highest concurrency."""
    most = max(config.concurrencies)
    if prompts < MIN_WAVES * most:
        raise UserError(
            f"{prompts} prompts make {prompts // most} waves of {most} requests, and an interval "
            f"needs at least {MIN_WAVES}",
            hint=f"give {MIN_WAVES * most} prompts or more, or a lower --concurrency",
        )

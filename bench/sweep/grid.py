"""The grid of a sweep: which cells there are, and which of them share an engine."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from bench.records.arms import Arm
from bench.records.config import Condition
from drafts.errors import UserError

SampleMethod = Literal["greedy", "probabilistic"]
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


@dataclass(frozen=True)
class SweepConfig:
    """A grid and what all its cells share. `arms` are the drafts; `none` always runs beside them.

    At temperature 0 drafts are greedy however they sample, so that only the first of
    `sample_methods` runs there. `together` engines with a draft are loaded at a time, so many
    settings share one measurement of `none`.
    """

    target: Path
    prompts: str
    arms: tuple[Arm, ...]
    ks: tuple[int, ...] = (1, 2, 3, 5)
    temperatures: tuple[float, ...] = (0.0,)
    concurrencies: tuple[int, ...] = (1, 4)
    max_tokens: tuple[int, ...] = (128,)
    sample_methods: tuple[str, ...] = ("greedy",)
    rounds: int = 2
    together: int = 4
    seed: int = 0
    limit: int | None = None
    split: Literal["train", "eval"] | None = None
    prompt_tokens: int = 128
    max_prompt_tokens: int | None = None
    truncate_prompts: bool = False
    ignore_eos: bool = False
    dtype: str = "bfloat16"
    enforce_eager: bool = False
    cache_gib: float = 1.0
    suite_folder: Path | None = None

    def __post_init__(self) -> None:
        if not self.arms:
            raise UserError("a sweep needs a draft", hint="give at least one --draft, or --ngram")
        check_axis("--k", self.ks)
        check_axis("--temperature", self.temperatures, 0)
        check_axis("--concurrency", self.concurrencies)
        check_axis("--max-tokens", self.max_tokens, 2)  # the first token needs no draft
        self._check_sampling()
        for name in ("rounds", "together"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}", hint="give 1 or more")

    def _check_sampling(self) -> None:
        known, given = get_args(SampleMethod), self.sample_methods
        wrong = [method for method in given if method not in known]
        if wrong or not given or len(set(given)) < len(given):
            raise UserError(
                f"--draft-sample-method has {wrong[0]!r}"
                if wrong
                else "--draft-sample-method is empty or names a method twice",
                hint=f"give {' or '.join(known)}, or both between commas",
            )

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
            for method in ((None,) if arm.draft == "ngram" else self.sample_methods)
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


def parse_axis(text: str, option: str, kind: Callable[[str], Any] = int) -> tuple[Any, ...]:
    """The values of `1,2,3`; whole numbers may be a range too (`1..8`). Raises `UserError`."""
    values: list[Any] = []
    for part in text.split(","):
        try:
            low, dots, high = part.partition("..")
            values += range(int(low), int(high) + 1) if dots and kind is int else [kind(part)]
        except ValueError:
            raise UserError(
                f"{option} has {part.strip()!r} in {text!r}",
                hint=f"give numbers between commas, for example {option} 1,2,3",
            ) from None
    return tuple(values)


def check_axis(option: str, values: tuple[float, ...], least: float = 1) -> None:
    """Raise `UserError` for an empty axis, doubles, and numbers below `least`."""
    if not values:
        raise UserError(f"{option} is empty", hint="give at least one value")
    if len(set(values)) < len(values):
        raise UserError(f"{option} names a value twice", hint="give each value once")
    for value in values:
        if not least <= value < float("inf"):
            raise UserError(f"{option} has {value}", hint=f"give {least} or more")

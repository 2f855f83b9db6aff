"""The axes of a sweep and what all its cells share, as given: nothing is opened, nothing heavy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from bench.records.settings import PromptSettings, RunSettings, VllmSettings
from drafts.errors import UserError

SampleMethod = Literal["greedy", "probabilistic"]
# By field: the flag, what reads a value, and the least value.
AXES: dict[str, tuple[str, Callable[[str], Any], float | None]] = {
    "ks": ("--k", int, 1),
    "concurrencies": ("--concurrency", int, 1),
    "temperatures": ("--temperature", float, 0),
    "max_tokens": ("--max-tokens", int, 2),  # the first token needs no draft
    "sample_methods": ("--draft-sample-method", str.strip, None),
}


class SweepSettings(VllmSettings, RunSettings, PromptSettings):
    """Every value of an axis is combined with all values of the others.

    An axis is a list, or text as `parse_axis` reads it.
    """

    GROUP: ClassVar[str] = "Grid"

    ks: tuple[int, ...] = Field(
        (1, 2, 3, 5),
        validation_alias="k",
        description="speculative tokens per step, such as 1,2,3 or 1..8",
    )
    concurrencies: tuple[int, ...] = Field(
        (1, 4), validation_alias="concurrency", description="requests at once"
    )
    temperatures: tuple[float, ...] = Field(
        (0.0,), validation_alias="temperature", description="0 is greedy"
    )
    max_tokens: tuple[int, ...] = Field((128,), description="tokens to write per prompt")
    sample_methods: tuple[SampleMethod, ...] = Field(
        ("greedy",),
        validation_alias="draft_sample_method",
        description="how drafts sample at temperature > 0",
    )
    together: int = Field(
        4, ge=1, description="engines with a draft loaded at a time, beside the one without"
    )
    rounds: int = Field(2, ge=1, description="how often every prompt is run")

    @field_validator(*AXES, mode="before")
    @classmethod
    def _listed(cls, given: Any, info: ValidationInfo) -> Any:
        option, kind, _ = AXES[str(info.field_name)]
        if isinstance(given, str):
            return parse_axis(given, option, kind)
        return given if isinstance(given, Sequence) else [given]

    @field_validator(*AXES)
    @classmethod
    def _usable(cls, values: tuple[Any, ...], info: ValidationInfo) -> tuple[Any, ...]:
        option, _, least = AXES[str(info.field_name)]
        check_axis(option, values, least)
        return values


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


def check_axis(option: str, values: Sequence[Any], least: float | None = 1) -> None:
    """Raise `UserError` for an empty axis, doubles, and numbers below `least`."""
    if not values:
        raise UserError(f"{option} is empty", hint="give at least one value")
    if len(set(values)) < len(values):
        raise UserError(f"{option} names a value twice", hint="give each value once")
    for value in values if least is not None else ():
        if not least <= value < float("inf"):
            raise UserError(f"{option} has {value}", hint=f"give {least} or more")

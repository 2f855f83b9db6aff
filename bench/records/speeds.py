"""The three speeds of a run, which must not be mixed up: their keys and their names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Speed:
    """One of them: `noun` is what it is called, `times` and `more` are sentences about two arms."""

    name: str
    label: str
    noun: str
    times: str
    more: str

    @property
    def rate(self) -> str:
        """The key of its tokens per second in an arm's part of a report."""
        return f"{self.name}_tokens_per_second"

    @property
    def speedup(self) -> str:
        """The key of its quotient by that of no speculation."""
        return f"{self.name}_speedup"

    @property
    def rate_label(self) -> str:
        """The rate's name over a column."""
        return f"{self.label} tokens/s"

    @property
    def speedup_label(self) -> str:
        """The speedup's name over a column."""
        return f"{self.label} speedup"


# Tokens after the first over the time of the decode phase, all requests of a block together.
DECODE = Speed(
    "decode",
    "Decode",
    "decode speed",
    "{arm} decodes {times} times as fast as {against}",
    "{arm} decodes {share} {faster} than {against}",
)
# All output tokens over the wall time, prefill, queue and HTTP included.
THROUGHPUT = Speed(
    "throughput",
    "Throughput",
    "throughput",
    "{arm} has {times} times the throughput of {against}",
    "{arm} has {share} {higher} throughput than {against}",
)
# Tokens after the first over the time since the first, as one request sees it.
REQUEST = Speed(
    "request",
    "Request",
    "speed of a request",
    "A request with {arm} is decoded {times} times as fast as with {against}",
    "A request with {arm} is decoded {share} {faster} than with {against}",
)

SPEEDS = {speed.name: speed for speed in (DECODE, THROUGHPUT, REQUEST)}
RATES = {speed.rate: speed for speed in SPEEDS.values()}
SPEEDUPS = {speed.speedup: speed for speed in SPEEDS.values()}
FIGURES = (*RATES, *SPEEDUPS)
MEASURES = {speed.rate: speed.rate_label for speed in SPEEDS.values()} | {
    speed.speedup: speed.speedup_label for speed in SPEEDS.values()
}  # by key, as a reader calls them


def speed_of(arm: Mapping[str, Any]) -> Speed:
    """The speed that the verdicts about an arm of a report are of."""
    return SPEEDS[arm["speed"]]

"""The load on a server: how many requests run at once, or when each is sent."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from drafts.errors import UserError


@dataclass(frozen=True)
class Load:
    """One load, by exactly one of the two.

    `concurrency`: a closed loop, in which a request is sent whenever one has ended. `rate`: an open
    loop of so many requests a second on average, sent whether or not earlier ones have ended;
    infinity sends all at once.
    """

    concurrency: int | None = None
    rate: float | None = None

    def __post_init__(self) -> None:
        if (self.concurrency is None) == (self.rate is None):
            raise ValueError("a load has either a concurrency or a rate")

    @property
    def words(self) -> str:
        """The load as a reader likes it."""
        if self.rate is None:
            return f"concurrency {self.concurrency}"
        return "all at once" if math.isinf(self.rate) else f"{self.rate:g} requests/s"

    @property
    def is_paced(self) -> bool:
        """Do the arrivals set how many tokens a second all requests get together?"""
        return self.rate is not None and math.isfinite(self.rate)

    def as_json(self) -> dict[str, Any]:
        """Its key in a report; infinity as text, which JSON has no number for."""
        if self.rate is None:
            return {"concurrency": self.concurrency}
        return {"request_rate": "inf" if math.isinf(self.rate) else self.rate}


def poisson_arrivals(rate: float, requests: int, seed: int) -> NDArray[np.float64]:
    """When to send each request [requests], in seconds from the start: a Poisson process.

    The gaps are independent and exponential with mean 1/`rate` (all 0 for an infinite rate). Equal
    seeds give equal times, and times that differ by a factor only at another rate.
    """
    gaps = np.random.default_rng(seed).exponential(1.0, requests)
    return np.cumsum(gaps / rate)


def parse_loads(concurrency: str | None, request_rate: str | None) -> tuple[Load, ...]:
    """Loads from `1,4,16` or from `0.5,2,inf`; concurrency 1 when neither is given.

    Raises `UserError` for both, and for what is no number above 0.
    """
    if concurrency and request_rate:
        raise UserError(
            "a run has closed loops (--concurrency) or open ones (--request-rate), not both",
            hint="measure them in two runs",
        )
    if request_rate:
        return tuple(Load(rate=_rate(text)) for text in _parts(request_rate))
    return tuple(Load(concurrency=whole(text)) for text in _parts(concurrency or "1"))


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def whole(text: str) -> int:
    """A concurrency from text. Raises `UserError` for what is no whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise UserError(
            f"concurrency is {text!r}", hint="give whole numbers from 1: --concurrency 1,4,16"
        )
    return int(text)


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not rate > 0:
        raise UserError(
            f"the request rate is {text!r}",
            hint="give requests per second above 0, or inf: --request-rate 0.5,2,inf",
        )
    return rate

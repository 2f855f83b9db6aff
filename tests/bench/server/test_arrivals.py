"""When requests are sent: the statistics of a Poisson process, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import kstest

from bench.server.arrivals import Load, parse_loads, poisson_arrivals, whole
from drafts.errors import UserError

RATE, REQUESTS = 2.5, 20_000


def test_gaps_are_exponential() -> None:
    gaps = np.diff(poisson_arrivals(RATE, REQUESTS, seed=0), prepend=0.0)
    error = 4 / math.sqrt(REQUESTS)  # four standard errors of both
    assert gaps.mean() == pytest.approx(1 / RATE, rel=error)
    assert gaps.std() / gaps.mean() == pytest.approx(1.0, abs=error)
    assert kstest(gaps, "expon", args=(0, 1 / RATE)).pvalue > 0.01
    assert abs(np.corrcoef(gaps[1:], gaps[:-1])[0, 1]) < error


def test_counts_in_windows_are_poisson() -> None:
    counts = np.bincount((poisson_arrivals(RATE, REQUESTS, seed=1) / 4).astype(int))[:-1]
    assert counts.var() / counts.mean() == pytest.approx(1.0, abs=0.1)


def test_times_follow_from_the_seed() -> None:
    times = poisson_arrivals(RATE, 10, seed=3)
    assert np.array_equal(times, poisson_arrivals(RATE, 10, seed=3))
    assert not np.array_equal(times, poisson_arrivals(RATE, 10, seed=4))
    assert poisson_arrivals(2 * RATE, 10, seed=3) == pytest.approx(times / 2)
    assert not poisson_arrivals(math.inf, 10, seed=3).any()


def test_loads_from_text() -> None:
    assert parse_loads(None, None) == (Load(concurrency=1),)
    assert parse_loads("1, 16", None) == (Load(concurrency=1), Load(concurrency=16))
    open_loops = parse_loads(None, "0.5,inf")
    assert open_loops == (Load(rate=0.5), Load(rate=math.inf))
    assert [load.is_paced for load in open_loops] == [True, False]
    assert [load.as_json() for load in open_loops] == [
        {"request_rate": 0.5},
        {"request_rate": "inf"},
    ]


@pytest.mark.parametrize("text", ["0", "-1", "1,,2", "two", "1.5"])
def test_bad_concurrency(text: str) -> None:
    with pytest.raises(UserError, match="concurrency is"):
        parse_loads(text, None)
    if "," not in text:
        with pytest.raises(UserError, match="concurrency is"):
            whole(text)


@pytest.mark.parametrize("text", ["0", "-1", "1,,2", "fast", "nan"])
def test_bad_rate(text: str) -> None:
    with pytest.raises(UserError, match="request rate is"):
        parse_loads(None, text)


def test_closed_and_open_loops_are_not_mixed() -> None:
    with pytest.raises(UserError, match="not both"):
        parse_loads("1,4", "2")

"""The drift test: few false alarms however long one looks, and a drop of 0.2 found soon."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from bench.stats.drift import Drift

RUNS = 200
Units = npt.NDArray[np.int64]  # drafts and accepted tokens, a row a request


def traffic(seed: int, requests: int, drop: float = 0.0, at: int = 0, k: int = 3) -> Units:
    """Requests of several topics: acceptance differs by topic, by request and by step.

    Some 0.9 tokens are accepted a draft, from request `at` on `drop` fewer.
    """
    random = np.random.default_rng(seed)
    lost = np.where(np.arange(requests) >= at, drop / 2.6, 0.0)  # of the chance of a token
    chance = random.choice([0.42, 0.5, 0.6], requests) + random.normal(0, 0.08, requests) - lost
    reached = np.clip(chance, 0.02, 0.98)[:, None] ** np.arange(k + 2)
    reached[:, k + 1] = 0
    drafts = 1 + random.geometric(1 / 60, requests)
    histogram = random.multinomial(drafts, reached[:, :-1] - reached[:, 1:])
    return np.stack([drafts, histogram @ np.arange(k + 1)], axis=1)


def called_at(units: Units, spans: int = 1) -> float:
    """After how many requests a drop is called; `spans` requests make a unit."""
    test = Drift(baseline_units=max(30, 200 // spans))
    for i in range(0, len(units), spans):
        drafts, accepted = units[i : i + spans].sum(axis=0)
        if test.add(int(drafts), int(accepted)):
            return i + spans
    return np.inf


@pytest.mark.parametrize("spans", [1, 10])
def test_stationary_traffic_seldom_gives_an_alarm(spans: int) -> None:
    alarms = [called_at(traffic(seed, 3000), spans) for seed in range(RUNS)]
    assert np.isfinite(alarms).mean() <= 0.05


@pytest.mark.parametrize("spans", [1, 10])
def test_a_drop_of_a_fifth_of_a_token_is_found(spans: int) -> None:
    at, runs = 1000, [traffic(1000 + seed, 3000, drop=0.2, at=1000) for seed in range(RUNS)]
    means = [units[at:].sum(axis=0) / units[at:, 0].sum() for units in runs]
    before = [units[:at].sum(axis=0) / units[:at, 0].sum() for units in runs]
    assert np.mean(before, axis=0)[1] - np.mean(means, axis=0)[1] == pytest.approx(0.2, abs=0.02)
    found = np.array([called_at(units, spans) for units in runs])
    delays = found[found > at] - at
    assert (found <= at).mean() <= 0.05
    assert np.isfinite(delays).mean() >= 0.98
    assert np.median(delays) <= 400


def test_what_it_says_of_itself() -> None:
    test = Drift(baseline_units=50, baseline_drafts=100)
    for drafts, accepted in traffic(3, 50):
        assert test.baseline is None
        assert not test.add(int(drafts), int(accepted))
    assert test.baseline is not None
    assert 1.7 < test.baseline < 2.1
    assert test.statistic == 0
    assert not test.add(0, 0)
    assert test.units == 50
    while not test.add(40, 4):
        assert test.statistic < 1
    assert test.dropped
    assert test.statistic >= 1
    assert test.add(40, 80), "a call is not taken back"

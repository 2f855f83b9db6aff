"""Bootstrap intervals against a truth that is known because the data are made from it."""

from __future__ import annotations

import numpy as np

from bench.records.acceptance import Acceptance
from bench.stats.resample import Figure, Resampler, figure, ratio, resample_acceptance

PROMPTS, ROUNDS, SIMULATIONS = 50, 3, 300


def test_coverage_of_a_ratio_of_sums() -> None:
    """About 95% of the 95% intervals hold the truth: not far fewer, and not all."""
    generator = np.random.default_rng(1)
    truth, hits = 0.6 / 0.4, 0
    for simulation in range(SIMULATIONS):
        chance = generator.beta(6, 4, PROMPTS)  # prompts differ, with mean 0.6
        size = generator.integers(20, 60, PROMPTS)
        accepted = generator.binomial(size, chance)
        resampler = Resampler(PROMPTS, seed=simulation, resamples=400)
        found = figure(ratio(resampler.sums(accepted), resampler.sums(size - accepted)))
        hits += found.low <= truth <= found.high
    assert 0.90 <= hits / SIMULATIONS <= 0.985


def test_coverage_of_a_paired_speedup_under_machine_drift() -> None:
    """Drift that slows both arms by half must neither move nor widen the speedup."""
    generator = np.random.default_rng(2)
    truth, hits, widths = 1.5, 0, []
    for simulation in range(SIMULATIONS):
        prompt = generator.lognormal(0, 0.5, PROMPTS)
        drift = generator.uniform(1, 1.5, (ROUNDS, 1))
        noise = generator.lognormal(0, 0.1, (2, ROUNDS, PROMPTS))
        plain, fast = prompt * drift * noise[0], prompt * drift * noise[1] / truth
        resampler = Resampler(PROMPTS, ROUNDS, seed=simulation, resamples=400)
        found = figure(ratio(resampler.sums(plain), resampler.sums(fast)))
        hits += found.low <= truth <= found.high
        widths.append(found.high - found.low)
    assert hits / SIMULATIONS >= 0.90
    assert np.mean(widths) < 0.15


def test_pairing_is_what_makes_it_narrow() -> None:
    generator = np.random.default_rng(3)
    seconds = generator.lognormal(0, 0.5, PROMPTS)
    slow, fast = seconds, seconds / 1.5 * generator.lognormal(0, 0.02, PROMPTS)
    one, other = Resampler(PROMPTS, seed=0), Resampler(PROMPTS, seed=1)
    paired = figure(ratio(one.sums(slow), one.sums(fast)))
    unpaired = figure(ratio(one.sums(slow), other.sums(fast)))
    assert paired.high - paired.low < 0.2 * (unpaired.high - unpaired.low)


def test_same_seed_same_interval() -> None:
    data = np.arange(12.0).reshape(3, 4)
    first, again = (Resampler(4, 3, seed=5).sums(data) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert first[0] == data.sum()
    assert not np.array_equal(first, Resampler(4, 3, seed=6).sums(data))


def test_acceptance_figures_agree_with_the_definitions() -> None:
    generator = np.random.default_rng(4)
    drafts = generator.integers(10, 40, PROMPTS)
    first = generator.binomial(drafts, 0.7)
    acceptance = Acceptance(drafts, np.stack([first, generator.binomial(first, 0.6)], axis=1))
    samples = resample_acceptance(acceptance, Resampler(PROMPTS))
    assert samples.length[0] == acceptance.acceptance_length
    assert samples.rate[0] == acceptance.acceptance_rate
    assert [s[0] for s in samples.per_position] == acceptance.per_position.tolist()
    assert [s[0] for s in samples.conditional] == acceptance.conditional.tolist()
    found = figure(samples.length)
    assert found.low < found.value < found.high


def test_undefined_figures_are_null_in_json() -> None:
    samples = ratio(np.zeros(5), np.zeros(5))
    assert figure(samples).as_json() == {"value": None, "low": None, "high": None}
    assert Figure(1.0, 0.5, 2.0).as_json() == {"value": 1.0, "low": 0.5, "high": 2.0}

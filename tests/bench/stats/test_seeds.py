"""Seeds x prompts: the intervals hold the truth however the variance is shared out."""

from __future__ import annotations

import numpy as np
import pytest

from bench.stats.intervals import Floats, Quotient
from bench.stats.seeds import seeded_comparison, seeded_figure
from bench.stats.verdict import ACCEPTANCE

PROMPTS, SIMULATIONS, K = 24, 200, 3


def arm(
    generator: np.random.Generator, seeds: int, seed_spread: float, prompts: Floats
) -> Quotient:
    """Steps and tokens of `seeds` drafts; chances vary by seed, by prompt and by both."""
    logits = generator.normal(0, seed_spread, (seeds, 1)) + prompts
    logits = logits + generator.normal(0, 0.1, logits.shape)
    drafts = np.tile(generator.integers(30, 70, len(prompts)), (seeds, 1))
    accepted = generator.binomial(K * drafts, 1 / (1 + np.exp(-logits)))
    return Quotient((drafts + accepted).astype(float), drafts.astype(float))


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("spread", [0.0, 0.2])
def test_an_interval_holds_the_truth_and_equal_arms_are_equal(seeds: int, spread: float) -> None:
    generator = np.random.default_rng(seeds)
    logits = generator.normal(0, 0.6, 400_000) + generator.normal(0, spread, 400_000)
    truth = 1 + K * float(np.mean(1 / (1 + np.exp(-logits - generator.normal(0, 0.1, 400_000)))))
    hits = alarms = 0
    for _ in range(SIMULATIONS):
        prompts = generator.normal(0, 0.6, PROMPTS)
        first, second = (arm(generator, seeds, spread, prompts) for _ in range(2))
        found = seeded_figure(first.over, first.under)
        hits += found.low <= truth <= found.high
        alarms += seeded_comparison("a", "b", ACCEPTANCE, first, second).p_value < 0.05
    assert hits / SIMULATIONS >= 0.91
    assert alarms / SIMULATIONS <= 0.08


def test_seeds_that_differ_widen_the_interval() -> None:
    generator = np.random.default_rng(7)
    prompts = generator.normal(0, 0.6, PROMPTS)
    widths = []
    for spread in (0.0, 0.3):
        table = arm(generator, 3, spread, prompts)
        found = seeded_figure(table.over, table.under)
        widths.append(found.high - found.low)
    assert widths[1] > 1.3 * widths[0]


def test_a_trained_arm_against_one_that_was_not() -> None:
    generator = np.random.default_rng(8)
    prompts = generator.normal(0, 0.6, PROMPTS)
    trained, base = (
        arm(generator, seeds, 0.02, prompts + gain) for seeds, gain in ((3, 0.5), (1, 0.0))
    )
    found = seeded_comparison("lora", "base", ACCEPTANCE, trained, base)
    assert found.verdict == "higher"
    assert found.difference.low < trained.value - base.value < found.difference.high
    unpaired = seeded_figure(trained.over, trained.under)
    assert found.difference.high - found.difference.low < unpaired.high - unpaired.low


def test_tables_that_do_not_fit_are_refused() -> None:
    one, other = (
        Quotient(np.ones((2, 3)), np.ones((2, 3))),
        Quotient(np.ones((1, 4)), np.ones((1, 4))),
    )
    with pytest.raises(ValueError, match="prompts differ"):
        seeded_comparison("a", "b", ACCEPTANCE, one, other)
    with pytest.raises(ValueError, match="seeds differ"):
        seeded_comparison(
            "a", "b", ACCEPTANCE, one, Quotient(np.ones((1, 3)), np.ones((1, 3))), paired_seeds=True
        )

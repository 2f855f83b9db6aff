"""Comparisons: false alarms as rare as stated, true differences found, and what is said of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import ArrayLike

from bench.records.speeds import DECODE
from bench.stats.intervals import Quotient
from bench.stats.resample import Figure
from bench.stats.verdict import (
    ACCEPTANCE,
    NO_DIFFERENCE,
    Comparison,
    compare,
    correct,
)

PROMPTS, ROUNDS, BLOCK, SIMULATIONS = 20, 3, 4, 400
AT_MOST = 0.05 + 0.022  # two standard errors of SIMULATIONS verdicts beyond the 5% asked for


def quotient(over: ArrayLike, under: ArrayLike) -> Quotient:
    return Quotient(np.asarray(over, float), np.asarray(under, float))


def acceptance(
    generator: np.random.Generator, gain: float = 0.0, prompts: int = PROMPTS
) -> tuple[Quotient, Quotient]:
    """Two arms at k = 3; prompts differ widely, and each arm does a little else on each."""
    drafts = generator.integers(25, 80, prompts)
    chances = generator.beta(4, 3, prompts)
    arms = []
    for shift in (gain, 0.0):
        own = np.clip(chances + shift + generator.normal(0, 0.03, prompts), 0.01, 0.99)
        accepted = np.tile(generator.binomial(3 * drafts, own), (ROUNDS, 1))  # rounds repeat
        arms.append(quotient(drafts + accepted, np.tile(drafts, (ROUNDS, 1))))
    return arms[0], arms[1]


def speeds(
    generator: np.random.Generator, machine: str, gain: float = 1.0, rounds: int = ROUNDS
) -> tuple[Quotient, Quotient]:
    """Two arms that take turns on a machine whose speed changes while they run."""
    work = generator.lognormal(0, 0.4, PROMPTS)
    seconds = np.zeros((2, rounds, PROMPTS))
    log_speed = 0.0
    for round_index in range(rounds):
        for start in range(0, PROMPTS, BLOCK):
            for arm in generator.permutation(2):
                for prompt in range(start, start + BLOCK):
                    if machine == "memory":  # slow and fast stretches of some ten requests
                        log_speed = 0.9 * log_speed + generator.normal(0, 0.02)
                    elif machine == "drift":
                        log_speed += 0.004
                    time = work[prompt] * np.exp(generator.normal(0, 0.02) - log_speed)
                    seconds[arm, round_index, prompt] = time / (gain if arm == 0 else 1)
    tokens = np.full((rounds, PROMPTS), 127.0)
    return Quotient(tokens, seconds[0]), Quotient(tokens, seconds[1])


@pytest.mark.parametrize("prompts", [8, PROMPTS])
def test_equal_drafts_are_rarely_called_different(prompts: int) -> None:
    generator = np.random.default_rng(1)
    found = [
        compare("a", "b", ACCEPTANCE, *acceptance(generator, prompts=prompts), BLOCK)
        for _ in range(SIMULATIONS)
    ]
    assert np.mean([c.verdict != NO_DIFFERENCE for c in found]) <= AT_MOST


@pytest.mark.parametrize(
    ("machine", "rounds"), [("steady", 3), ("memory", 3), ("memory", 1), ("drift", 3)]
)
def test_equal_speeds_are_rarely_called_different(machine: str, rounds: int) -> None:
    generator = np.random.default_rng(2)
    found = [
        compare("a", "b", DECODE.rate, *speeds(generator, machine, rounds=rounds), BLOCK)
        for _ in range(SIMULATIONS)
    ]
    assert np.mean([c.verdict != NO_DIFFERENCE for c in found]) <= AT_MOST


def closed_loop(
    generator: np.random.Generator, rounds: int, gain: float = 1.0
) -> tuple[Quotient, Quotient]:
    """Two servers at concurrency 8: a round is one block, whose wall time is shared out over its
    requests by how long each was under way."""
    work = generator.lognormal(0, 0.4, PROMPTS)
    seconds = np.zeros((2, rounds, PROMPTS))
    for round_index in range(rounds):
        for arm in generator.permutation(2):
            wall = np.exp(generator.normal(0, 0.03)) / (gain if arm == 0 else 1)
            spans = work * np.exp(generator.normal(0, 0.05, PROMPTS))
            seconds[arm, round_index] = wall * spans / spans.sum()
    tokens = np.full((rounds, PROMPTS), 127.0)
    return Quotient(tokens, seconds[0]), Quotient(tokens, seconds[1])


@pytest.mark.parametrize("rounds", [2, 3, 6])
def test_equal_servers_are_rarely_called_different_under_load(rounds: int) -> None:
    """The wall time that eight requests share is one measurement, not eight."""
    generator = np.random.default_rng(5)
    found = [
        compare("a", "b", DECODE.rate, *closed_loop(generator, rounds), PROMPTS)
        for _ in range(SIMULATIONS)
    ]
    assert np.mean([c.verdict != NO_DIFFERENCE for c in found]) <= AT_MOST
    as_prompts = [  # what it would be to take them for eight
        compare("a", "b", DECODE.rate, *closed_loop(generator, rounds)) for _ in range(SIMULATIONS)
    ]
    assert np.mean([c.verdict != NO_DIFFERENCE for c in as_prompts]) > 2 * AT_MOST
    faster = [
        compare("a", "b", DECODE.rate, *closed_loop(generator, 6, gain=1.1), PROMPTS)
        for _ in range(100)
    ]
    assert np.mean([c.verdict == "higher" for c in faster]) > 0.9


def test_one_turn_under_load_gives_no_verdict() -> None:
    generator = np.random.default_rng(6)
    found = [
        compare("a", "b", DECODE.rate, *closed_loop(generator, 1, 2.0), PROMPTS) for _ in range(20)
    ]
    assert {c.verdict for c in found} == {NO_DIFFERENCE}


def test_differences_are_found_and_their_size_is_right() -> None:
    generator = np.random.default_rng(3)
    longer = [compare("a", "b", ACCEPTANCE, *acceptance(generator, gain=0.08)) for _ in range(50)]
    assert np.mean([c.verdict == "higher" for c in longer]) > 0.9
    faster = [
        compare("a", "b", DECODE.rate, *speeds(generator, "drift", 1.06), BLOCK) for _ in range(50)
    ]
    assert np.mean([c.verdict == "higher" for c in faster]) > 0.9
    covered = [c.relative.low <= 0.06 <= c.relative.high for c in faster]
    assert np.mean(covered) >= 0.88


def test_what_slows_both_arms_cancels() -> None:
    generator = np.random.default_rng(4)
    first, second = speeds(generator, "steady")
    slow = generator.uniform(1, 2, first.under.shape)
    calm = compare("a", "b", DECODE.rate, first, second, BLOCK)
    both = compare(
        "a", "b", DECODE.rate,
        Quotient(first.over, first.under * slow), Quotient(second.over, second.under * slow), BLOCK,
    )  # fmt: skip
    assert both.relative.high - both.relative.low < 1.5 * (calm.relative.high - calm.relative.low)


def test_turns_of_one_conversation_are_one_prompt() -> None:
    """Twice the same data as second turns must not look like twice the evidence."""
    generator = np.random.default_rng(5)
    first, second = acceptance(generator, gain=0.03)
    once = compare("a", "b", ACCEPTANCE, first, second)
    more, less = (Quotient(np.tile(q.over, 2), np.tile(q.under, 2)) for q in (first, second))
    labels = [*range(PROMPTS), *range(PROMPTS)]
    again = compare("a", "b", ACCEPTANCE, more, less, 1, labels)
    assert again.difference.low == pytest.approx(once.difference.low)
    naive = compare("a", "b", ACCEPTANCE, more, less)
    assert naive.p_value < once.p_value


def test_the_same_counts_are_no_difference() -> None:
    first, _ = acceptance(np.random.default_rng(6))
    found = compare("lora", "base", ACCEPTANCE, first, first, BLOCK)
    assert (found.difference.low, found.difference.high, found.p_value) == (0.0, 0.0, 1.0)
    assert found.verdict == NO_DIFFERENCE


def test_one_prompt_gives_no_interval() -> None:
    found = compare("a", "b", DECODE.rate, quotient([[5]], [[1]]), quotient([[4]], [[1]]))
    assert found.verdict == NO_DIFFERENCE
    assert found.words.endswith("(too few prompts or blocks for an interval)")
    assert found.as_json()["relative"]["low"] is None


def test_one_block_gives_no_verdict_on_speed() -> None:
    """Each arm ran once: what the machine did meanwhile may be all of the difference."""
    fast, slow = quotient([[9, 9, 9, 9]], [[1, 1, 1, 1]]), quotient([[5, 5, 4, 5]], [[1, 1, 1, 1]])
    found = compare("a", "b", DECODE.rate, fast, slow, per_block=4)
    assert found.verdict == NO_DIFFERENCE
    assert np.isnan(found.relative.low)
    assert compare("a", "b", DECODE.rate, fast, slow, per_block=1).verdict == "higher"


def comparison(arm: str, against: str, metric: str, p_value: float, *ends: float) -> Comparison:
    figure = Figure(ends[0], ends[1], ends[2])
    return Comparison(arm, against, metric, figure, figure, p_value, p_value)


def test_words() -> None:
    said = [
        comparison("afa-lora", "lora", ACCEPTANCE, 0.01, 0.15, 0.05, 0.24).words,
        comparison("base", "full", ACCEPTANCE, 0.01, -0.2, -0.3, -0.1).words,
        comparison("lora", "base", ACCEPTANCE, 0.3, 0.02, -0.01, 0.05).words,
        comparison("lora", "none", DECODE.speedup, 0.0, 0.42, 0.38, 0.47).words,
        comparison("mine", "base", DECODE.rate, 0.01, -0.061, -0.09, -0.032).words,
    ]
    assert said == [
        "The AFA-LoRA draft accepts 0.15 tokens per step more than the LoRA draft (0.05 to 0.24)",
        "The base draft accepts 0.20 tokens per step fewer than the fully fine-tuned draft (0.10 "
        "to 0.30)",
        "No difference in acceptance length shown between the LoRA draft and the base draft (-0.01 "
        "to 0.05)",
        "The LoRA draft decodes 1.42 times as fast as no speculation (1.38 to 1.47)",
        "mine decodes 6.1% slower than the base draft (3.2% to 9.0%)",
    ]


def test_an_interval_near_nothing_tells_its_side() -> None:
    said = [
        comparison("afa-lora", "lora", ACCEPTANCE, 0.04, 0.15, 0.0012, 0.3).words,
        comparison("lora", "none", DECODE.speedup, 0.04, 0.1, 0.0043, 0.2).words,
        comparison("mine", "base", DECODE.rate, 0.04, 0.1, 0.00032, 0.2).words,
    ]
    assert [words.rpartition("(")[2] for words in said] == [
        "0.001 to 0.300)", "1.004 to 1.200)", "0.03% to 20.00%)",
    ]  # fmt: skip


def test_holm_asks_more_of_the_smaller_p_values() -> None:
    found = [
        comparison("a", "b", DECODE.rate, 0.04, 0.1, 0.01, 0.2),
        comparison("a", "c", DECODE.rate, 0.01, 0.1, 0.01, 0.2),
        comparison("b", "c", DECODE.rate, 0.03, 0.1, 0.01, 0.2),
        comparison("b", "c", ACCEPTANCE, 0.04, 0.1, 0.01, 0.2),
    ]
    corrected = correct(found)
    assert [c.p_holm for c in corrected] == pytest.approx([0.06, 0.03, 0.06, 0.04])
    assert [c.among for c in corrected] == [3, 3, 3, 1]
    assert [c.verdict for c in corrected] == [NO_DIFFERENCE, "higher", NO_DIFFERENCE, "higher"]
    assert corrected[0].words.endswith("as chance may give this among 3 comparisons")
    assert [replace(c, p_holm=c.p_value, among=1) for c in corrected] == found

"""Figures of a study from made-up counts: seeds and prompts, compared arms, and the gap."""

from __future__ import annotations

import numpy as np
import pytest

from afaspec.compare.config import ArmConfig
from afaspec.compare.figures import (
    Measured,
    comparable_pairs,
    difference,
    figures_of,
    gap_closed,
    pooled_difference,
)
from afaspec.compare.plan import Variant
from afaspec.compare.plots import along

PROMPTS, K = 60, 3


def made_up(
    label: str, chance: float, variant: Variant | None = None, seeds: int = 3, jitter: float = 0.0
) -> Measured:
    """Counts of a draft whose every token is accepted with about `chance`."""
    generator = np.random.default_rng([*label.encode()])
    results = []
    for _ in range(seeds):
        drafts = np.full(PROMPTS, 40)
        rate = chance + jitter * generator.standard_normal()
        kept = [drafts]
        for _ in range(K):
            kept.append(generator.binomial(kept[-1], rate))
        results.append({"drafts": drafts, "accepted": np.stack(kept[1:], axis=1)})
    return Measured.of(label, results, variant)


LORA, AFA, FULL = (Variant(name, rank, 200, None) for name, rank in
                   (("lora", 8), ("afa-lora", 8), ("full", None)))  # fmt: skip


def test_figures_hold_every_seed_and_agree_with_the_counts() -> None:
    measured = made_up("lora", 0.5, LORA)
    found = figures_of(measured)
    length = found["acceptance_length"]
    assert length["value"] == pytest.approx(1 + measured.accepted.sum() / measured.drafts.sum())
    assert length["low"] < length["value"] < length["high"]
    assert np.mean(found["by_seed"]) == pytest.approx(length["value"])
    assert length["value"] == pytest.approx(1 + K * found["acceptance_rate"]["value"])


def test_training_variance_widens_the_interval() -> None:
    def width(jitter: float) -> float:
        length = figures_of(made_up("lora", 0.5, LORA, jitter=jitter))["acceptance_length"]
        return float(length["high"] - length["low"])

    assert width(0.05) > 3 * width(0.0)


def test_the_gap_closed_is_measured_between_its_ends() -> None:
    low, high = made_up("lora", 0.3, LORA), made_up("full", 0.6, FULL)
    mid = made_up("afa-lora", 0.5, AFA)
    share = gap_closed(mid, low, high)
    assert share
    expected = (mid.length.value - low.length.value) / (high.length.value - low.length.value)
    assert share["value"] == pytest.approx(expected)
    assert share["low"] < share["value"] < share["high"]
    for end, value in ((low, 0.0), (high, 1.0)):
        found = gap_closed(end, low, high)
        assert found
        assert found["value"] == pytest.approx(value, abs=1e-12)
        assert found["high"] - found["low"] == pytest.approx(0.0, abs=1e-9)


def test_no_gap_no_share_of_it() -> None:
    same = made_up("lora", 0.5, LORA), made_up("full", 0.5, FULL)
    assert gap_closed(made_up("afa-lora", 0.5, AFA), *same) is None


def test_rivals_differ_in_the_arm_alone() -> None:
    arms = {name: ArmConfig(arm=name) for name in ("lora", "afa-lora", "full")}
    found = [
        made_up("lora r8", 0.5, LORA),
        made_up("lora r16", 0.5, Variant("lora", 16, 200, None)),
        made_up("afa-lora r8", 0.5, AFA),
        made_up("full", 0.5, FULL),
        made_up("full, long", 0.5, Variant("full", None, 800, None)),
    ]
    pairs = {(arm.label, against.label) for arm, against in comparable_pairs(found, arms)}
    assert pairs == {
        ("afa-lora r8", "lora r8"),
        ("full", "lora r8"),
        ("full", "lora r16"),
        ("full", "afa-lora r8"),
    }


def test_arms_are_held_only_against_those_they_name() -> None:
    arms = {
        "lora": ArmConfig(arm="lora"),
        "afa-lora": ArmConfig(arm="afa-lora", against=["lora"]),
        "full": ArmConfig(arm="full"),
    }
    found = [made_up("lora", 0.5, LORA), made_up("afa-lora", 0.5, AFA), made_up("full", 0.5, FULL)]
    pairs = {(arm.label, against.label) for arm, against in comparable_pairs(found, arms)}
    assert pairs == {("afa-lora", "lora"), ("full", "lora")}


def test_over_one_point_pooling_changes_nothing() -> None:
    pair = made_up("afa-lora", 0.55, AFA, jitter=0.02), made_up("lora", 0.5, LORA, jitter=0.02)
    pooled, alone = pooled_difference("afa-lora", "lora", [[pair]]), difference(*pair)
    for name in ("difference", "relative"):
        for end in ("value", "low", "high"):
            assert getattr(getattr(pooled, name), end) == pytest.approx(
                getattr(getattr(alone, name), end)
            )
    assert pooled.p_value == pytest.approx(alone.p_value)


def test_points_of_a_domain_share_their_chance_and_domains_do_not() -> None:
    pair = made_up("afa-lora", 0.55, AFA), made_up("lora", 0.5, LORA)

    def width(by_domain: list[list[tuple[Measured, Measured]]]) -> float:
        found = pooled_difference("afa-lora", "lora", by_domain).relative
        return float(np.log1p(found.high) - np.log1p(found.low))

    once = width([[pair]])
    assert width([[pair, pair]]) == pytest.approx(once)  # the same prompts and seeds twice
    assert width([[pair]] * 4) == pytest.approx(once / 2)


def test_pooled_is_the_mean_relative_difference_with_equal_weight_for_domains() -> None:
    pairs = [
        (made_up(f"afa {rate}", rate, AFA), made_up(f"lora {rate}", 0.5, LORA))
        for rate in (0.45, 0.55, 0.6)
    ]
    logs = [np.log(one.length.value / two.length.value) for one, two in pairs]
    found = pooled_difference("afa-lora", "lora", [pairs[:2], pairs[2:]])
    expected = np.expm1((logs[0] + logs[1]) / 4 + logs[2] / 2)
    assert found.relative.value == pytest.approx(expected)
    assert found.relative.low < expected < found.relative.high


def test_a_trained_arm_beats_an_untrained_base_of_one_row() -> None:
    base = made_up("base", 0.3, seeds=1)
    gain = difference(made_up("lora", 0.5, LORA), base)
    assert gain.verdict == "higher"
    assert gain.difference.low > 0


def test_a_plot_by_samples_shows_each_arm_at_its_own_rank() -> None:
    places = [("lora", 8), ("lora", 32), ("wide", 32), ("full", None)]
    arms = [
        {"arm": name, "rank": rank, "steps": 80, "samples": samples}
        for name, rank in places
        for samples in (16, 64)
    ]
    shown = {(arm["arm"], arm["rank"]) for arm in along(arms, "samples")}
    assert shown == {("lora", 8), ("wide", 32), ("full", None)}


def test_a_plot_by_rank_shows_arms_of_several_ranks_only() -> None:
    """Another arm's only rank says nothing of what rank does; full fine-tuning is a level line."""
    ranks = [("lora", 8), ("lora", 16), ("wide", 32), ("full", None)]
    arms = [{"arm": name, "rank": rank, "steps": 80, "samples": 240} for name, rank in ranks]
    shown = [(arm["arm"], arm["rank"]) for arm in along(arms, "rank")]
    assert shown == [("lora", 8), ("lora", 16), ("full", None)]
    assert [arm["arm"] for arm in along(arms[1:], "rank")] == ["full"]

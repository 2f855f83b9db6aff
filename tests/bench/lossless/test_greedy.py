"""First differences, and the rule that only measured noise makes a near-tie."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from bench.lossless.greedy import (
    ENOUGH,
    Difference,
    evenly,
    first_difference,
    gap_between,
    judge,
    measure_noise,
    with_texts,
)
from bench.report.figures import lossless_json
from bench.report.schema import unexplained
from bench.report.words import token_shown


def rows(*gaps: float) -> list[list[tuple[int, float]]]:
    """At each position token 1 leads token 2 by a gap."""
    return [[(1, -0.5), (2, -0.5 - gap)] for gap in gaps]


def judged(gap: float, token: int = 2) -> Difference:
    """A difference at the last position; the noise at the two others is 0.1 and 0.02."""
    found = {"arm": [Difference("p", 2, 1, token)]}
    result, noise = judge(found, {"p": rows(3.0, 2.0, gap)}, {"p": rows(3.1, 2.02, gap)})
    assert noise is not None
    assert noise.max == pytest.approx(0.1)
    return result["arm"][0]


def test_the_noise_is_that_of_other_prompts() -> None:
    """Where a prompt is judged, its own noise is not asked: a broken engine would excuse itself."""
    found = {"arm": [Difference("p", 1, 1, 2)]}
    decoded, prefilled = {"p": rows(3.0, 0.5, 1.0)}, {"p": rows(3.0, 2.5, 9.0)}
    many = {"q": rows(*[2.0] * ENOUGH)}, {"q": rows(*[2.1] * ENOUGH)}
    result, noise = judge(found, decoded | many[0], prefilled | many[1])
    assert noise is not None
    assert (noise.positions, noise.max) == (ENOUGH, pytest.approx(0.1))
    assert result["arm"][0].near_tie is False
    _, few = judge(found, decoded, prefilled)
    assert few is not None
    assert (few.positions, few.max) == (2, pytest.approx(8.0))  # the judged position is not in it


def test_a_quantile_does_not_grow_with_what_is_looked_at() -> None:
    """One wild position among ten thousand makes no gap of that size a near-tie."""
    pairs = [(rows(1.0)[0], rows(1.0 + 0.01 * (i % 10))[0]) for i in range(10_000)]
    noise = measure_noise([*pairs, (rows(1.0)[0], rows(6.0)[0])])
    assert noise is not None
    assert noise.max == pytest.approx(5.0)
    assert noise.limit == pytest.approx(0.09, abs=0.01)


def test_of_many_differences_some_are_examined() -> None:
    names = [f"p{i:03}" for i in range(100)]
    chosen = evenly(names, 32)
    assert len(set(chosen)) == 32
    assert (chosen[0], evenly(names[:5], 32)) == ("p000", names[:5])
    found = {"arm": [Difference("p", 0, 1, 2), Difference("q", 0, 1, 2)]}
    judged, _ = judge(found, {"p": rows(0.0, 1.0)}, {"p": rows(0.0, 1.0)})
    assert [one.near_tie is None for one in judged["arm"]] == [False, True]
    lossless = lossless_json(judged, "arm", 10)
    assert lossless is not None
    assert (lossless["matching"], lossless["examined"]) == (8, 1)
    assert unexplained(lossless) == 1 - lossless["near_ties"]
    assert unexplained({"prompts": 10, "matching": 7, "near_ties": 1}) == 2  # an older report


def test_first_difference() -> None:
    assert first_difference("p", [1, 2, 3], [1, 2, 3]) is None
    assert first_difference("p", [1, 2, 3], [1, 5, 6]) == Difference("p", 1, 2, 5)
    assert first_difference("p", [1, 2], [1, 2, 3]) == Difference("p", 2, None, 3)


def test_a_gap_within_the_noise_is_a_near_tie() -> None:
    found = judged(0.09)
    assert found.near_tie is True
    assert found.gap == pytest.approx(0.09)
    assert found.logprobs == pytest.approx({"none": -0.5, "arm": -0.59})


def test_a_gap_beyond_the_noise_is_not() -> None:
    assert judged(0.11).near_tie is False


def test_a_token_out_of_reach_is_not_a_near_tie() -> None:
    found = judged(0.0, token=400)
    assert found.near_tie is False
    assert found.gap is None


def test_prefill_stands_in_where_decoding_does_not_repeat() -> None:
    found = {"arm": [Difference("p", 2, 1, 2)]}
    result, _ = judge(found, {"p": rows(3.0, 2.0)}, {"p": rows(3.1, 2.02, 0.05)})
    assert result["arm"][0].gap is None
    assert result["arm"][0].gap_prefill == pytest.approx(0.05)
    assert result["arm"][0].near_tie is True


def test_noise_needs_pairs() -> None:
    assert measure_noise([]) is None
    assert gap_between([(1, -1.0)], 1, 2) is None


def test_tokens_are_shown_as_the_targets_text(tiny_target: Path) -> None:
    """The end of an output has no token, and so no text."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_target)
    token = tokenizer("def").input_ids[-1]
    (found,) = with_texts({"arm": [Difference("p", 2, token, None)]}, tiny_target)["arm"]
    assert (found.text_none, found.text_arm) == (tokenizer.decode([token]), None)
    assert found.text_none
    row = asdict(found)
    assert token_shown(row, "none") == f'"{found.text_none}"'
    assert token_shown(row, "arm") == "(the end)"
    assert token_shown({"token_none": 7, "token_arm": None}, "none") == "7"

"""First differences, and the rule that only measured noise makes a near-tie."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from bench.lossless.greedy import (
    Difference,
    first_difference,
    gap_between,
    judge,
    measure_noise,
    with_texts,
)
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

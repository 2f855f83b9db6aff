"""What is said of drafts that are too short and of targets that sample in a way of their own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from bench.records.arms import Arm
from bench.report.cautions import foreseen, past_positions
from bench.report.console import warnings
from bench.report.words import also, table_rows
from tests.bench.synthetic import report, report_of_everything
from tests.opened import no_draft_at, no_target_at

SHORT = Arm("base", no_draft_at(Path("draft")))  # of 64 positions


def test_a_draft_shorter_than_the_run_is_said_before_it() -> None:
    (said,) = foreseen(SHORT, None, 40, 25)
    assert "64 positions" in said
    assert "40 tokens" in said
    assert foreseen(SHORT, None, 40, 24) == []
    assert foreseen(Arm("none"), None, 4000, 2500) == []
    assert foreseen(Arm("ngram", "ngram"), None, 4000, 2500) == []
    assert foreseen(Arm("mine", "unknown"), None, 4000, 2500) == []


def test_tokens_past_the_positions_are_counted() -> None:
    found = past_positions(SHORT, [(60, 10), (70, 10), (50, 14), (10, 20)])
    assert found is not None
    assert (found.tokens, found.of, found.requests) == (6 + 10, 54, 2)
    assert past_positions(SHORT, [(50, 14)]) is None
    unlimited = replace(no_draft_at(Path("draft")), max_positions=None)
    assert past_positions(Arm("base", unlimited), [(60, 10)]) is None


def test_the_targets_own_sampling_is_named(tmp_path: Path) -> None:
    target = no_target_at(tmp_path)
    assert foreseen(Arm("none"), target, 1, 1) == []
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"top_p": 0.8, "repetition_penalty": 1.3, "top_k": None, "eos_token_id": 0})
    )
    (said,) = foreseen(Arm("none"), target, 1, 1)
    assert "sets top_p 0.8, repetition_penalty 1.3" in said
    (tmp_path / "generation_config.json").write_text("{")
    assert foreseen(Arm("none"), target, 1, 1) == []


def test_both_are_in_the_report_and_on_the_console() -> None:
    past = past_positions(SHORT, [(60, 10)])
    made = report(past={"base": past}, warnings={"none": ["Both"], "base": ["Both"]})
    assert made.arm("base")["past_positions"]["tokens"] == 6
    said = warnings(made)
    assert said[0] == "Both"
    assert "6 of 10 answer tokens" in said[1]
    assert len(said) == 2


def test_a_distribution_that_cannot_be_told_is_not_called_the_same() -> None:
    made = report_of_everything()
    for arm in made.arms:
        if arm["distribution"]:
            arm["distribution"]["passed"] = None
    assert "cannot be told" in also(made.arms)
    assert table_rows(made.arms)[-1][-1].text == "not known"

"""The arms of a run from the command line's words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from afaspec.config import load_config
from bench.records.arms import choose_arms, with_own_k
from bench.records.config import BenchConfig
from drafts.errors import UserError
from drafts.target.info import read_target
from tests.tiny.runs import write_fresh


def test_order_and_labels(tiny_draft: Path) -> None:
    arms = choose_arms([f"base={tiny_draft}", f"mine={tiny_draft}"], without_folder=["ngram"])
    assert [arm.name for arm in arms] == ["none", "ngram", "base", "mine"]
    assert [arm.label for arm in arms][2:] == ["Base draft", "mine"]
    assert [arm.name for arm in choose_arms([str(tiny_draft)], none=False)] == [tiny_draft.name]


@pytest.mark.parametrize(
    ("drafts", "said"),
    [
        (["base=/nowhere/at/all"], "no such folder"),
        (["={tmp}"], "cannot read the draft"),
        (["base="], "cannot read the draft"),
        (["none={tmp}"], "belongs to the arm"),
        (["a={tmp}", "a={tmp}"], "two drafts have the name"),
    ],
)
def test_bad_drafts(tiny_draft: Path, drafts: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        choose_arms([text.replace("{tmp}", str(tiny_draft)) for text in drafts])


def test_block_drafters_draft_their_block_unless_told_otherwise(
    tiny_target: Path, tiny_draft: Path, tmp_path: Path
) -> None:
    block = write_fresh("dflash", tmp_path / "dflash", tiny_target, layer_ids=(1, 2, 3), max_k=5)
    arms = choose_arms([f"a={block}", f"b={block},k=2", f"c={tiny_draft}", "d=ngram"], none=False)
    assert [with_own_k(arm).k(3) for arm in arms] == [5, 2, 3, 3]


def test_nothing_to_measure() -> None:
    with pytest.raises(UserError, match="nothing to measure"):
        choose_arms([], none=False)


@pytest.fixture
def bench_config(tiny_target: Path, tmp_path: Path) -> Callable[..., BenchConfig]:
    def load(**settings: object) -> BenchConfig:
        file = tmp_path / "bench.yaml"
        file.write_text(json.dumps({"prompts": "p", **settings}))  # JSON is YAML
        return load_config(BenchConfig, file, {"target": read_target(tiny_target), "arms": ()})

    return load


@pytest.mark.parametrize("setting", ["k", "max_tokens", "rounds", "concurrency"])
def test_settings_below_one(setting: str, bench_config: Callable[..., BenchConfig]) -> None:
    with pytest.raises(UserError, match=f"{setting} is 0"):
        bench_config(**{setting: 0})


def test_other_bad_settings(bench_config: Callable[..., BenchConfig]) -> None:
    with pytest.raises(UserError, match="temperature"):
        bench_config(temperature=-1)
    with pytest.raises(UserError, match="split is 'test'"):
        bench_config(split="test")

"""`tune`: the choice counts in that it was a choice, and vLLM takes what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bench.sweep.best_k import PAYS, Speedup, best_k, ranges
from bench.sweep.choose import choose
from tests.command import run_command


def measured(values: dict[int, float], seed: int, waves: int = 16, noise: float = 0.08) -> list:
    """Speedups of some k as so many waves would show them, true values given."""
    random = np.random.default_rng(seed)
    found = []
    for k, value in values.items():
        logs = np.log(value) + noise * random.standard_normal((1, waves))
        influence = (logs - logs.mean()) / waves
        found.append(Speedup(k, float(np.exp(logs.mean())), influence))
    return found


def test_a_choice_among_many_seldom_pays_in_vain() -> None:
    """Eight k that gain nothing: were only the best's own interval looked at, 18% would 'pay'."""
    chosen = [choose(1, measured(dict.fromkeys(range(1, 9), 1.0), seed)) for seed in range(400)]
    assert sum(one.k > 0 for one in chosen) <= 0.05 * 400
    best = [
        max(measured(dict.fromkeys(range(1, 9), 1.0), s), key=lambda o: o.value) for s in range(400)
    ]
    assert sum(one.figure.low > 1 for one in best) > 0.1 * 400


@pytest.mark.parametrize("count", [2, 8])
def test_the_best_of_several_pays_as_seldom_in_vain_as_one(count: int) -> None:
    """Nominal 2.5%: an interval's lower end above one."""
    equal = dict.fromkeys(range(1, count + 1), 1.0)
    found = [best_k(1, measured(equal, seed)) for seed in range(400)]
    assert np.mean([one.pays == PAYS for one in found]) <= 0.025 + 0.016
    wrongly_alone = [len(one.tied) + 1 < count and 1 not in (one.k, *one.tied) for one in found]
    assert np.mean(wrongly_alone) <= 0.05 + 0.022


@pytest.mark.parametrize("seed", range(5))
def test_what_gains_is_found_and_what_costs_is_left(seed: int) -> None:
    gains = choose(4, measured({1: 1.2, 2: 1.5, 3: 1.1}, seed))
    assert gains.k == 2
    assert gains.figure.low > 1
    assert gains.words.startswith("at 4 at once: k = 2, 1.")
    costs = choose(4, measured({1: 0.8, 2: 0.7}, seed))
    assert costs.k == 0
    assert "no speculation, which costs time (k = 1, 0." in costs.words


def test_one_wave_says_nothing_for_sure() -> None:
    found = choose(1, measured({3: 2.0}, 0, waves=1))
    assert found.k == 0
    assert "too few waves for an interval" in found.words


def test_loads_between_two_go_with_the_higher() -> None:
    assert ranges({1: 3, 4: 3, 16: 1, 64: 0}) == [[1, 4, 3], [5, 16, 1], [17, 64, 0]]


def test_a_real_tune_ends_with_an_answer(
    tiny_target: Path, tiny_draft: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    rows = ({"prompt": f"def f{i}(a, b): return"} for i in range(8))
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    options = [
        "tune", tiny_target, "--draft", tiny_draft, "--prompts", prompts, "--k", "1,2",
        "--concurrency", "1,2", "--max-tokens", "8", "--rounds", "2", "--enforce-eager",
        "--dtype", "float32", "--out", out,
    ]  # fmt: skip
    code, told = run_command(*options)
    assert code == 0, told
    assert "report" in told.lower()
    answer = out / "speculative_config.json"
    assert answer.exists() or "without a draft" in told
    if answer.exists():
        assert json.loads(answer.read_text())["method"] == "eagle3"
    code, told = run_command(*options, "--temperature", "0,1")
    assert code == 2
    assert "tunes for one of --temperature at a time" in told

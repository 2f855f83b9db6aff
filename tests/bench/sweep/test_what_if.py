"""What-if answers from a sweep whose truth is known, and questions that it must not answer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bench.sweep.cells import CellResult, mean_occupancy, occupancy
from bench.sweep.step_time import fit
from bench.sweep.steps import points, source
from bench.sweep.what_if import Question, answer, check
from drafts.errors import UserError
from tests.bench.sweep.made_cells import BETTER, TOKENS, Truth, make_cell, make_sweep
from tests.command import run_command


def test_settings_that_were_not_fitted_are_predicted() -> None:
    """Another k, a load between, and a better draft of which only the acceptance is known."""
    fitted = [make_cell(k, load) for k in (1, 3) for load in (1, 4)]
    model = fit(*points(fitted))
    held_out = [make_cell(2, 1), make_cell(2, 4), make_cell(3, 2), make_cell(1, 2)]
    errors = [check(model, cell, source(fitted, cell.k)).error for cell in held_out]
    better = [make_cell(k, load, arm="better", chances=BETTER) for k in (3, 2) for load in (1, 4)]
    errors += [check(model, cell, better[0]).error for cell in better[1:]]
    assert np.abs(errors).max() < 0.05, errors


def test_the_interval_holds_what_would_have_been_measured() -> None:
    """Of settings that were not fitted, many times; with noise that each cell has as a whole."""
    held, of = 0, 0
    for seed in range(12):
        generator = np.random.default_rng(seed)

        def cell(k: int, load: int, generator: np.random.Generator = generator) -> CellResult:
            slow = Truth(fixed=7e-3 * generator.normal(1, 0.03), noise=0.0)
            return make_cell(k, load, slow, seed=int(generator.integers(1000)))

        cells = [cell(k, load) for k in (1, 3, 5) for load in (1, 4)]
        asked = answer(cells, Question(ks=(2, 4), concurrencies=(1, 4)))
        for found in asked.predictions:
            assert found.low is not None
            assert found.high is not None
            assert found.low < found.speedup < found.high
            truth = answer(
                [make_cell(k, load, Truth(noise=0.0)) for k in (1, 3, 5) for load in (1, 4)],
                Question(ks=(found.k,), concurrencies=(found.concurrency,)),
            ).predictions[0]
            held += found.low < truth.speedup < found.high
            of += 1
    assert held / of > 0.85  # 95%, less what acceptance itself scatters between the draws
    few = answer([make_cell(k, 1) for k in (1, 3)], Question())
    assert {p.low for p in few.predictions} == {None}


def test_the_answer_for_a_measured_setting_is_what_was_measured() -> None:
    cells = [make_cell(k, load) for k in (1, 2, 3) for load in (1, 4)]
    found = answer(cells, Question())
    alone = [p for p in found.predictions if p.concurrency == 1]
    assert [p.k for p in alone] == [1, 2, 3]
    for p in alone:
        assert p.measured is not None
        assert p.speedup == pytest.approx(p.measured, rel=0.02)
        assert not p.beyond


def test_a_bigger_target_and_a_better_draft_gain_what_arithmetic_says() -> None:
    truth = Truth(noise=0)
    cells = [make_cell(k, load, truth) for k in (1, 3) for load in (1, 4)]
    question = Question(ks=(3,), concurrencies=(1,), target_scale=4, length=3.0, length_at_k=3)
    (found,) = answer(cells, question).predictions
    target = truth.fixed + 4 * truth.per_token
    draft = truth.draft_fixed + 2 * truth.per_pass + 3 * truth.per_drafted_token
    plain = truth.fixed + truth.per_token
    assert found.step_ms == pytest.approx(1000 * (4 * target + draft), rel=1e-3)
    assert found.break_even == pytest.approx((4 * target + draft) / (4 * plain), rel=1e-3)
    assert found.acceptance_length == pytest.approx(3.0)
    whole = 3.0 * 4 * plain / (4 * target + draft)  # if no last step were cut off
    assert whole * 0.97 < found.speedup < whole
    spared = Question(ks=(3,), concurrencies=(1,), target_scale=4, overhead=truth.fixed)
    (found,) = answer(cells, spared).predictions
    assert found.none_ms == pytest.approx(1000 * (truth.fixed + 4 * truth.per_token), rel=1e-3)


def test_a_slower_turn_of_the_machine_does_not_reach_the_model() -> None:
    """The cell that was measured while everything took twice as long is set right by its `none`."""
    cells = [make_cell(k, 1, Truth(noise=0)) for k in (1, 3)]
    _, (none, once, thrice) = points(cells)
    for series in (cells[1].none, cells[1].series):
        assert series is not None
        series.seconds = [[2 * second for second in row] for row in series.seconds]
    _, (slow_none, slow_once, slow_thrice) = points(cells)
    assert slow_thrice / slow_none == pytest.approx(thrice / none)
    assert slow_once / slow_none == pytest.approx(once / none)


def test_how_many_requests_of_a_wave_run() -> None:
    assert occupancy([5, 5, 5]) == pytest.approx(3)
    assert occupancy([2, 4]) == pytest.approx((2 * 2 * 2 + 2 * 1) / 6)
    assert mean_occupancy(np.array([[2, 4, 3, 3]]), 2) == pytest.approx((10 / 6 * 6 + 2 * 6) / 12)
    assert mean_occupancy(np.array([[2, 4, 3, 3]]), 1) == pytest.approx(1)


def test_the_command_prints_and_writes(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path / "sweep", (1, 3), (1, 4))
    code, told = run_command("what-if", str(sweep), "--k", "1..4", "--concurrency", "1,2")
    assert code == 0
    assert "predicted from the others" in told
    assert "beyond what was measured" in told
    content = json.loads((sweep / "what_if.json").read_text())
    assert content["schema"] == "afaspec-what-if/1"
    assert [(p["concurrency"], p["k"]) for p in content["predictions"]] == [
        (load, k) for load in (1, 2) for k in (1, 2, 3, 4)
    ]
    best = {b["concurrency"]: b["k"] for b in content["best"]}
    one = [p for p in content["predictions"] if p["concurrency"] == 1]
    assert best[1] == max(one, key=lambda p: p["speedup"])["k"]
    assert content["fit"]["target_ms"]["fixed"] == pytest.approx(7.0, rel=0.1)


@pytest.mark.parametrize(
    ("loads", "options", "said"),
    [
        ((1,), ["--concurrency", "4"], "do not tell the cost"),
        ((1,), ["--target-scale", "4"], "do not tell the cost"),
        ((1, 4), ["--k", "0"], "--k has 0"),
        ((1, 4), ["--k", "two"], "--k has 'two'"),
        ((1, 4), ["--k", ""], "--k has ''"),
        ((1, 4), ["--target-scale", "0"], "scale is 0"),
        ((1, 4), ["--overhead-ms", "-1"], "overhead"),
        ((1, 4), ["--acceptance-length", "9", "--at-k", "3"], "not possible at k = 3"),
        ((1, 4), ["--acceptance-length", "2", "--acceptance", "0.5"], "given twice"),
        ((1, 4), ["--acceptance", "0.5,0.9"], "no acceptances by position"),
        ((1, 4), ["--arm", "other"], "no draft 'other'"),
        ((1, 4), ["--temperature", "1"], "no cells with --temperature 1"),
    ],
)
def test_a_question_that_has_no_answer_is_refused(
    tmp_path: Path, loads: tuple[int, ...], options: list[str], said: str
) -> None:
    sweep = make_sweep(tmp_path / "sweep", (1, 3), loads)
    code, told = run_command("what-if", str(sweep), *options)
    assert code == 2
    assert said in told
    assert not (sweep / "what_if.json").exists()


def test_a_draft_is_not_asked_for_more_tokens_than_it_has(tmp_path: Path) -> None:
    medusa = {"sha256": "", "family": "medusa", "shape": "m", "one_pass": False, "max_k": 3}
    sweep = make_sweep(tmp_path / "sweep", (1, 3), (1,), draft=medusa)
    code, told = run_command("what-if", str(sweep), "--k", "2,4")
    assert code == 2
    assert "at most 3 tokens a step, not 4" in told


def test_cells_of_several_lengths_must_be_chosen(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path / "sweep", (1, 3), (1,))
    path = sweep / "cells" / "base-k1-c1.json"
    content = json.loads(path.read_text())
    (sweep / "cells" / "longer.json").write_text(json.dumps({**content, "max_tokens": 200}))
    code, told = run_command("what-if", str(sweep), "--k", "1")
    assert code == 2
    assert f"one of {TOKENS + 1}, 200" in told
    assert run_command("what-if", str(sweep), "--k", "1", "--max-tokens", "200")[0] == 0


def test_a_folder_without_cells_is_refused(tmp_path: Path) -> None:
    code, told = run_command("what-if", str(tmp_path))
    assert code == 2
    assert "no measured cells" in told
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / "x.json").write_text('{"schema": "other"}')
    code, told = run_command("what-if", str(tmp_path))
    assert code == 2
    assert "is no cell of a sweep" in told


def test_a_length_beyond_the_draft_names_the_option() -> None:
    with pytest.raises(UserError, match="--at-k"):
        answer([make_cell(1, 1)], Question(ks=(1,), length=2.5))

"""Sweeps: the grid, what it concludes, a real one that is killed and goes on, and refusals."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from afaspec.checkpoints.config import InitConfig
from afaspec.config import load_config
from bench.records.arms import Arm
from bench.records.config import Condition
from bench.records.speeds import DECODE, REQUEST
from bench.stats.resample import Figure
from bench.sweep.best_k import COSTS, PAYS, UNCLEAR, Best, Speedup, best_k, load_advice, schedule
from bench.sweep.cells import write_cell
from bench.sweep.grid import Cell, SweepConfig, groups_of
from bench.sweep.report import build_sweep, write_sweep
from bench.sweep.run import run_sweep
from bench.sweep.settings import parse_axis
from drafts.errors import UserError
from drafts.target.info import read_target
from tests.bench.sweep.made_cells import Truth, make_cell
from tests.command import run_command
from tests.opened import arm, init_checkpoint, no_draft_at, no_target_at
from tests.tiny.templates import CLOCK

ROOT = Path(__file__).parents[3]
TARGET = no_target_at(Path("target"))
BASE, NGRAM = Arm("base", no_draft_at(Path("drafts/base"))), Arm("ngram", "ngram")


def grid(**changes: object) -> SweepConfig:
    given = {"target": TARGET, "prompts": "prompts.jsonl", "arms": (BASE, NGRAM)}
    return load_config(SweepConfig, None, given | changes)


def test_the_grid_has_every_cell_that_can_differ() -> None:
    cells = grid(
        ks=(1, 3),
        temperatures=(0.0, 0.8),
        concurrencies=(1, 4),
        max_tokens=(64,),
        sample_methods=("greedy", "probabilistic"),
    ).cells
    base = [cell for cell in cells if cell.drafting.arm is BASE]
    # greedy drafts at both temperatures, probabilistic ones only where it matters
    assert len(base) == 2 * (2 * 2 + 2)
    assert {c.condition.temperature for c in base if c.drafting.sample_method != "greedy"} == {0.8}
    ngram = [cell for cell in cells if cell.drafting.arm is NGRAM]
    assert len(ngram) == 2 * 2 * 2
    assert {cell.drafting.sample_method for cell in ngram} == {None}
    assert len({cell.name for cell in cells}) == len(cells)
    assert "/" not in replace_arm(cells[0], "a/b").name
    assert replace_arm(cells[0], "a/b").name != replace_arm(cells[0], "a_b").name


def replace_arm(cell: Cell, name: str) -> Cell:
    return replace(cell, drafting=replace(cell.drafting, arm=Arm(name)))


def test_engines_that_share_a_measurement_of_none_come_in_groups() -> None:
    cells = grid(ks=(1, 2, 3), concurrencies=(1, 4)).cells
    groups = groups_of(cells, together=4)
    assert [len({cell.drafting for cell in group}) for group in groups] == [4, 2]
    assert sorted(c.name for g in groups for c in g) == sorted(c.name for c in cells)
    assert {c.condition for c in groups[1]} == {Condition(0.0, 1, 128), Condition(0.0, 4, 128)}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"arms": ()}, "needs a draft"),
        ({"ks": ()}, "--k is empty"),
        ({"ks": (0, 1)}, "--k has 0"),
        ({"ks": (2, 2)}, "twice"),
        ({"temperatures": (-0.1,)}, "--temperature has -0.1"),
        ({"temperatures": (float("nan"),)}, "is nan"),
        ({"max_tokens": (1,)}, "--max-tokens has 1"),
        ({"sample_methods": ("random",)}, "'random'"),
        ({"sample_methods": ()}, "empty"),
        ({"rounds": 0}, "rounds is 0"),
        ({"together": 0}, "together is 0"),
    ],
)
def test_a_grid_that_makes_no_sense_is_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        grid(**changes)


def test_axes_are_lists_and_ranges() -> None:
    assert parse_axis("1, 2,5", "--k") == (1, 2, 5)
    assert parse_axis("1..3,8", "--k") == (1, 2, 3, 8)
    assert parse_axis("0,0.8", "--temperature", float) == (0.0, 0.8)
    for wrong in ("", "1,,2", "1.5", "a", "1..b"):
        with pytest.raises(UserError, match="--k has"):
            parse_axis(wrong, "--k")


def speedup(
    k: int, value: float, spread: float, seed: int, common: np.ndarray | float = 0.0
) -> Speedup:
    influence = np.random.default_rng(seed).normal(0, spread, (3, 12)) + common
    return Speedup(k, value, (influence - influence.mean()) / influence.size)


def test_the_best_k_where_it_can_be_told() -> None:
    """All waves vary alike at every k, so that the pairing tells apart what intervals do not."""
    common = np.random.default_rng(9).normal(0, 0.3, (1, 12))
    candidates = [speedup(k, v, 0.01, k, common) for k, v in ((1, 1.3), (3, 1.5), (5, 1.4))]
    assert candidates[2].figure.high > candidates[1].figure.value  # the intervals overlap
    best = best_k(4, candidates)
    assert (best.k, best.tied, best.pays) == (3, (), PAYS)
    assert best.words.startswith("k=3 is best at concurrency 4 (1.50×")
    assert best.words.endswith("next comes k=5, 1.40×")


def test_k_that_cannot_be_told_apart_are_all_named() -> None:
    candidates = [speedup(k, v, 0.3, k) for k, v in ((2, 1.41), (3, 1.43))]
    candidates.append(speedup(8, 0.5, 0.3, 8))
    best = best_k(1, candidates)
    assert (best.k, best.tied) == (3, (2,))
    assert best.words == "k=2 and k=3 cannot be told apart at concurrency 1 (1.41× and 1.43×)"


def test_a_load_is_off_only_where_every_k_costs_time() -> None:
    assert best_k(8, [speedup(k, 0.8, 0.01, k) for k in (1, 3)]).pays == COSTS
    assert best_k(8, [speedup(1, 0.8, 0.01, 1), speedup(3, 0.9, 2.0, 3)]).pays == UNCLEAR


def advice(*kinds: str) -> tuple[str, list[list[int]]]:
    figure = Figure(1.0, 0.9, 1.1)
    bests = [Best(2**i, 3 - i, figure, (), kind, "") for i, kind in enumerate(kinds)]
    return load_advice(bests), schedule(bests)


def test_above_which_load_speculation_should_be_off() -> None:
    text, entries = advice(PAYS, UNCLEAR, COSTS)
    assert text == (
        "Speculation pays at concurrency 1, is not shown to pay at concurrency 2, costs time at "
        "concurrency 4. It should be off above concurrency 2."
    )
    assert entries == [[1, 1, 3], [2, 2, 2], [3, 4, 0]]
    assert "No load was measured at which it should be off" in advice(PAYS, PAYS)[0]
    assert "off at every load measured" in advice(COSTS, COSTS)[0]
    assert "off" not in advice(COSTS, PAYS)[0]
    assert advice(COSTS, COSTS)[1] == [[1, 2, 0]]


def test_the_result_of_a_sweep_whose_truth_is_known(tmp_path: Path) -> None:
    """Drafting gets so costly with every request that it stops paying at 4."""
    truth = Truth(per_drafted_token=1e-3)
    results = [make_cell(k, load, truth) for k in (1, 3, 5) for load in (1, 2)]
    results += [make_cell(k, 4, truth) for k in (1, 3)]
    refused = make_cell(5, 4, truth)
    refused.none = refused.series = None
    refused.refused = "drafts at most 4 tokens a step, not 5"
    sweep = build_sweep([*results, refused], {"rounds": 3, "prompts": 16, "dtype": "bfloat16",
                                             "time": "now"})  # fmt: skip
    (finding,) = sweep.findings
    assert [load["concurrency"] for load in finding["loads"]] == [1, 2, 4]
    assert [load["pays"] for load in finding["loads"]] == [PAYS, PAYS, COSTS]
    assert finding["num_speculative_tokens_per_batch_size"][-1] == [3, 4, 0]
    for result, cell in zip(results, sweep.cells, strict=False):
        steps = sum(map(sum, result.series.drafts))  # type: ignore[union-attr]
        accepted = np.sum(result.series.accepted)  # type: ignore[union-attr]
        assert cell["acceptance_length"]["value"] == pytest.approx(1 + accepted / steps)
        both = cell[REQUEST.rate]["value"] / cell["none_request_tokens_per_second"]["value"]
        assert cell[REQUEST.speedup]["value"] == pytest.approx(both)
        assert (
            cell[REQUEST.speedup]["low"]
            < cell[REQUEST.speedup]["value"]
            < cell[REQUEST.speedup]["high"]
        )
        if cell["concurrency"] == 1:
            assert cell[DECODE.rate] == cell[REQUEST.rate]
            assert cell["running"] == 1
    page = write_sweep(sweep, tmp_path).read_text(encoding="utf-8")
    assert finding["advice"] in page
    assert "drafts at most 4 tokens" in page
    assert "http" not in page.replace("http://www.w3.org", "")
    with (tmp_path / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(results) + 1
    assert float(rows[0][REQUEST.speedup]) == pytest.approx(
        sweep.cells[0][REQUEST.speedup]["value"]
    )
    assert rows[-1][REQUEST.speedup] == ""
    assert json.loads((tmp_path / "sweep.json").read_text())["schema"] == "afaspec-sweep/2"


def test_a_draft_that_never_proposed_has_a_speed_and_no_acceptance(tmp_path: Path) -> None:
    """So it is with n-gram where nothing repeats."""
    silent = make_cell(2, 4, chances=(0.0, 0.0))
    assert silent.series is not None
    silent.series.drafts = silent.series.drafted = [[0] * 16] * 3
    sweep = build_sweep([silent], {"rounds": 3, "prompts": 16, "dtype": "float32", "time": "now"})
    (cell,) = sweep.cells
    assert cell["acceptance_length"]["value"] is None
    assert cell[REQUEST.speedup]["value"] < 1
    assert "–" in write_sweep(sweep, tmp_path).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    texts = [f"def f{i}(a, b): return" for i in range(8)]
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return path


def test_a_killed_sweep_goes_on_where_it_was(
    tiny_target: Path, tiny_draft: Path, prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = ["sweep", str(tiny_target), "--prompts", str(prompts), "--draft", f"b={tiny_draft}"]
    options += ["--k", "2", "--concurrency", "1,2", "--max-tokens", "8,12", "--enforce-eager"]
    options += ["--ignore-eos", "--rounds", "1", "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(
        [sys.executable, "-m", "afaspec", *options],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT, env=environment,
    )  # fmt: skip
    deadline = time.monotonic() + 480
    while not (done := list(out.glob("cells/*.json"))) and time.monotonic() < deadline:
        time.sleep(0.02)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert 1 <= len(done) < 4
    assert not (out / "sweep.json").exists()
    before = {path: path.stat().st_mtime_ns for path in out.glob("cells/*.json")}

    assert run_command(*options)[0] == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    sweep = json.loads((out / "sweep.json").read_text())
    assert len(sweep["cells"]) == 4
    assert all(cell[REQUEST.speedup]["value"] > 0 for cell in sweep["cells"])
    for path in out.glob("cells/*.json"):
        cell = json.loads(path.read_text())
        for name in ("none", "series"):
            assert cell[name]["tokens"] == [[cell["max_tokens"] - 1] * 8]
            assert len(cell[name]["wave_seconds"][0]) == 8 // cell["concurrency"]
        steps = np.array(cell["series"]["drafts"])
        kept = np.array(cell["series"]["accepted"]).sum(axis=2)
        assert (steps + kept >= cell["max_tokens"] - 1).all()

    code, told = run_command(*options, "--rounds", "3")
    assert code == 2
    assert "another sweep: rounds 1 there, 3 now" in told


def test_a_k_beyond_the_draft_is_a_cell_with_a_reason(tiny_target: Path, tmp_path: Path) -> None:
    """No engine starts where there is nothing else to measure."""
    init_checkpoint(
        InitConfig(family="medusa", target=tiny_target, out=tmp_path / "medusa", heads=2),
        lambda text: None,
    )
    heads = arm("heads", tmp_path / "medusa")
    config = grid(ks=(3,), concurrencies=(1,), target=read_target(tiny_target), arms=(heads,))
    (cell,) = run_sweep(config, tmp_path / "out", prompts=[[1, 2, 3]] * 4)
    assert cell.refused == "drafts at most 2 tokens a step, not 3"
    assert not (tmp_path / "out" / "logs").exists()


def test_too_few_prompts_for_the_load_start_nothing(
    tiny_target: Path, tiny_draft: Path, tmp_path: Path
) -> None:
    base = arm("base", tiny_draft)
    config = grid(concurrencies=(1, 4), target=read_target(tiny_target), arms=(base,))
    with pytest.raises(UserError, match="15 prompts make 3 waves of 4 requests"):
        run_sweep(config, tmp_path / "out", prompts=[[1, 2, 3]] * 15)
    assert not (tmp_path / "out").exists()


def test_another_draft_of_the_same_name_is_refused(
    tiny_target: Path, tiny_draft: Path, tmp_path: Path
) -> None:
    base = arm("base", tiny_draft)
    config = grid(ks=(1,), concurrencies=(1,), target=read_target(tiny_target), arms=(base,))
    (cell,) = config.cells
    path = tmp_path / "cells" / f"{cell.name}.json"
    write_cell(path, make_cell(1, 1))  # its draft has another hash
    with pytest.raises(UserError, match="another draft of the name 'base'"):
        run_sweep(config, tmp_path, prompts=[[1, 2, 3]] * 4)


def test_a_sweep_keeps_the_day_it_was_begun(
    tiny_target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a template with a clock; another day that is given is refused by its name."""
    target = shutil.copytree(tiny_target, tmp_path / "target")
    (target / "chat_template.jinja").write_text(CLOCK)
    rows = [{"messages": [{"role": "user", "content": f"Say {i}."}]} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = InitConfig(family="medusa", target=target, out=tmp_path / "medusa", heads=2)
    init_checkpoint(options, lambda text: None)
    config = grid(
        ks=(3,),  # more than the heads: no engine starts
        concurrencies=(1,),
        target=read_target(target),
        arms=(arm("heads", tmp_path / "medusa"),),
        prompts=str(tmp_path / "rows.jsonl"),
    )
    out = tmp_path / "out"
    monkeypatch.setattr("bench.prompts.load.today", lambda: "2026-01-31")
    run_sweep(config, out)
    (out / "cells").mkdir(exist_ok=True)
    (out / "cells" / "of-another-grid.json").write_text("{}")
    monkeypatch.setattr("bench.prompts.load.today", lambda: "2026-02-01")
    run_sweep(config, out)
    assert json.loads((out / "settings.json").read_text())["chat_date"] == "2026-01-31"
    with pytest.raises(UserError, match="chat_date 2026-01-31 there, 2026-02-01 now"):
        run_sweep(config.model_copy(update={"chat_date": "2026-02-01"}), out)

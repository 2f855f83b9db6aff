"""Which tasks a study needs: order, sharing, growth, and what a changed setting touches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from afaspec.compare.config import CompareConfig, quick
from afaspec.compare.data import Facts
from afaspec.compare.ledger import Ledger
from afaspec.compare.plan import Plan, Task, plan_tasks, variants
from afaspec.compare.study import read_study
from afaspec.config import load_config

STUDIES = Path(__file__).parents[3] / "docs" / "study"
BEST = {"lora": 3e-3, "afa-lora": 1e-2, "full": 5e-4}
SIDES = {side: {"sha256": side, "prompts": 100} for side in ("train", "eval")}


def study(**changes: Any) -> CompareConfig:
    values: dict[str, Any] = {
        "target": "target",
        "draft": "draft",
        "domains": {"cpp": {"prompts": "cpp.jsonl"}, "math": {"prompts": "math.jsonl"}},
        "arms": {name: {"arm": name} for name in BEST},
        "ranks": [4, 8],
        "seeds": [0, 1],
    }
    return CompareConfig(**(values | changes))


def facts(config: CompareConfig) -> Facts:
    return Facts("target", "t", "draft", "d", dict.fromkeys(config.domains, SIDES))


def finish(config: CompareConfig, done: dict[str, Any]) -> Plan:
    """Do every task with made-up results, in which each arm has its best rate; the last plan."""
    while pending := (plan := plan_tasks(config, facts(config), done)).pending(done):
        done[pending[0].key] = result(config, pending[0])
    return plan


def result(config: CompareConfig, task: Task) -> Any:
    if task.kind != "run":
        return {}
    assert task.variant
    method = config.arms[task.variant.arm].arm
    return {"validation_acceptance_length": 2.5 if task.rate == BEST[method] else 2.0}


def by_kind(plan: Plan) -> dict[str, int]:
    return {
        kind: sum(task.kind == kind for task in plan.tasks)
        for kind in dict.fromkeys(task.kind for task in plan.tasks)
    }


def test_full_fine_tuning_comes_once_and_ranks_multiply_the_rest() -> None:
    labels = [variant.label(study()) for variant in variants(study())]
    assert labels == ["lora r4", "lora r8", "afa-lora r4", "afa-lora r8", "full"]


def test_a_try_on_the_tuning_seed_is_the_final_run_of_that_seed() -> None:
    done: dict[str, Any] = {}
    plan = finish(study(), done)
    # afa-lora is best at its grid's edge: one rate more. 5 variants x 2 domains, 2 seeds each.
    tries = 2 * (3 * 3 + 2 * 4)
    assert by_kind(plan) == {"data": 2, "base": 2, "run": tries + 10, "eval": 20}
    assert not plan.later
    assert {v.arm: c.rate for (_, v), c in plan.choices.items()} == BEST


def test_later_cells_are_counted_before_their_rates_are_known() -> None:
    config, done = study(), {}
    first = plan_tasks(config, facts(config), done)
    known = len(first.tasks) + len(first.later)
    assert len(finish(config, done).tasks) == known + 4  # the four extended grids


def test_short_tries_are_runs_of_their_own() -> None:
    done: dict[str, Any] = {}
    plan = finish(study(tuning={"steps": 50, "extensions": 0}), done)
    assert by_kind(plan)["run"] == 5 * 2 * 3 + 20


@pytest.mark.parametrize(
    ("changes", "new"),
    [
        ({"seeds": [0, 1, 2]}, {"run": 10, "eval": 10}),
        ({"ranks": [4, 8, 16]}, {"run": 2 * (3 + 1 + 4 + 1), "eval": 8}),
        ({"keep": "all"}, {}),
        ({"out": Path("elsewhere")}, {}),
    ],
)
def test_a_grown_study_needs_just_what_is_new(changes: dict[str, Any], new: dict[str, int]) -> None:
    done: dict[str, Any] = {}
    finish(study(), done)
    before = set(done)
    plan = finish(study(**changes), done)
    fresh = [task.kind for task in plan.tasks if task.key not in before]
    assert {kind: fresh.count(kind) for kind in set(fresh)} == new


@pytest.mark.parametrize(
    "changes", [{"train": {"batch_size": 4}}, {"k": 2}, {"tuning": {"validation": 0.3}}]
)
def test_a_changed_setting_never_meets_old_results(changes: dict[str, Any]) -> None:
    done: dict[str, Any] = {}
    finish(study(), done)
    plan = plan_tasks(study(**changes), facts(study()), done)
    assert not [c for c in plan.tasks if c.kind in ("run", "eval") and c.key in done]


def test_other_prompts_make_other_cells() -> None:
    config, done = study(), {}
    finish(config, done)
    other = facts(config)
    other.domains["cpp"] = {**SIDES, "eval": {"sha256": "other", "prompts": 100}}
    plan = plan_tasks(config, other, done)
    assert {task.domain for task in plan.pending(done)} == {"cpp"}


def test_results_of_an_older_default_are_forgotten(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    made = Task("run", "cpp", {"settings": {}}, "x", settings={"activation": "relu"})
    ledger.add(made, {"done": True}, 1.0)
    grown = Task("run", "cpp", {"settings": {}}, "x", settings={"activation": "relu", "new": 0})
    changed = Task("run", "cpp", {"settings": {}}, "x", settings={"activation": "silu"})
    assert made.key == grown.key == changed.key
    assert not Ledger(tmp_path).drop_stale([made, grown])
    again = Ledger(tmp_path)
    assert again.drop_stale([changed])
    assert changed.key not in again


def test_quick_is_smaller_and_elsewhere() -> None:
    small = quick(study())
    assert (small.ranks, small.steps, small.seeds) == ([4], [40], [0, 1])
    assert small.out.name == "compare-quick"
    assert small.domains["cpp"].train_limit == 64


@pytest.mark.parametrize("name", ["main", "ranks", "budget", "samples", "served"])
def test_a_stored_study_of_other_sides_is_not_gone_on_with(name: str, tmp_path: Path) -> None:
    """They were made before prompts were divided by where they begin: none of them is mixed in."""
    study = read_study(STUDIES / f"{name}.json.gz")
    ledger = Ledger(tmp_path)
    ledger.add_records(study["cells"])
    config = load_config(CompareConfig, STUDIES / f"{name}.yaml", {})
    plan = plan_tasks(config, Facts(**study["facts"]), ledger)
    assert study["cells"]
    assert plan.pending(ledger) == plan.tasks

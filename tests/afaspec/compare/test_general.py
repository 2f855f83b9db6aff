"""General prompts beside a study's domains: replayed, measured, and in every table."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from afaspec.checkpoints.merge import find_result, load_merged
from afaspec.compare.config import CompareConfig, quick
from afaspec.compare.data import Facts
from afaspec.compare.execute import as_counts
from afaspec.compare.plan import plan_tasks
from afaspec.compare.run import report_only
from afaspec.compare.tables import columns_of, domain_rows, headline
from afaspec.store.read import FeatureStore
from bench.stats.offline import offline_acceptance
from drafts.registry import read_draft
from drafts.target.info import read_target
from tests.opened import compare_arms as compare
from tests.opened import load_draft


@pytest.fixture(scope="module")
def given(
    tmp_path_factory: pytest.TempPathFactory, tiny_target: Path, tiny_draft: Path
) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("general")
    sets = {}
    for name, word in (("code", "def"), ("general", "class")):
        rows = (f'{{"prompt": "{word} f{i}(x, y): return x[{i}]"}}\n' for i in range(36))
        (folder / f"{name}.jsonl").write_text("".join(rows))
        sets[name] = {"prompts": str(folder / f"{name}.jsonl"), "eval_fraction": 0.3}
        sets[name]["max_new_tokens"] = 12
    return {
        "target": str(tiny_target),
        "draft": str(tiny_draft),
        "out": str(folder / "study"),
        "k": 2,
        "domains": {"code": sets["code"]},
        "general": sets["general"],
        "arms": {
            "alone": {"arm": "lora", "learning_rate": 0.03},
            "replayed": {"arm": "lora", "learning_rate": 0.03, "mix": 0.4},
        },
        "train": {"compiled": False, "batch_size": 5, "precision": "fp32"},
        "steps": 6,
        "seeds": [0],
    }


@pytest.fixture(scope="module")
def finished(given: dict[str, Any]) -> dict[str, Any]:
    return compare(CompareConfig(**given))


def test_every_arm_is_measured_on_general_prompts(
    finished: dict[str, Any], given: dict[str, Any]
) -> None:
    out = Path(given["out"])
    assert finished["complete"]
    assert [*finished["domains"]] == ["code"]  # no arm is trained for general
    kinds = [cell["kind"] for cell in finished["cells"]]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "data": 2, "base": 2, "run": 2, "eval": 2, "kept": 2,
    }  # fmt: skip
    (folder,) = (out / "stores").glob("general-eval-*")
    store, draft = FeatureStore.open(folder), read_draft(Path(given["draft"]))
    target = read_target(Path(given["target"]))
    kept = {c["inputs"]["run"]: c["result"] for c in finished["cells"] if c["kind"] == "kept"}
    assert len(kept) == 2
    for run, counted in kept.items():
        module = load_merged(draft, find_result(out / "runs" / run)[0], target)
        assert counted == as_counts(offline_acceptance(module, store, given["k"]))
    base = offline_acceptance(load_draft(draft.folder, target.folder), store, given["k"])
    results = finished["domains"]["code"]
    before = results["general"]["acceptance_length"]["value"]
    assert before == pytest.approx(base.acceptance_length)
    for arm in results["arms"]:
        share, length = arm["general"]["kept"], arm["general"]["acceptance_length"]["value"]
        assert share["value"] == pytest.approx(length / before)
        assert share["low"] <= share["value"] <= share["high"]


def test_the_arm_with_mix_alone_replays(finished: dict[str, Any], given: dict[str, Any]) -> None:
    mixed = {}
    for cell in finished["cells"]:
        if cell["kind"] == "run":
            run = Path(given["out"]) / "runs" / cell["key"]
            mixed[cell["name"].split()[1]] = json.loads((run / "config.json").read_text())["mix"]
    assert mixed["alone,"] is None
    (text,) = mixed["replayed,"]
    assert "/general-train-" in text
    assert text.endswith("=2/5")


def test_tables_page_and_csv_show_it(finished: dict[str, Any], given: dict[str, Any]) -> None:
    out, results = Path(given["out"]), finished["domains"]["code"]
    assert columns_of(results)[-2:] == ("General prompts", "Kept")
    rows = domain_rows(results)
    assert {len(row) for row in rows} == {len(columns_of(results))}
    assert [row[-1].text.endswith("%") for row in rows] == [False, True, True]
    assert "On general prompts it kept" in headline(finished)
    assert "General prompts" in (out / "study.html").read_text()
    assert (out / "code_general.png").stat().st_size > 10_000
    with (out / "study.csv").open() as file:
        lines = list(csv.DictReader(file))
    for line, arm in zip(lines[1:], results["arms"], strict=True):
        assert float(line["general_acceptance_length"]) == arm["general"]["by_seed"][0]
        assert float(line["general_kept"]) == arm["general"]["kept"]["value"]


def test_a_study_without_general_prompts_shows_none(
    finished: dict[str, Any], given: dict[str, Any]
) -> None:
    """Of the same cells: what was measured on the domain is no other task than before."""
    arms = {"alone": given["arms"]["alone"]}
    alone = report_only(CompareConfig(**(given | {"general": None, "arms": arms})))
    assert alone["complete"]
    results = alone["domains"]["code"]
    assert results["general"] is None
    assert "General prompts" not in columns_of(results)
    assert results["arms"][0]["by_seed"] == finished["domains"]["code"]["arms"][0]["by_seed"]


def test_another_share_makes_new_tasks_of_its_arm_alone(given: dict[str, Any]) -> None:
    def keys(share: float) -> dict[str, str]:
        arms = given["arms"] | {"replayed": given["arms"]["replayed"] | {"mix": share}}
        config = CompareConfig(**(given | {"arms": arms}))
        plan = plan_tasks(config, Facts.read(config.out), {})
        return {task.name: task.key for task in plan.tasks}

    one, two = keys(0.4), keys(0.2)
    changed = {name for name in one if one[name] != two[name]}
    assert changed == {name for name in one if "replayed" in name}
    assert len(changed) == 3


def test_a_quick_study_keeps_its_general_prompts(given: dict[str, Any]) -> None:
    small = quick(CompareConfig(**given))
    assert small.general
    assert small.general.train_limit == 64
    assert [*small.domains] == ["code"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"general": None}, "the arm replayed has mix, but the study has no general"),
        ({"general": {"prompts": "x.jsonl", "eval_fraction": 0.2}}, "give both the same"),
        ({"domains": {"general": {"prompts": "x.jsonl"}}}, "'general' cannot be a name here"),
        ({"arms": {"replayed": {"arm": "lora", "mix": 1.0}}}, "less than 1"),
    ],
)
def test_settings_that_say_nothing_are_refused(
    given: dict[str, Any], changes: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ValidationError, match=expected):
        CompareConfig(**(given | changes))

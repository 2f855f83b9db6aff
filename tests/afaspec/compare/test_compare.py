"""A tiny study end to end: resumed after kills, grown, reported again; its sides are disjoint."""

from __future__ import annotations

import csv
import gzip
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from afaspec.checkpoints.merge import find_result, load_merged
from afaspec.compare.config import CompareConfig, part
from afaspec.compare.data import Facts, capture_config, divide_store
from afaspec.compare.execute import as_counts
from afaspec.compare.run import import_study, report_only
from afaspec.store.read import FeatureStore
from bench.stats.offline import offline_acceptance
from drafts.errors import UserError
from drafts.registry import read_draft
from drafts.target.info import read_target
from tests.nursery import Nursery, is_alive
from tests.opened import capture, forecast, load_draft, merge
from tests.opened import compare_arms as compare

KILLS = 4
TIMES = ("seconds", "train_seconds", "spent_seconds", "made", "out")


def settings(folder: Path, target: Path, draft: Path) -> dict[str, Any]:
    """The smallest study that has everything: two arms, two seeds, a rate to choose."""
    prompts = folder / "prompts.jsonl"
    rows = [f'{{"prompt": "def f{i}(x, y): return x[{i}]"}}\n' for i in range(36)]
    rows += ['{"prompt": "def f0(x, y): return x[0]"}\n'] * 2
    prompts.write_text("".join(rows))
    return {
        "target": str(target),
        "draft": str(draft),
        "out": str(folder / "study"),
        "k": 2,
        "domains": {"code": {"prompts": str(prompts), "eval_fraction": 0.3, "max_new_tokens": 12}},
        "arms": {
            "lora": {"arm": "lora", "learning_rate": 0.03},
            "full": {"arm": "full", "learning_rates": [0.01, 0.02]},
        },
        "train": {"compiled": False, "batch_size": 2, "lm_head": True, "checkpoint_every": 3},
        "steps": 12,
        "seeds": [0, 1],
        "tuning": {"extensions": 0},
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compare")


@pytest.fixture(scope="module")
def given(place: Path, tiny_target: Path, tiny_draft: Path) -> dict[str, Any]:
    return settings(place, tiny_target, tiny_draft)


@pytest.fixture(scope="module")
def finished(given: dict[str, Any]) -> dict[str, Any]:
    return compare(CompareConfig(**given))


def timeless(value: Any) -> Any:
    """A study without what may differ between two runs of it: times, and where it lies."""
    if isinstance(value, dict):
        return {key: timeless(part) for key, part in value.items() if key not in TIMES}
    return [timeless(part) for part in value] if isinstance(value, list) else value


def test_the_study_says_all(finished: dict[str, Any], given: dict[str, Any]) -> None:
    out = Path(given["out"])
    assert finished["complete"]
    results = finished["domains"]["code"]
    assert [arm["label"] for arm in results["arms"]] == ["lora", "full"]
    for arm in results["arms"]:
        length = arm["acceptance_length"]
        assert length["low"] <= length["value"] <= length["high"]
        assert len(arm["by_seed"]) == 2
    assert results["arms"][0]["trainable_parameters"] < results["arms"][1]["trainable_parameters"]
    assert [t["rate"] for t in results["arms"][1]["tries"]] == [0.01, 0.02]
    assert [(c["arm"], c["against"]) for c in results["comparisons"]] == [("full", "lora")]
    assert finished["pooled"] == []  # there is one point
    kinds = [cell["kind"] for cell in finished["cells"]]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {
        "data": 1, "base": 1, "run": 2 + 1 + 2, "eval": 4,
    }  # fmt: skip
    with (out / "study.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["arm"], row["seed"]) for row in rows] == [
        ("base", ""), ("lora", "0"), ("lora", "1"), ("full", "0"), ("full", "1"),
    ]  # fmt: skip
    page = (out / "study.html").read_text()
    assert "Full fine-tuning" in page
    assert "<svg" in page
    assert "http" not in page.replace("http://www.w3.org", "")
    assert (out / "code_arms.png").stat().st_size > 10_000


def test_runs_differ_in_arm_rate_and_seed_alone(finished: dict[str, Any]) -> None:
    runs = [cell["settings"] for cell in finished["cells"] if cell["kind"] == "run"]
    common = set.intersection(*(set(run) for run in runs))  # full fine-tuning has no adapter
    assert set.union(*(set(run) for run in runs)) - common == {"rank", "init"}
    differing = {key for key in common if any(run[key] != runs[0][key] for run in runs)}
    assert differing == {"arm", "learning_rate", "seed"}


def test_the_three_sides_share_no_prompt(finished: dict[str, Any], given: dict[str, Any]) -> None:
    out, config = Path(given["out"]), CompareConfig(**given)
    sides = next(cell["result"] for cell in finished["cells"] if cell["kind"] == "data")
    stores = {
        side: FeatureStore.open(next((out / "stores").glob(f"code-{side}-*")))
        for side in ("train", "eval")
    }

    def prompts(store: FeatureStore, chosen: list[int]) -> set[tuple[int, ...]]:
        return {tuple(s.input_ids[~s.loss_mask].tolist()) for s in map(store.__getitem__, chosen)}

    train = prompts(stores["train"], sides["train"])
    validation = prompts(stores["train"], sides["validation"])
    measured = prompts(stores["eval"], list(range(len(stores["eval"]))))
    assert train
    assert validation
    assert not train & validation
    assert not (train | validation) & measured
    # The division is by content: it is the same for a prompt wherever it stands.
    again = divide_store(stores["train"], stores["eval"], config.tuning.validation)
    assert again.train.tolist() == sides["train"]
    assert again.held_out.tolist() == sides["validation"]


def test_a_prompt_of_two_sides_is_dropped_from_training(
    finished: dict[str, Any], given: dict[str, Any], tmp_path: Path
) -> None:
    config = CompareConfig(**given)
    store = FeatureStore.open(next((Path(given["out"]) / "stores").glob("code-train-*")))
    both = capture(capture_config(config, "code", "train", tmp_path / "again"))
    with pytest.raises(UserError, match="too much alike"):  # eval is the train side itself
        divide_store(store, both, config.tuning.validation)


def test_killed_studies_end_with_the_same_results(
    finished: dict[str, Any], given: dict[str, Any], tmp_path: Path
) -> None:
    out, file = tmp_path / "study", tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(given, sort_keys=False))
    nursery, rng, kills, seen = Nursery(), random.Random(0), 0, set()
    try:
        while kills < KILLS:
            before = len(list(out.glob("cells/*.json")))
            process = nursery.start("compare", file, "--out", out)
            while is_alive(process) and len(list(out.glob("cells/*.json"))) < before + 1:
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.15))
            if is_alive(process):
                os.kill(process, signal.SIGKILL)
            assert nursery.wait() == -signal.SIGKILL
            kills += 1
            seen.add(len(list(out.glob("cells/*.json"))))
        nursery.start("compare", file, "--out", out)
        assert nursery.wait() == 0
    finally:
        nursery.close()
    assert len(seen) > 1  # the kills came at different places
    assert timeless(json.loads((out / "study.json").read_text())) == timeless(finished)


def test_the_report_is_made_again_from_the_cells_alone(
    finished: dict[str, Any], given: dict[str, Any], tmp_path: Path
) -> None:
    out = Path(given["out"])
    copy = tmp_path / "copy"
    shutil.copytree(out / "cells", copy / "cells")
    shutil.copy(out / "facts.json", copy)
    again = report_only(CompareConfig(**(given | {"out": copy})))
    assert timeless(again) == timeless(finished)
    assert (copy / "study.html").read_text() == (out / "study.html").read_text()


def test_parts_that_were_made_apart_are_put_together(
    finished: dict[str, Any], given: dict[str, Any], tmp_path: Path
) -> None:
    config = CompareConfig(**(given | {"out": tmp_path / "whole"}))
    other = {**finished["facts"], "domains": {"other": finished["facts"]["domains"]["code"]}}
    foreign = {**other, "draft_sha256": "0" * 64}
    parts = {"code": finished, "other": finished | {"facts": other, "cells": []}}
    for name, content in {**parts, "foreign": finished | {"facts": foreign}}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    for name in parts:
        import_study(config, tmp_path / f"{name}.json")
    assert Facts.read(config.out).domains.keys() == {"code", "other"}
    assert timeless(report_only(config))["domains"] == timeless(finished)["domains"]
    with pytest.raises(UserError, match="another draft"):
        import_study(config, tmp_path / "foreign.json")


def test_a_stored_study_goes_on_elsewhere(
    finished: dict[str, Any], given: dict[str, Any], tmp_path: Path
) -> None:
    """From study.json alone: what is there is not done again, a new seed is, on its own store."""
    stored, out = tmp_path / "study.json.gz", tmp_path / "elsewhere"
    stored.write_bytes(gzip.compress((Path(given["out"]) / "study.json").read_bytes()))
    config = CompareConfig(**(given | {"out": out, "seeds": [0, 1, 2]}))
    import_study(config, stored)
    with pytest.raises(UserError, match="no finished arm"):
        report_only(config)  # no arm has its third seed
    grown = compare(config)
    assert len(list((out / "cells").iterdir())) == len(finished["cells"]) + 4
    for arm, old in zip(
        grown["domains"]["code"]["arms"], finished["domains"]["code"]["arms"], strict=True
    ):
        assert arm["by_seed"][:2] == old["by_seed"]


def test_a_study_is_not_taken_on_by_a_target_that_answers_otherwise(
    finished: dict[str, Any], given: dict[str, Any], tmp_path: Path
) -> None:
    other = json.loads((Path(given["out"]) / "study.json").read_text())
    next(c for c in other["cells"] if c["kind"] == "data")["result"]["train_tokens"] += 1
    (tmp_path / "study.json").write_text(json.dumps(other))
    config = CompareConfig(**(given | {"out": tmp_path / "out", "seeds": [0, 1, 2]}))
    import_study(config, tmp_path / "study.json")
    with pytest.raises(UserError, match="answers code otherwise here"):
        compare(config)


@pytest.mark.parametrize("content", [b"", b"{}", b'{"schema": "afaspec-bench/2"}', b"[]"])
def test_what_is_no_study_is_refused(content: bytes, given: dict[str, Any], tmp_path: Path) -> None:
    for name, raw in (("a.json", content), ("a.json.gz", content)):
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(UserError, match="is not a study"):
            import_study(CompareConfig(**given), tmp_path / name)


def test_a_part_of_a_study_is_the_same_study(
    finished: dict[str, Any], given: dict[str, Any], tmp_path: Path
) -> None:
    config = part(CompareConfig(**given), ["lora"])
    assert (list(config.arms), list(config.domains)) == (["lora"], ["code"])
    shutil.copytree(given["out"], tmp_path / "study")
    alone = compare(config.model_copy(update={"out": tmp_path / "study"}))
    assert len(alone["cells"]) < len(finished["cells"])
    found, whole = alone["domains"]["code"]["arms"], finished["domains"]["code"]["arms"][:1]
    assert [arm["by_seed"] for arm in found] == [arm["by_seed"] for arm in whole]
    with pytest.raises(UserError, match="'lorra' is no arm and no domain"):
        part(config, ["lorra"])


def test_two_ranks_are_judged_one_by_one_and_together(
    given: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "ranks"
    shutil.copytree(given["out"], out)
    study = compare(CompareConfig(**(given | {"out": out, "ranks": [4, 8]})))
    labels = [(c["arm"], c["against"]) for c in study["domains"]["code"]["comparisons"]]
    assert labels == [("full", "lora r4"), ("full", "lora r8")]
    (pooled,) = study["pooled"]
    assert (pooled["arm"], pooled["against"], pooled["points"]) == ("full", "lora", {"code": 2})
    singles = [c["relative"]["value"] for c in study["domains"]["code"]["comparisons"]]
    assert min(singles) <= pooled["relative"]["value"] <= max(singles)
    assert "2 code" in (out / "study.html").read_text()


def test_a_moved_study_goes_on_in_the_middle_of_a_training(
    finished: dict[str, Any], given: dict[str, Any], tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(given["out"], moved)
    half_done = next((moved / "runs").iterdir())
    (moved / "cells" / f"run-{half_done.name}.json").unlink()
    again = compare(CompareConfig(**(given | {"out": moved})))
    assert timeless(again["domains"]) == timeless(finished["domains"])


def test_a_grown_study_runs_new_cells_only(
    finished: dict[str, Any], given: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "grown"
    shutil.copytree(given["out"], out)
    before = {path: path.stat().st_mtime_ns for path in (out / "cells").iterdir()}
    config = CompareConfig(**(given | {"out": out, "seeds": [0, 1, 2]}))
    plan = forecast(config)
    assert len(plan.plan.pending(plan.ledger)) == 4
    assert plan.seconds_left is not None
    assert set(plan.costs) == {"lora r8", "full"}
    grown = compare(config)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(list((out / "cells").iterdir())) == len(before) + 4
    for arm, old in zip(
        grown["domains"]["code"]["arms"], finished["domains"]["code"]["arms"], strict=True
    ):
        assert arm["by_seed"][:2] == old["by_seed"]


def test_what_is_measured_is_what_merge_writes(
    finished: dict[str, Any], given: dict[str, Any], tmp_path: Path
) -> None:
    out, base, target = Path(given["out"]), Path(given["draft"]), Path(given["target"])
    store = FeatureStore.open(next((out / "stores").glob("code-eval-*")))
    cells = {cell["key"]: cell for cell in finished["cells"]}
    finals = [cell for cell in cells.values() if cell["kind"] == "eval"]
    for i, final in enumerate(finals):
        run = out / "runs" / final["inputs"]["run"]
        merge(run, base, tmp_path / str(i), target)
        written = load_draft(tmp_path / str(i), target).eval()
        served = load_merged(read_draft(base), find_result(run)[0], read_target(target))
        for name, value in written.state_dict().items():
            assert value.equal(served.state_dict()[name]), name
        assert as_counts(offline_acceptance(written, store, 2)) == final["result"]
    # Runs that lost the tuning are gone, and so are all checkpoints.
    kept = {path.name for path in (out / "runs").iterdir()}
    assert kept == {final["inputs"]["run"] for final in finals}
    assert not list(out.glob("runs/*/checkpoint"))


def test_sides_are_shuffled_so_that_the_first_are_a_sample(finished: dict[str, Any]) -> None:
    sides = next(cell["result"] for cell in finished["cells"] if cell["kind"] == "data")
    assert sides["train"] != sorted(sides["train"])

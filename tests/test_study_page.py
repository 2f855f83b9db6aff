"""docs/study.md and docs/log.md say what the stored studies say, and their files ask for it."""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from afaspec.compare.config import CompareConfig
from afaspec.config import load_config

STUDY = Path(__file__).parents[1] / "docs" / "study"
ASKED = ("domains", "arms", "train", "ranks", "steps", "samples", "seeds", "tuning", "k")


@pytest.fixture(scope="module")
def writer() -> Any:
    spec = importlib.util.spec_from_file_location("study_writer", STUDY / "write.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["PAGE", "LOG"])
def test_every_number_of_a_table_is_the_stored_one(writer: Any, page: str) -> None:
    text = getattr(writer, page).read_text(encoding="utf-8")
    assert writer.filled(text, writer.stored()) == text


@pytest.mark.parametrize(("part", "rows"), [("cpp", "arms"), ("cpp/comparisons", "comparisons")])
def test_rows_of_deleted_arms_are_in_the_log_and_all_others_in_the_study(
    writer: Any, part: str, rows: str
) -> None:
    ablation = writer.stored()["ablation"]
    assert {arm["arm"] for arm in ablation["domains"]["cpp"]["arms"]} > writer.DELETED
    study, log = (set(writer.content(ablation, p).splitlines()) for p in (part, f"{part}/deleted"))
    for found, deleted in ((study - log, False), (log - study, True)):
        for row in found:
            arms = {cell.strip() for cell in row.split("|")[1:3]}
            assert bool(arms & writer.DELETED) == deleted
    assert len(study ^ log) == len(ablation["domains"]["cpp"][rows])


def test_no_table_is_kept_for_a_number_changed_by_hand(writer: Any) -> None:
    text = writer.PAGE.read_text(encoding="utf-8")
    mark = writer.MARK.search(text)
    changed = text[: mark.end() - 20] + "9" + text[mark.end() - 20 :]
    assert writer.filled(changed, writer.stored()) == text


@pytest.mark.parametrize("name", ["main", "ranks", "budget", "samples"])
def test_a_stored_study_is_whole_and_its_file_asks_for_it(writer: Any, name: str) -> None:
    study = writer.stored()[name]
    assert study["complete"]
    config = load_config(CompareConfig, STUDY / f"{name}.yaml", {})
    asked = config.model_dump(mode="json", exclude_unset=True)
    assert {*asked} >= {"domains", "arms", "train", "k"}
    for key in {*asked} & {*ASKED}:  # defaults apart, which may have changed since it was made
        assert_among(asked[key], study["settings"][key])


def assert_among(asked: Any, stored: Any) -> None:
    if not isinstance(asked, dict):
        assert stored == asked
        return
    for key, value in asked.items():
        assert_among(value, stored[key])


def test_a_stored_study_names_no_folder_of_a_machine(
    writer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "HERE", tmp_path)
    target = writer.resolve_model("embedded")
    writer.store("mine", f'{{"target": "{target}", "out": "{Path.cwd()}/runs/study"}}')
    kept = gzip.decompress((tmp_path / "mine.json.gz").read_bytes()).decode()
    assert kept == '{"target": "embedded", "out": "runs/study"}'

"""Acceptance on general prompts beside the domain's: what was kept, and a gate on it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from bench.report.schema import Report
from bench.runs.keep import kept_on, kept_within, lost, render_kept
from bench.runs.saved import SavedRun
from drafts.errors import UserError
from drafts.files import write_json
from tests.bench.synthetic import K, arm_run, report
from tests.command import run_command

DOMAIN = {"none": 0.0, "ngram": 0.3, "base": 0.5, "afa-lora": 0.75, "lora": 0.7}
GENERAL = {"none": 0.0, "base": 0.6, "afa-lora": 0.3, "lora": 0.6}  # one forgot, one did not
OTHER_PROMPTS = {"prompts_sha256": "2" * 64}


def run(name: str, **changes: Any) -> SavedRun:
    return SavedRun(name, Path(name) / "report.json", report(**changes))


@pytest.fixture(scope="module")
def domain() -> SavedRun:
    return run("domain", chances=DOMAIN)


@pytest.fixture(scope="module")
def general() -> SavedRun:
    return run("general", chances=GENERAL, set_otherwise=OTHER_PROMPTS)


def test_what_was_kept_is_a_share_of_the_base_drafts(domain: SavedRun, general: SavedRun) -> None:
    found = kept_on(domain, general)
    assert [one.label for one in found] == ["Base draft", "AFA-LoRA", "LoRA"]
    assert found[0].share is None
    for one, name in zip(found, ("base", "afa-lora", "lora"), strict=True):
        assert one.domain == domain.report.arm(name)["acceptance_length"]
        assert one.general == general.report.arm(name)["acceptance_length"]
        if one.share:
            assert one.share["value"] == pytest.approx(
                one.general["value"] / found[0].general["value"]
            )
            assert one.share["low"] <= one.share["value"] <= one.share["high"]
    assert render_kept(found, domain, "general").row_count == 3
    (failure,) = lost(found, "general", 0.98)
    assert failure.startswith("AFA-LoRA: keeps ")
    assert failure.endswith("less than 98.0%")
    assert lost(found, "general", 0.0) == []


def test_the_order_of_the_arms_does_not_matter(domain: SavedRun, general: SavedRun) -> None:
    last = ["none", "lora", "afa-lora", "base"]
    turned = run("general", chances={n: GENERAL[n] for n in last}, set_otherwise=OTHER_PROMPTS)
    one, two = kept_on(domain, general), kept_on(domain, turned)
    for first, second in zip(one[1:], two[1:], strict=True):
        assert first.share
        assert second.share
        assert first.lower == second.lower
        assert second.share == pytest.approx(first.share, rel=1e-6)


def test_a_loss_within_its_interval_is_let_pass(domain: SavedRun, general: SavedRun) -> None:
    found = kept_on(domain, general)
    share = found[1].share
    assert share
    assert lost(found, "general", share["high"] + 1e-6)
    assert not lost(found, "general", share["high"] - 1e-6)


def _another_draft(made: Report) -> None:
    made.arm("lora")["provenance"]["draft"] = {"sha256": "5" * 64}


def _no_interval(made: Report) -> None:
    for entry in made.comparisons:
        entry["relative"] |= {"low": None, "high": None}


@pytest.mark.parametrize(
    ("changes", "spoil", "expected"),
    [
        ({"set_otherwise": {**OTHER_PROMPTS, "k": 4}}, None, "k is 4, in domain"),
        ({"set_otherwise": {**OTHER_PROMPTS, "temperature": 1.0}}, None, "temperature is 1.0"),
        ({}, None, "was measured on the prompts of domain"),
        ({"chances": {"base": 0.6, "lora": 0.6}}, None, "has no draft 'afa-lora'"),
        ({"chances": {"afa-lora": 0.6, "lora": 0.6}}, None, "has no draft 'base'"),
        ({"set_otherwise": OTHER_PROMPTS}, _another_draft, "measured another draft as 'lora'"),
        ({"set_otherwise": OTHER_PROMPTS}, _no_interval, "has no interval for"),
    ],
)
def test_runs_that_say_nothing_of_each_other_are_refused(
    domain: SavedRun, changes: dict[str, Any], spoil: Any, expected: str
) -> None:
    given = {"chances": GENERAL, **changes}
    if "chances" in changes:
        given["set_otherwise"] = OTHER_PROMPTS
    other = run("general", **given)
    if spoil:
        spoil(other.report)
    with pytest.raises(UserError, match=expected):
        kept_on(domain, other)


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: pytest.TempPathFactory, domain: SavedRun, general: SavedRun
) -> Mapping[str, Path]:
    root = tmp_path_factory.mktemp("kept")
    for saved in (domain, general):
        (root / saved.name).mkdir()
        write_json(root / saved.name / "measurements.json", saved.report.measurements)
        write_json(root / saved.name / "report.json", saved.report.as_json())
    return {saved.name: root / saved.name for saved in (domain, general)}


def test_keep_on_the_command_line(folders: Mapping[str, Path]) -> None:
    baseline = ("--gate", folders["domain"])
    asked = (folders["domain"], *baseline, "--keep")
    code, output = run_command("report", *asked, f"{folders['general']}=0.98")
    assert code == 3
    assert "AFA-LoRA: keeps" in output
    assert "Gate passed" in output
    code, output = run_command("report", *asked, f"{folders['general']}=0")
    assert code == 0
    assert "keeps" not in output
    for wrong in ("general", "general=", "general=98", "general=nan", "=0.9"):
        code, output = run_command("report", *asked, wrong)
        assert code == 2
        assert "expected RUN=SHARE" in output
    code, output = run_command("report", folders["domain"], folders["general"], "--keep", "x=0")
    assert code == 2
    assert "one run" in output


def within(chances: Mapping[str, float]) -> SavedRun:
    """A run with figures of general prompts of its own, of drafts accepted with these chances."""
    found = {name: arm_run(name, 3, chance).acceptance(K) for name, chance in chances.items()}
    return run("demo", chances=DOMAIN, general=found)


def test_a_run_may_have_figures_of_general_prompts_itself() -> None:
    drafts = {name: chance for name, chance in GENERAL.items() if name != "none"}
    demo = within(drafts)
    found = kept_within(demo)
    assert [one.label for one in found] == ["Base draft", "AFA-LoRA", "LoRA"]
    for one, name in zip(found, ("base", "afa-lora", "lora"), strict=True):
        assert one.domain == demo.report.arm(name)["acceptance_length"]
        assert one.general == demo.report.arm(name)["general"]["acceptance_length"]
        assert one.share == demo.report.arm(name)["general"]["kept"]
    (failure,) = lost(found, "general prompts", 0.98)
    assert failure.startswith("AFA-LoRA: keeps ")
    share = found[1].share
    assert share
    assert not lost(found, "general prompts", share["high"] - 1e-6)


def test_a_run_without_such_figures_is_refused(domain: SavedRun) -> None:
    few = within({"base": 0.6, "lora": 0.6})
    few.report.arm("lora")["general"]["kept"] = {"value": 1.0, "low": None, "high": None}
    for saved, expected in (
        (domain, "no figures of general prompts"),
        (within({"lora": 0.6}), "no figures of general prompts"),
        (few, "no interval for 'lora'"),
    ):
        with pytest.raises(UserError, match=expected):
            kept_within(saved)


def test_keeping_in_one_run_on_the_command_line(tmp_path: Path) -> None:
    demo = within({"base": 0.6, "afa-lora": 0.3, "lora": 0.6}).report
    write_json(tmp_path / "measurements.json", demo.measurements)
    write_json(tmp_path / "report.json", demo.as_json())
    out = ("--out", tmp_path / "page")
    code, output = run_command("report", tmp_path, "--keep", "general=0.98", *out)
    assert code == 3
    assert "AFA-LoRA: keeps" in output
    code, output = run_command("report", tmp_path, "--keep", "general=0", *out)
    assert code == 0, output

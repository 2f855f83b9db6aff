"""Runs against runs: what changed, paired or not, and a gate that fails where it should."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.records.speeds import DECODE
from bench.report.schema import Report
from bench.runs.compare import changes_between, compare_runs, differing_settings
from bench.runs.gate import check
from bench.runs.page import headline, render_comparison, render_table, write_comparison
from bench.runs.saved import SavedRun, read_runs
from bench.stats.verdict import NO_DIFFERENCE
from drafts.errors import UserError
from drafts.files import write_json
from tests.bench.synthetic import ARMS, PROMPTS, TOKENS, report
from tests.command import run_command

WORSE = {**ARMS, "base": 0.3}
END = ("value", "low", "high")


def run(name: str, **changes: Any) -> SavedRun:
    return SavedRun(name, Path(name) / "report.json", report(**changes))


def without_measurements(saved: SavedRun) -> SavedRun:
    saved.report.measurements = {}
    return saved


def save(made: Report, folder: Path) -> Path:
    """report.json and measurements.json as `write_report` leaves them, without drawing plots."""
    folder.mkdir()
    write_json(folder / "measurements.json", made.measurements)
    write_json(folder / "report.json", made.as_json())
    return folder


@pytest.fixture(scope="module")
def baseline() -> SavedRun:
    return run("baseline")


def test_a_run_against_itself_shows_no_difference(baseline: SavedRun) -> None:
    found = compare_runs([baseline, run("again")])
    assert {change.comparison.metric for change in found.changes} == {
        "acceptance_length",
        DECODE.speedup,
        DECODE.rate,
    }
    assert len(found.changes) == 3 * len(ARMS) - 2  # no speculation accepts nothing, speeds up 1×
    for change in found.changes:
        assert change.paired
        assert change.comparison.difference.value == 0
        assert change.comparison.verdict == NO_DIFFERENCE
    assert found.settings == {}


def test_a_planted_loss_is_found_and_no_other(baseline: SavedRun) -> None:
    found = compare_runs([baseline, run("worse", chances=WORSE)])
    for change in found.changes:
        planted = change.arm == "base"
        assert (change.comparison.verdict == "lower") == planted
        assert change.comparison.verdict != "higher"
        value, low, high = (getattr(change.comparison.difference, end) for end in END)
        assert low <= value <= high
        if planted:
            there, here = (figure["value"] for figure in change.values)
            assert value == pytest.approx(here - there)
            assert high < 0
            assert "is lower in worse than in baseline by " in change.words


def test_the_paired_interval_is_narrower() -> None:
    """Prompts differ a lot and the draft a little: only paired prompts can show it."""
    old = run("old")
    paired = compare_runs([old, _slightly_worse(old, "new")])
    apart = compare_runs([without_measurements(run("old")), _slightly_worse(old, "new")])
    widths = []
    for found in (paired, apart):
        (change,) = [
            c
            for c in found.changes
            if c.arm == "base" and c.comparison.metric == "acceptance_length"
        ]
        widths.append(change.comparison.difference.high - change.comparison.difference.low)
    assert paired.changes[0].paired
    assert not apart.changes[0].paired
    assert widths[0] < 0.5 * widths[1]


def _slightly_worse(old: SavedRun, name: str) -> SavedRun:
    """The same counts with one accepted token fewer in every prompt."""
    new = json.loads(json.dumps(old.report.measurements))
    for row in new["arms"]["base"]["counters"]:
        for counters in row:
            counters["accepted_tokens"] -= 1
    made = report()
    made.measurements = new
    return SavedRun(name, Path(name), made)


def test_a_faster_machine_is_told_apart_from_a_faster_draft(baseline: SavedRun) -> None:
    """All arms of one run a fifth slower: tokens/s differ, speedups do not, and it is said."""
    slow = run("slow")
    for arm in slow.report.measurements["arms"].values():
        arm["seconds"] = [[1.2 * s for s in row] for row in arm["seconds"]]
    found = compare_runs([baseline, slow])
    verdicts = {(c.arm, c.comparison.metric): c.comparison.verdict for c in found.changes}
    assert {v for (_, metric), v in verdicts.items() if metric == DECODE.rate} == {"lower"}
    assert {v for (_, metric), v in verdicts.items() if metric == DECODE.speedup} == {NO_DIFFERENCE}
    (caution,) = found.cautions
    assert "decode tokens/s of slow is -16.7%" in caution
    assert check(baseline, slow).passed


def test_other_prompts_are_not_paired(baseline: SavedRun) -> None:
    other = run("other", seed=5, set_otherwise={"prompts_sha256": "2" * 64})
    found = compare_runs([baseline, other])
    assert not any(change.paired for change in found.changes)
    assert "prompts_sha256" in found.settings
    assert "unpaired" in found.changes[0].words


def test_an_interval_of_no_width_proves_nothing(baseline: SavedRun) -> None:
    """Reports of one prompt had such; every difference from them looked certain."""
    runs = [without_measurements(run(name, chances=c)) for name, c in (("a", None), ("b", WORSE))]
    for saved in runs:
        for arm in saved.report.arms:
            for metric in ("acceptance_length", DECODE.speedup, DECODE.rate):
                if arm[metric] and arm[metric]["value"] is not None:
                    arm[metric] = dict.fromkeys(END, arm[metric]["value"])
    changes = changes_between(*runs)
    assert changes
    assert {change.comparison.verdict for change in changes} == {NO_DIFFERENCE}


def test_turns_of_a_conversation_count_as_one_prompt() -> None:
    """Conversations that changed as a whole: their turns are no samples of their own."""
    halves = [i // 2 for i in range(PROMPTS)]
    widths = []
    for conversations in (None, halves):
        old, new = (run(name, conversations=conversations) for name in ("old", "new"))
        for pair in range(0, PROMPTS, 2):  # whole conversations got worse, by different amounts
            for row in new.report.measurements["arms"]["base"]["counters"]:
                for turn in row[pair : pair + 2]:
                    turn["accepted_tokens"] -= pair // 4
        (change,) = (
            c
            for c in changes_between(old, new)
            if (c.arm, c.comparison.metric) == ("base", "acceptance_length")
        )
        widths.append(change.comparison.difference.high - change.comparison.difference.low)
    assert widths[1] > 1.2 * widths[0]


def test_another_number_of_rounds_still_pairs_prompts(baseline: SavedRun) -> None:
    short = run("short")
    for arm in short.report.measurements["arms"].values():
        for table in ("tokens", "seconds", "prefill_seconds", "counters"):
            arm[table] = arm[table][:1]
    found = compare_runs([baseline, short])
    for change in found.changes:
        assert change.paired
        assert change.comparison.verdict == NO_DIFFERENCE


def test_settings_that_differ_are_listed(baseline: SavedRun) -> None:
    other = run("other", set_otherwise={"k": 5, "versions": {"vllm": "0.33.0", "torch": "2.13.0"}})
    assert differing_settings([baseline, other]) == {
        "k": [3, 5],
        "versions.vllm": ["0.32.0", "0.33.0"],
    }
    other.report.arm("base")["provenance"]["method"] = "medusa"
    assert differing_settings([baseline, other])["Base draft: method"] == ["eagle3", "medusa"]


def test_page_table_and_json_of_a_comparison(baseline: SavedRun, tmp_path: Path) -> None:
    worse = run("<worse>", chances=WORSE, set_otherwise={"k": 5})
    gone = run("gone", chances={"none": 0.0, "base": 0.5})
    found = compare_runs([baseline, worse, gone])
    assert found.missing == [
        "N-gram is in baseline and not in gone",
        "AFA-LoRA is in baseline and not in gone",
    ]
    assert render_table(found).row_count == len(found.changes)
    page = write_comparison(found, tmp_path)
    text = page.read_text(encoding="utf-8")
    assert text.count("<svg ") == 3
    assert "&lt;worse&gt;" in text
    assert "<worse>" not in text
    assert "Settings that differ" in text
    assert "http" not in text.replace("http://www.w3.org", "")
    content = json.loads((tmp_path / "comparison.json").read_text())
    assert content["schema"] == "afaspec-comparison/1"
    assert len(content["comparisons"]) == len(found.changes)
    assert content["differing_settings"] == [{"setting": "k", "values": [3, 5, 3]}]
    two = compare_runs([baseline, worse])
    assert "3 lower" in headline(two)
    assert render_comparison(two).count("<li class='lower'>") == 3


def test_gate_passes_the_same_and_fails_the_worse(baseline: SavedRun) -> None:
    assert check(baseline, run("again")).passed
    worse = run("worse", chances=WORSE)
    failed = check(baseline, worse)
    assert [text.split(":")[0] for text in failed.failures] == ["Base draft", "Base draft"]
    assert "acceptance length fell by" in failed.failures[0]
    assert "decode speedup fell by" in failed.failures[1]
    loss = 1 - length_of(worse) / length_of(baseline)
    assert f"fell by {100 * loss:.1f}%" in failed.failures[0]
    assert check(baseline, worse, tolerance=0.5).passed
    assert check(worse, baseline).passed  # better is not worse


def process(name: str, factor: float) -> SavedRun:
    """The baseline's arms in another process, where the base draft's engine is `factor` slower."""
    found = run(name)
    measured, arm = found.report.measurements["arms"]["base"], found.report.arm("base")
    measured["seconds"] = [[factor * s for s in row] for row in measured["seconds"]]
    for key in (DECODE.rate, DECODE.speedup):
        arm[key] = {end: value / factor for end, value in arm[key].items()}
    return found


def test_what_differs_between_processes_is_learned_from_several_baselines() -> None:
    """Engines of the same draft that are 4% apart: one baseline calls that a regression."""
    generator = np.random.default_rng(0)
    alone, together = [], []
    for _ in range(12):
        first, *again = [process(f"run {i}", generator.normal(1.0, 0.04)) for i in range(5)]
        new = process("new", generator.normal(1.0, 0.04))
        alone.append(check(first, new).passed)
        together.append(check(first, new, again=again).passed)
    assert sum(alone) < 9
    assert sum(together) >= 11  # of equal drafts 2.5% may be called slower
    assert not check(first, process("new", 1.8), again=again).passed
    worse = check(first, run("worse", chances=WORSE), again=again)
    assert any("acceptance length fell by" in words for words in worse.failures)


def test_requests_that_say_something_else_are_not_compared(baseline: SavedRun) -> None:
    assert check(baseline, run("same", set_otherwise={"request_body": {}})).passed
    other = run("other", set_otherwise={"request_body": {"top_p": 0.5}})
    with pytest.raises(UserError, match=r"request_body is .*top_p.*, there it is None"):
        check(baseline, other)


def test_all_baselines_must_be_of_the_same_settings(baseline: SavedRun) -> None:
    with pytest.raises(UserError, match="k is 3, there it is 5"):
        check(baseline, run("new"), again=[run("other", set_otherwise={"k": 5})])


def length_of(saved: SavedRun) -> float:
    return float(saved.report.arm("base")["acceptance_length"]["value"])


def test_gate_asks_for_every_arm_and_for_the_same_output(baseline: SavedRun) -> None:
    gone = check(baseline, run("gone", chances={"none": 0.0, "base": 0.5}))
    assert gone.failures == [
        "N-gram: is missing; the baseline has it",
        "AFA-LoRA: is missing; the baseline has it",
    ]
    wrong = run("wrong")
    wrong.report.arm("base")["lossless"]["near_ties"] = 0
    assert check(wrong, baseline).passed
    assert "not at a near-tie" in check(baseline, wrong).failures[0]
    unchecked = check(baseline, run("unchecked", differences=None))
    assert len(unchecked.failures) == len(ARMS)
    assert "not checked any more" in unchecked.failures[0]


def test_gate_follows_the_distribution_test() -> None:
    words = "The sampled output does not follow the target's distribution: 9 tokens."
    old = run("old", distribution={"base": {"passed": True, "words": "It follows."}})
    new = run("new", distribution={"base": {"passed": False, "words": words}})
    assert check(old, new).failures == [f"Base draft: {words.rstrip('.')}"]
    assert check(new, old).passed
    assert "not made any more" in check(old, run("none")).failures[0]
    control = {"passed": None, "words": "It could not be judged: the control fails too."}
    unknown = check(old, run("control", distribution={"base": control}))
    assert unknown.passed
    assert "Base draft: not judged: It could not be judged: the control fails too" in (
        unknown.checked
    )


def test_gate_looks_at_every_load(baseline: SavedRun) -> None:
    """The second load alone got worse: the first one's figures do not speak for it."""

    def loaded(second: Report) -> SavedRun:
        made = report()
        made.load = [{"concurrency": 1, "arms": made.arms}, {"concurrency": 8, "arms": second.arms}]
        return SavedRun("run", Path("run"), made)

    same = check(loaded(report()), loaded(report()))
    assert same.passed
    assert {said.split(":")[0] for said in same.checked} == {"concurrency 1", "concurrency 8"}
    worse = check(loaded(report()), loaded(report(chances=WORSE)))
    assert worse.failures
    assert all(said.startswith("concurrency 8: Base draft: ") for said in worse.failures)


def test_gate_counts_the_requests_that_failed(baseline: SavedRun) -> None:
    half, few = run("half"), run("few")
    for saved, failed in ((baseline, 0), (half, 50), (few, 1)):
        saved.report.arm("base")["latency"] = {"requests": 100, "failed": failed}
    found = check(baseline, half)
    assert found.failures == ["Base draft: 50 of 100 requests failed; in the baseline 0 of 100"]
    assert check(baseline, few).passed
    assert check(half, half).passed


def test_tokens_per_second_are_gated_only_on_the_same_machine_without_a_speedup() -> None:
    arms = {"base": 0.5, "afa-lora": 0.75}
    slow = run("slow", chances=arms, differences=None)
    for table in slow.report.measurements["arms"]["base"]["seconds"]:
        table[:] = [2 * seconds for seconds in table]
    slow.report.arm("base")[DECODE.rate]["value"] /= 2
    old = run("old", chances=arms, differences=None)
    assert check(old, slow).failures[0].startswith("Base draft: decode tokens/s fell by 50.")
    slow.report.provenance["machine"] = {"processor": "another", "cores": 2}
    assert check(old, slow).passed


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("k", 4),
        ("temperature", 1.0),
        ("prompts_sha256", "3" * 64),
        ("max_tokens", TOKENS + 1),
        ("target", {"path": "models/target", "sha256": "4" * 64}),
        ("mode", "server"),
    ],
)
def test_gate_refuses_other_settings(baseline: SavedRun, setting: str, value: object) -> None:
    with pytest.raises(UserError, match=setting):
        check(baseline, run("other", set_otherwise={setting: value}))


def test_gate_says_why_the_prompts_differ(baseline: SavedRun) -> None:
    """Another day, in a template with a clock; of no matter where the prompts are the same."""
    days = [{"chat_date": f"2026-01-{day}", "chat_template_kwargs": {}} for day in (30, 31)]
    old, new = (run(day["chat_date"], set_otherwise=day) for day in days)
    check(old, new)
    other = run("other", set_otherwise={**days[1], "prompts_sha256": "3" * 64})
    with pytest.raises(UserError, match="chat_date is 2026-01-31, there it is 2026-01-30"):
        check(old, other)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    made = {
        "baseline": report(),
        "worse": report(chances=WORSE),
        "other": report(set_otherwise={"k": 4}),
    }
    return {name: save(one, root / name) for name, one in made.items()}


def test_the_gate_on_the_command_line(folders: Mapping[str, Path]) -> None:
    baseline = folders["baseline"] / "report.json"
    code, output = run_command("report", folders["baseline"], "--gate", baseline)
    assert code == 0
    assert "Gate passed" in output
    code, output = run_command("report", folders["worse"], "--gate", baseline)
    assert code == 3
    assert "decode speedup fell by" in output
    code, _ = run_command("report", folders["worse"], "--gate", baseline, "--gate-tolerance", "0.9")
    assert code == 0
    code, output = run_command("report", folders["other"], "--gate", baseline)
    assert code == 2
    assert "k is 4, there it is 3" in output


def test_bench_refuses_a_baseline_of_other_settings_before_anything_runs(
    folders: Mapping[str, Path], tiny_target: Path, tiny_draft: Path, tmp_path: Path
) -> None:
    code, output = run_command(
        "bench", tiny_target, "--prompts", "nowhere.jsonl", "--draft", f"base={tiny_draft}",
        "--k", "4", "--max-tokens", str(TOKENS), "--gate", folders["baseline"], "--out", tmp_path,
    )  # fmt: skip
    assert code == 2
    assert "k is 4, there it is 3" in output


def test_comparing_on_the_command_line(folders: Mapping[str, Path], tmp_path: Path) -> None:
    code, output = run_command(
        "report", folders["baseline"], folders["worse"], folders["other"], "--out", tmp_path
    )
    assert code == 0
    assert "Settings that differ" in output
    assert "k: 3 | 3 | 4" in output
    assert (tmp_path / "comparison.html").is_file()
    code, output = run_command("report", folders["baseline"], folders["worse"], "--gate", tmp_path)
    assert code == 2
    assert "one run" in output


def test_rendering_again_leaves_the_report_alone(folders: Mapping[str, Path]) -> None:
    folder = folders["other"]
    before = (folder / "report.json").read_bytes()
    code, output = run_command("report", folder)
    assert code == 0
    assert "AFA-LoRA" in output
    assert (folder / "report.json").read_bytes() == before
    assert (folder / "report.csv").is_file()
    assert (folder / "latency.png").is_file()


def test_runs_of_one_name_are_called_by_their_paths(
    folders: Mapping[str, Path], tmp_path: Path
) -> None:
    twin = save(report(), tmp_path / "baseline")
    names = [one.name for one in read_runs([folders["baseline"], twin, folders["other"]])]
    assert names == [str(folders["baseline"] / "report.json"), str(twin / "report.json"), "other"]

"""Reports of made-up server runs, whose truth is known: speeds, failures, counters by turn."""

from __future__ import annotations

import html
import json
import math
from pathlib import Path
from typing import Any

import pytest

from bench.records.arms import Arm
from bench.records.run import Answer, Block
from bench.records.speeds import REQUEST, THROUGHPUT
from bench.report.console import render_loads, warnings
from bench.report.page import render_page
from bench.report.schema import Report
from bench.report.words import also
from bench.runs.saved import read_run
from bench.server.arrivals import Load
from bench.server.checks import warnings_of
from bench.server.measure import LoadRun
from bench.server.report import build_server_report, first_differences
from bench.stats.verdict import NO_DIFFERENCE
from serving.metrics import ServerCounters, SpecCounters
from serving.remote import RemoteServer
from tests.bench.synthetic import as_before
from tests.opened import no_draft_at

TOKENS, PROMPTS = 11, 2
SPEC = SpecCounters(4, 8, 6, (4, 2))


def answer(start: float, step: float, counters: SpecCounters | None, **changes: Any) -> Answer:
    """TTFT 0.5 s, then 10 tokens in 5 pieces, `step` seconds apart."""
    chunks = [start + 0.5 + step * i for i in range(6)]
    ids = list(range(TOKENS))
    return Answer(
        start, start, chunks, changes.get("tokens", TOKENS), token_ids=ids, counters=counters,
        error=changes.get("error"),
    )  # fmt: skip


def run_of(
    name: str, load: Load, step: float, k: int, *, by_request: bool = True, failed: bool = False
) -> LoadRun:
    """Two rounds; in each the two prompts are asked twice, all four at once."""
    server = RemoteServer(f"http://{name}:1", "m", "m", 512, "0.32.0", k)
    run = LoadRun(name, server, load, PROMPTS)
    for _ in range(2):
        spec = SPEC if k and by_request else None
        answers = [answer(0.0, step, spec) for _ in range(4)]
        if failed:
            answers[1] = Answer(0.0, 0.0, error="HTTP 500: no")
        total = SpecCounters(16, 32, 24, (16, 8)) if k else SpecCounters(0, 0, 0, ())
        run.rounds.append([Block(0.5 + 5 * step, 0.004, answers)])
        run.counters.append([ServerCounters(4, 4 * TOKENS, total)])
    return run


def report_of(runs: list[LoadRun], *more: list[LoadRun], **changes: Any) -> Report:
    arms = {
        run.name: Arm(run.name, no_draft_at(Path("draft")) if run.server.k else None)
        for run in runs
    }
    common = {
        "k": 2, "temperature": 0.0, "max_tokens": TOKENS, "rounds": 2, "concurrency": "",
        "prompts": PROMPTS, "dtype": "bfloat16", "mode": "server",
        "loads": [part[0].load.words for part in (runs, *more)],
        "time": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    return build_server_report(
        [runs, *more],
        arms=arms,
        common=common,
        provenance={
            name: {**common, "method": arm.draft and "eagle3"} for name, arm in arms.items()
        },
        prompts=["p:1", "p:2"],
        categories=["a", "b"],
        **changes,
    )


def pair(load: Load, **changes: Any) -> list[LoadRun]:
    return [run_of("none", load, 0.2, 0), run_of("base", load, 0.1, 2, **changes)]


def test_throughput_is_all_tokens_over_the_wall_time() -> None:
    report = report_of(pair(Load(concurrency=4)))
    none, base = report.arms
    assert none[THROUGHPUT.rate]["value"] == pytest.approx(4 * TOKENS / 1.5)
    assert base[THROUGHPUT.rate]["value"] == pytest.approx(4 * TOKENS / 1.0)
    assert base[THROUGHPUT.speedup]["value"] == pytest.approx(1.5)
    assert base[REQUEST.rate]["value"] == pytest.approx(10 / 0.5)
    assert base["requests_per_second"] == pytest.approx(4.0)
    assert base["client"]["cpu_ms_per_request"] == pytest.approx(1.0)
    assert base["acceptance_length"]["value"] == pytest.approx(2.5)
    assert base["accepted_lengths"] == {"per_step": [0, 16, 16], "per_request": [2.5, 2.5]}
    assert base["latency"]["tpot_ms"]["mean"] == pytest.approx(50)
    assert base["latency"]["itl_ms"]["mean"] == pytest.approx(100)
    assert base["lossless"] is None  # batches of several are no ground to compare outputs on
    assert report.load is None


def test_at_a_fixed_rate_the_speedup_is_that_of_a_request() -> None:
    report = report_of(pair(Load(rate=2.0)), pair(Load(rate=math.inf)))
    assert report.load is not None
    assert [step["request_rate"] for step in report.load] == [2.0, "inf"]
    paced, burst = (step["arms"][1] for step in report.load)
    assert {arm["speed"] for arm in (paced, burst)} == {REQUEST.name}
    assert [arm[REQUEST.speedup]["value"] for arm in (paced, burst)] == pytest.approx([2.0, 2.0])
    assert [arm[THROUGHPUT.speedup]["value"] for arm in (paced, burst)] == pytest.approx([1.5, 1.5])
    for arm in (paced, burst):
        assert arm[THROUGHPUT.rate]["value"] == pytest.approx(4 * TOKENS / 1.0)
    page = render_page(report)
    for step, name in zip(report.load, ("2 requests/s", "all at once"), strict=True):
        (found,) = step["comparisons"]
        assert (found["arm"], found["metric"]) == ("base", REQUEST.speedup)
        assert f"{name}: {found['words']}" in html.unescape(page)
    first, _, speedup, _, _, tpot, _ = (list(c.cells) for c in render_loads(report).columns)
    arms = ["  No speculation", "  Base draft"]
    assert first == ["2 requests/s", *arms, "all at once", *arms]
    assert speedup == ["", "1.00×", "2.00×", "", "1.00×", "2.00×"]
    assert tpot == ["", "100.0\n(100.0)", "50.0\n(50.0)"] * 2


@pytest.mark.parametrize("load", [Load(concurrency=2), Load(rate=2.0)], ids=str)
def test_a_servers_report_of_schema_2_says_what_it_said(load: Load, tmp_path: Path) -> None:
    report = report_of(pair(load), pair(load))
    (tmp_path / "report.json").write_text(json.dumps(as_before(report, "afaspec-report/2")))
    old = read_run(tmp_path).report
    not_kept = REQUEST if load.concurrency else THROUGHPUT
    for arm in report.arms:
        arm[not_kept.speedup] = None
    assert old.arms == json.loads(json.dumps(report.arms))
    assert old.comparisons == report.comparisons


def test_failed_requests_are_left_out_and_said() -> None:
    report = report_of(pair(Load(concurrency=4), failed=True))
    base = report.arms[1]
    assert (base["latency"]["requests"], base["latency"]["failed"]) == (8, 2)
    assert base[THROUGHPUT.rate]["value"] == pytest.approx(3 * TOKENS / 1.0)
    assert base["acceptance_length"]["value"] == pytest.approx(2.5)
    (warning,) = [line for line in warnings(report) if "failed" in line]
    assert "2 of 8 requests failed; the first: HTTP 500: no" in warning


def test_failed_answers_are_not_other_outputs() -> None:
    """An answer that was cut off in the middle has other ids than a whole one, for no fault."""
    runs = pair(Load(concurrency=1))
    runs[1].rounds[0][0].answers[1] = Answer(
        0.0, 0.0, [0.1], 2, token_ids=[0, 5], error="the answer ended early"
    )
    assert first_differences(runs, ["p:1", "p:2"]) == {"base": []}
    report = report_of(runs, differences=first_differences(runs, ["p:1", "p:2"]))
    lossless = report.arms[1]["lossless"]
    assert (lossless["matching"], lossless["prompts"], lossless["not_comparable"]) == (1, 1, 1)
    runs[0].rounds[0][0].answers[0] = Answer(0.0, 0.0, error="HTTP 500: no")
    found = first_differences(runs, ["p:1", "p:2"])
    assert found == {"base": []}
    report = report_of(runs, differences=found)
    assert report.arms[1]["lossless"] is None  # nothing is left to compare
    assert "same" not in also(report.arms)


def test_one_block_says_nothing_of_others() -> None:
    load = Load(concurrency=4)
    runs = pair(load, by_request=False)
    for run in runs:
        run.rounds, run.counters = run.rounds[:1], run.counters[:1]
    base = report_of(runs).arms[1]
    figures = [
        base[THROUGHPUT.rate],
        base[THROUGHPUT.speedup],
        base["acceptance_length"],
    ]
    figures += [base["acceptance_rate"], *base["per_position"], *base["conditional"]]
    for figure in figures:
        assert figure["value"] is not None
        assert (figure["low"], figure["high"]) == (None, None)
    assert not [one for one in report_of(runs).comparisons if one["verdict"] != NO_DIFFERENCE]


@pytest.mark.parametrize(("workers", "cpu", "warned"), [(64, 0.6, True), (64, 0.1, False)])
def test_a_busy_client_is_named_at_any_concurrency(workers: int, cpu: float, warned: bool) -> None:
    """With 64 at once a request has a sixty-fourth of the client's core, busy as that may be."""
    server = RemoteServer("http://h:1", "m", "m", 512, "0.32.0", 0)
    run = LoadRun("none", server, Load(concurrency=workers), PROMPTS)
    block = Block(1.0, cpu, [answer(0.0, 0.1, None) for _ in range(workers)])
    run.rounds, run.counters = [[block]], [[ServerCounters(workers, workers * TOKENS, SPEC)]]
    assert any("was busy" in line for line in warnings_of(run)) == warned


def test_what_goes_past_the_drafts_positions_is_counted() -> None:
    """The draft has 64 positions; prompts of 60 tokens with 11 of answer pass it by 7 each."""
    report = report_of(pair(Load(concurrency=4)), prompt_tokens=[60, 30])
    none, base = report.arms
    assert none["past_positions"] is None
    assert base["past_positions"] | {"words": ""} == {
        "positions": 64, "tokens": 14, "of": 44, "requests": 2, "words": "",
    }  # fmt: skip
    assert any("14 of 44 answer tokens" in line for line in warnings(report))


def test_without_counters_by_request_those_of_the_server_are_used() -> None:
    report = report_of(pair(Load(concurrency=4), by_request=False))
    base = report.arms[1]
    assert base["acceptance_length"]["value"] == pytest.approx(2.5)
    assert [figure["value"] for figure in base["per_position"]] == [1.0, 0.5]
    assert base["accepted_lengths"] == {"per_step": [0, 16, 16], "per_request": []}
    assert base["acceptance_length"]["low"] is None  # both rounds are of the same prompts
    assert base["categories"]["a"]["acceptance_length"] is None
    assert base["categories"]["a"][THROUGHPUT.speedup]["value"] == pytest.approx(1.5)
    assert not base["warnings"]


def test_counters_that_do_not_add_up_are_said() -> None:
    runs = pair(Load(concurrency=4))
    runs[0].counters[0][0] = ServerCounters(9, 99, SpecCounters(0, 0, 0, ()))
    runs[1].counters[0][0] = ServerCounters(4, 44, SpecCounters(20, 40, 30, (20, 10)))
    none, base = report_of(runs).arms
    assert any("ended 13 requests, of which 8 were ours" in line for line in none["warnings"])
    assert any("are not the sum over the answers" in line for line in base["warnings"])


def test_drafts_of_different_k_keep_their_own_positions() -> None:
    load = Load(concurrency=4)
    longer = run_of("longer", load, 0.1, 3, by_request=False)
    longer.counters = [
        [ServerCounters(4, 44, SpecCounters(8, 24, 9, (6, 2, 1)))] for _ in longer.counters
    ]
    report = report_of([*pair(load), longer])
    assert [len(arm["per_position"] or []) for arm in report.arms] == [0, 2, 3]
    assert [len((arm["accepted_lengths"] or {}).get("per_step", [])) for arm in report.arms] == [
        0, 3, 4,
    ]  # fmt: skip


def test_outputs_are_compared_with_those_without_speculation() -> None:
    runs = pair(Load(concurrency=1))
    assert first_differences(runs, ["p:1", "p:2"]) == {"base": []}
    changed = runs[1].rounds[0][0].answers
    changed[1] = Answer(0.0, 0.0, [0.1], 2, token_ids=[0, 5])
    found = first_differences(runs, ["p:1", "p:2"])
    assert found is not None
    (difference,) = found["base"]
    assert (difference.prompt, difference.position) == ("p:2", 1)
    assert (difference.token_none, difference.token_arm) == (1, 5)
    changed[0] = Answer(0.0, 0.0, [0.1], 2, token_ids=None)
    assert first_differences(runs, ["p:1", "p:2"]) is None

"""The loop's states: why each leads to the next, what survives a kill, what is taken back."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from afaspec.config import load_config
from afaspec.loop import run
from afaspec.loop.adapt import Trial, Work
from afaspec.loop.config import LoopConfig
from afaspec.loop.gate import verdict
from afaspec.loop.history import Entry, History
from afaspec.loop.page import cycles_of, write_report
from afaspec.loop.run import Loop, probation, step
from afaspec.loop.spans import FILE, Span, Spans, read_spans
from bench.report.schema import Report
from drafts.errors import UserError
from drafts.files import write_json
from serving.traffic.shards import Traffic
from tests.browser import browser, find_browser, require_shown_well

EVERY = 5.0


@pytest.fixture
def config(tmp_path: Path) -> LoopConfig:
    return LoopConfig(
        url="http://127.0.0.1:1",
        target="embedded",
        draft="embedded-draft",
        traffic=tmp_path / "traffic",
        general="suite:builtin",
        out=tmp_path,
        every=EVERY,
    )


class Clock:
    """Looks that come as time passes: `chance` of a drafted token being kept."""

    def __init__(self, chance: float = 0.5, drafts: int = 100, seed: int = 0):
        self.chance, self.drafts = chance, drafts
        self.spans: list[Span] = []
        self.random = np.random.default_rng(seed)
        self.now, self.version, self.note = 1000.0, 1, ""

    def since(self, at: float) -> list[Span]:
        return [span for span in self.spans if span.at > at]

    def pause(self, seconds: float) -> None:
        self.now += seconds
        accepted = int(self.random.binomial(self.drafts, self.chance))
        self.spans.append(
            Span(self.now, seconds, 3, self.drafts + accepted, self.drafts, accepted, {},
                 self.version, self.note)
        )  # fmt: skip


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(run, "time", SimpleNamespace(time=lambda: clock.now))
    return clock


def a_loop(config: LoopConfig, clock: Clock) -> Loop:
    said: list[str] = []
    work = Work(config, cast(Any, None), cast(Any, None), 3, lambda *_: None, said.append)
    return Loop(config, work, History(config.out), cast(Spans, clock), clock.pause)


def spans_of(chance: float, count: int, seed: int) -> list[Span]:
    clock = Clock(chance, seed=seed)
    for _ in range(count):
        clock.pause(EVERY)
    return clock.spans


def test_a_drop_begins_a_cycle_and_says_why(
    config: LoopConfig, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "ask_for_versions", lambda url: [{"folder": "/old", "sha256": "a"}])
    loop = a_loop(config, clock)

    def pause(seconds: float) -> None:
        if len(clock.spans) == 60:
            clock.chance = 0.3
        assert len(clock.spans) < 500
        clock.pause(seconds)

    loop.pause = pause
    step(loop)
    last = History(config.out).last
    assert (last.cycle, last.state) == (1, "collect")
    assert last.words == "acceptance fell for all requests: 1.49 to 1.45"
    assert last.data["serves"] == "/old"
    assert clock.spans[59].at - 12 * EVERY < last.data["since"] < clock.now


def test_new_rows_are_collected_be_they_texts_or_token_ids(
    config: LoopConfig, clock: Clock
) -> None:
    config = config.model_copy(update={"least_rows": 4})
    loop = a_loop(config, clock)
    began = time.time()
    loop.history.add(Entry(began, 1, "collect", "", {"since": began}))
    for_ids = {"prompt_token_ids": [1, 2], "response_token_ids": [3]}
    for_text = {"request": {"prompt": "a"}, "response": {"choices": [{"text": "b"}]}}
    rows = [
        {"id": str(i), "time": datetime.fromtimestamp(began + i - 1, UTC).isoformat(), **kind}
        for i, kind in enumerate([for_text, for_ids, for_text, for_ids, for_text])
    ]
    Traffic(config.traffic).append(rows)
    step(loop)
    assert loop.history.last.state == "trial"
    kept = (config.out / "0001" / "traffic.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in kept] == ["1", "2", "3", "4"]  # 0 was before


def test_a_trial_says_what_it_is_worth_and_what_it_costs(
    config: LoopConfig, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = a_loop(config, clock)
    for _ in range(10):
        clock.pause(EVERY)
    speed = sum(span.tokens for span in clock.spans) / sum(span.seconds for span in clock.spans)
    monkeypatch.setattr(Loop, "begin_with", lambda self: None)
    for length, state in ((2.2, "adapt"), (2.01, "watch")):
        found = Trial(30, 2.0, length, 60.0)
        monkeypatch.setattr(run, "trial", lambda *_, found=found: found)
        loop.history.add(Entry(clock.now, 1, "trial", "", {"since": 0.0}))
        step(loop)
        last = loop.history.last
        assert last.state == state
        assert f"({found.gain:+.1%})" in last.words
        assert f", {found.gain * speed:+.1f} at the present load" in last.words
    assert last.words.startswith("not worth it: ")
    paid = 60 / 30 * config.steps / 0.1 / 60
    adapting = loop.history.entries[1].words
    assert f"all {config.steps} steps take 6.7 min or so, made up after {paid:.0f} min" in adapting


def test_nothing_begins_while_nothing_changes(config: LoopConfig, clock: Clock) -> None:
    loop = a_loop(config, clock)

    class Enough(BaseException):
        pass

    def pause(seconds: float) -> None:
        if len(clock.spans) == 400:
            raise Enough
        clock.pause(seconds)

    loop.pause = pause
    with pytest.raises(Enough):
        step(loop)
    assert History(config.out).entries == []


def test_a_failing_step_backs_off_and_is_given_up_in_the_end(
    config: LoopConfig, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = a_loop(config, clock)
    loop.go("adapt", "for a test", {}, cycle=1)
    began, waited = loop.began, []

    def fails(_: Loop) -> Any:
        raise UserError("no room", where=Path("/disk"))

    monkeypatch.setitem(run.STATES, "adapt", fails)
    loop.pause = lambda seconds: (waited.append(seconds), clock.pause(seconds))
    for _ in range(config.retries - 1):
        step(loop)
        assert (loop.history.last.state, loop.began) == ("adapt", began)
    assert waited == [30, 60, 120, 240]
    step(loop)
    assert (loop.history.last.state, loop.history.last.outcome) == ("watch", "failed")
    assert "no room" in loop.history.last.words
    assert len(waited) == 4


def test_taking_back_is_never_given_up(
    config: LoopConfig, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = a_loop(config, clock)
    loop.go("restore", "for a test", {}, cycle=1)
    waited: list[float] = []

    def fails(_: Loop) -> Any:
        raise UserError("the server does not answer")

    monkeypatch.setitem(run.STATES, "restore", fails)
    loop.pause = waited.append
    for _ in range(40):
        step(loop)
    assert (loop.history.last.state, loop.history.last.outcome) == ("restore", None)
    assert max(waited) == 3600


def test_what_another_state_left_is_found_after_a_kill(config: LoopConfig, clock: Clock) -> None:
    loop = a_loop(config, clock)
    loop.go("collect", "fell", {"since": 5.0, "serves": "/old"}, cycle=1)
    loop.go("trial", "enough", {})
    with (config.out / "journal.jsonl").open("ab") as file:
        file.write(b'{"at": 1.0, "cyc')  # a kill in the middle of a line
    again = a_loop(config, clock)
    assert (again.history.last.state, again.cycle) == ("trial", 1)
    assert again.found("since") == 5.0
    again.go("adapt", "worth it", {})
    assert [entry.state for entry in History(config.out).entries] == ["collect", "trial", "adapt"]


def test_a_damaged_journal_is_refused(config: LoopConfig) -> None:
    path = config.out / "journal.jsonl"
    path.write_text(json.dumps(asdict(Entry(1.0, 1, "watch", "x"))) + '\n{"state": "sleep"}\n')
    with pytest.raises(UserError, match="line 2 is no entry"):
        History(config.out)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("chance", [0.0, 0.15, 0.3])
def test_a_worse_draft_never_stays(config: LoopConfig, seed: int, chance: float) -> None:
    old = [(span.drafts, span.accepted) for span in spans_of(0.5, 60, seed)]
    words, stays = cast("tuple[str, bool]", probation(old, spans_of(chance, 60, 99 + seed), config))
    assert not stays, words
    assert "beyond doubt worse" in words


def test_a_draft_that_is_as_good_stays(config: LoopConfig) -> None:
    stays = 0
    for seed in range(100):
        old = [(span.drafts, span.accepted) for span in spans_of(0.5, 60, seed)]
        assert probation(old, spans_of(0.5, 20, 1000 + seed), config) is None
        found = probation(old, spans_of(0.5, 60, 1000 + seed), config)
        stays += found is not None and found[1]
    assert stays >= 95


def test_without_the_old_drafts_traffic_the_gates_word_counts(config: LoopConfig) -> None:
    found = probation([(100, 50)] * 3, spans_of(0.1, 60, 0), config)
    assert found is not None
    assert found[1]
    assert "too little of the old draft's traffic" in found[0]


def report(better: str = "higher", general: float = 1.7, matching: int = 23) -> Report:
    def arm(name: str, length: float, of_general: float) -> dict[str, Any]:
        return {
            "name": name,
            "acceptance_length": {"value": length},
            "general": {"acceptance_length": {"value": of_general}},
            "lossless": {"prompts": 24, "matching": matching, "near_ties": 1},
        }

    compared = {"arm": "new", "against": "current", "metric": "acceptance_length"}
    return Report(
        [arm("current", 1.5, 1.72), arm("new", 1.8, general)],
        {},
        comparisons=[{**compared, "verdict": better, "words": "what it says"}],
    )


def test_the_gate_lets_pass_what_is_better_and_forgets_nothing() -> None:
    assert verdict(report(), 0.97).passed
    assert (
        verdict(report(), 0.97).words == "passed: 1.50 to 1.80 in vLLM, 98.8% of the general kept"
    )


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (report(better="no difference shown"), "not shown to be better"),
        (report(better="lower"), "not shown to be better"),
        (report(general=1.6), "keeps 93.0% of the general acceptance, 97% are asked"),
        (report(matching=21), "2 outputs are not those without speculation"),
    ],
)
def test_the_gate_holds_back_what_is_not(found: Report, why: str) -> None:
    judged = verdict(found, 0.97)
    assert not judged.passed
    assert why in judged.words


def test_the_page_tells_the_history(config: LoopConfig, clock: Clock) -> None:
    write_json(config.out / "loop.json", config.model_dump(mode="json"))
    with (config.out / FILE).open("w") as file:
        for number in range(200):
            clock.version = 1 if number < 120 else 2
            clock.pause(EVERY)
            file.write(json.dumps(asdict(clock.spans[-1])) + "\n")
        file.write('{"at": 17')  # a kill
    assert len(list(read_spans(config.out))) == 200
    loop = a_loop(config, clock)
    clock.now = 1300.0
    loop.go("collect", "acceptance fell <twice>", {"since": 1.0, "serves": "/old"}, cycle=1)
    loop.go("adapt", "worth it", {"base": 1.4, "length": 1.6})
    loop.go("swap", "passed", {"gate": {"old": 1.5, "new": 1.8, "kept": 0.99}})
    clock.now = 1600.0
    loop.go("probation", "serves", {"version": 2})
    loop.go("watch", "live", {"outcome": "kept"})
    (row,) = cycles_of(loop.history)
    assert row[2:6] == ["acceptance fell <twice>", "1.40 to 1.60", "1.50 to 1.80, 99.0% kept", "2"]
    written = write_report(config.out)
    if find_browser():
        with browser() as address:
            require_shown_well(address, written)
    page = written.read_text()
    assert "acceptance fell &lt;twice&gt;" in page
    assert page.count("<svg") == 2
    assert (config.out / "acceptance.png").stat().st_size > 10_000
    with pytest.raises(UserError, match="no loop has run here"):
        write_report(config.out / "elsewhere")


def test_settings_that_cannot_be_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "loop.yaml"
    file.write_text("url: http://127.0.0.1:1\nleast_rows: 500\n")
    with pytest.raises(UserError, match="target"):
        load_config(LoopConfig, file, {})
    file.write_text(
        "url: u\ntarget: t\ndraft: d\ntraffic: r\ngeneral: g\nout: o\nleast_rows: 500\n"
    )
    with pytest.raises(UserError, match="least_rows 500 is more than rows 400"):
        load_config(LoopConfig, file, {})

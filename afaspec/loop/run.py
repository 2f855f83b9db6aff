"""The loop: watch, adapt, judge, put in, hold to it, take back. `run_loop` is one state after the
other; each says in the journal why it leads to the next, and can be begun again at any moment."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from afaspec.loop.adapt import Work, adapt, recent_rows, trial, write_rows
from afaspec.loop.config import LoopConfig
from afaspec.loop.gate import judge
from afaspec.loop.history import Entry, History, State
from afaspec.loop.metrics import WatchMetrics
from afaspec.loop.spans import Span, Spans, acceptance
from afaspec.loop.watch import RECENT, Watch
from afaspec.pairs.names import open_draft
from afaspec.store.write import locked
from bench.stats.drift import Drift
from drafts.checkpoint.info import DraftInfo
from drafts.errors import UserError
from drafts.files import write_json
from drafts.registry import read_draft
from drafts.target.info import TargetInfo
from serving.remote import connect
from serving.server.ask import ask_for_change, ask_for_versions

SETTINGS = "loop.json"
OLD_LOOKS, OLD_DRAFTS = 20, 500  # of the old draft at least, before a new one is held against it
NEVER_GIVEN_UP = ("watch", "restore")  # a draft that disappointed is not left in
LONGEST_WAIT = 3600.0  # seconds before another try
MISSING_TIMES = 24  # probation ends after so many times its looks, however few of them drafted

Next = tuple[State, str, dict[str, Any]]


@dataclass
class Loop:
    """A running loop."""

    config: LoopConfig
    work: Work
    history: History
    spans: Spans
    pause: Callable[[float], object] = time.sleep

    @property
    def cycle(self) -> int:
        """The number of the present cycle, or of the last one."""
        return self.history.last.cycle

    @property
    def began(self) -> float:
        """When the present state was entered, however often it failed or was begun again."""
        entered = self.history.last
        for entry in reversed(self.history.entries):
            if (entry.cycle, entry.state) != (entered.cycle, entered.state):
                break
            entered = entry
        return entered.at

    @property
    def folder(self) -> Path:
        """What the present cycle works in."""
        return self.config.out / f"{self.cycle:04d}"

    def found(self, name: str) -> Any:
        """What an earlier state of this cycle left."""
        return self.history.found(self.cycle, name)

    def begin_with(self) -> DraftInfo:
        """The draft that training begins with."""
        serves = read_draft(Path(self.found("serves")))
        return serves if self.config.begin_with == "current" else self.work.base

    def go(self, state: State, words: str, data: dict[str, Any], cycle: int | None = None) -> None:
        """Note where the loop is now, and why."""
        number = self.cycle if cycle is None else cycle
        self.history.add(Entry(time.time(), number, state, words, data))
        self.work.say(f"{self.history.last.when}  {number}  {state}: {words}")


def run_loop(
    config: LoopConfig,
    target: TargetInfo,
    stage: Callable[[str, int, int], None],
    say: Callable[[str], None],
) -> None:
    """Run until it is stopped, from where it was.

    Raises `UserError` for a server whose draft cannot be changed, for settings that do not fit, and
    where another loop runs in the folder.
    """
    server = connect(config.url, config.model)
    if server.k == 0:
        raise UserError("drafts nothing", where=config.url, hint="serve it with a draft")
    ask_for_versions(config.changed_at)
    base = open_draft(config.draft)
    os.nice(config.niceness)
    port, cost = config.export_port, config.step_cost
    shown = WatchMetrics(port, step_cost=cost) if port else None
    with locked(config.out, "afaspec loop"):
        history = History(config.out)
        if not history.entries:  # what is counted from here on is so after a kill, too
            history.add(replace(history.last, at=time.time()))
        write_json(config.out / SETTINGS, config.model_dump(mode="json"))
        with Spans(config.out, server, config.every, shown) as spans:
            work = Work(config, target, base, server.k, stage, say)
            loop = Loop(config, work, history, spans)
            say(f"{server.url}: {history.last.state} ({history.last.words}); Ctrl-C ends")
            while True:
                step(loop)


def step(loop: Loop) -> None:
    """Do what the present state asks for, and go to the next. What fails is tried again, later and
    later, and given up in the end where that leaves things as they were."""
    state, tries = loop.history.last.state, loop.history.last.data.get("tries", 0)
    try:
        following, words, data = STATES[state](loop)
    except Exception as error:  # a loop outlives what goes wrong in a step, and says it
        words = f"{state} failed: {error if isinstance(error, UserError) else repr(error)}"
        tries += 1
        if tries >= loop.config.retries and state not in NEVER_GIVEN_UP:
            loop.go("watch", words, {"outcome": "failed"})
            return
        wait = min(LONGEST_WAIT, loop.config.retry_seconds * 2 ** min(tries - 1, 20))
        loop.go(state, f"{words}; tried again in {wait:.0f} s", {"tries": tries})
        loop.pause(wait)
        return
    new = state == "watch"
    loop.go(following, words, data, loop.cycle + 1 if new else None)


def watch(loop: Loop) -> Next:
    """Wait for a drop, or for rows enough."""
    config, began = loop.config, loop.began
    watching, version, seen = Watch(config.alpha), None, began
    as_it_was, rows_at = False, began
    while True:
        as_it_was = as_it_was or put_in_again(loop)
        for span in loop.spans.since(seen):
            seen = span.at
            if span.version is not None and span.version != version:
                watching, version = Watch(config.alpha), span.version
            if span.note:  # the server began anew, or is gone
                as_it_was = False
            watching.add_counts(span.drafts, span.accepted, span.counts)
            if fell := watching.dropped:
                recent = acceptance(loop.spans.since(span.at - RECENT * config.every))
                words = f"acceptance fell for {', '.join(fell)}"
                if watching.all.figures().baseline and recent:
                    words += f": {watching.all.figures().baseline:.2f} to {recent:.2f}"
                return "collect", words, cause(loop, span.at - RECENT * config.every)
        if config.after_rows and time.time() - rows_at >= RECENT * config.every:
            rows_at = time.time()
            if len(recent_rows(config, began)) >= min(config.after_rows, config.rows):
                return "collect", f"{config.after_rows:,} new rows", cause(loop, began)
        loop.pause(config.every)


def cause(loop: Loop, since: float) -> dict[str, Any]:
    """What a cycle begins with: rows since then, and the draft that serves."""
    serves = ask_for_versions(loop.config.changed_at)[-1]
    return {"since": since, "serves": serves["folder"]}


def put_in_again(loop: Loop) -> bool:
    """Where a server was started again with its first draft, put the one in that was kept. Is that
    known to serve? Not while the server does not answer."""
    kept = [entry for entry in loop.history.entries if entry.outcome == "kept"]
    if not kept:
        return True
    folder = Path(kept[-1].data["serves"])
    try:
        serves = ask_for_versions(loop.config.changed_at)
        if len(serves) == 1 and serves[-1]["sha256"] != read_draft(folder).sha256:
            loop.work.say(f"the server has started anew: {folder} is put in again")
            ask_for_change(loop.config.changed_at, folder, report=loop.work.say)
    except UserError as error:
        loop.work.say(f"{folder} is not put in again: {error}")
        return False
    return True


def collect(loop: Loop) -> Next:
    """Wait for rows of the new traffic."""
    config, since = loop.config, loop.found("since")
    while len(rows := recent_rows(config, since)) < config.least_rows:
        loop.work.stage("rows collected", len(rows), config.least_rows)
        loop.pause(config.every)
    write_rows(rows, loop.folder)
    return "trial", f"{len(rows):,} rows to learn from and to measure with", {}


def try_out(loop: Loop) -> Next:
    """See in a few steps whether adapting is worth it."""
    config = loop.config
    found = trial(loop.work, loop.folder, loop.begin_with())
    whole = found.seconds / found.steps * config.steps
    words = (
        f"{found.steps} steps took held-out acceptance from {found.base:.2f} to {found.length:.2f} "
        f"({found.gain:+.1%}), which at the same cost of a step is as much more tokens/s"
    )
    seen = [span for span in loop.spans.since(loop.found("since")) if span.tokens]
    if seen:
        speed = sum(span.tokens for span in seen) / sum(span.seconds for span in seen)
        words += f", {found.gain * speed:+.1f} at the present load"
    data = asdict(found)
    if found.gain < config.least_gain:
        words = f"not worth it: {words}; {config.least_gain:.1%} are asked"
        return "watch", words, {**data, "outcome": "not worth it"}
    words += f"; all {config.steps} steps take {whole / 60:.1f} min or so"
    if found.gain > 0:  # training as dear as serving nothing meanwhile
        paid = whole / found.gain / 60
        words += f", made up after {paid:,.0f} min of serving if they stop the server meanwhile"
    return "adapt", words, data


def train_it(loop: Loop) -> Next:
    """Train and merge."""
    new = adapt(loop.work, loop.folder, loop.begin_with())
    return "gate", f"{new.folder} is to be judged", {"new": str(new.folder.absolute())}


def judge_it(loop: Loop) -> Next:
    """Let the new draft pass, or not."""
    old, new = (read_draft(Path(loop.found(name))) for name in ("serves", "new"))
    verdict = judge(loop.work, loop.folder, old, new)
    data = {"gate": asdict(verdict)}
    if verdict.passed:
        return "swap", verdict.words, data
    return "watch", f"not served: {verdict.words}", {**data, "outcome": "gated out"}


def put_in(loop: Loop) -> Next:
    """Let it serve."""
    new = read_draft(Path(loop.found("new")))
    serves = ask_for_versions(loop.config.changed_at)[-1]
    if serves["sha256"] != new.sha256:
        serves = ask_for_change(loop.config.changed_at, new.folder, report=loop.work.say)
    number = serves["number"]
    since = loop.spans.since(loop.found("since"))  # of the traffic as it is now
    old = [(span.drafts, span.accepted) for span in since if span.drafts and span.version != number]
    words = f"version {number} serves ({serves['how']}, {serves['seconds']:.2f} s)"
    return "probation", words, {"version": number, "old_counts": old}


def hold_to_it(loop: Loop) -> Next:
    """Hold the new draft against the old one on live traffic."""
    config, number = loop.config, loop.found("version")
    new = read_draft(Path(loop.found("new")))
    old = [tuple(pair) for pair in loop.found("old_counts")]
    while True:
        versions = ask_for_versions(config.changed_at)
        if versions[-1]["sha256"] != new.sha256:
            if len(versions) == 1:
                return "swap", "the server has started anew with its first draft", {}
            folder = versions[-1]["folder"]
            return "watch", f"{folder} serves by now", {"outcome": "replaced"}
        spans = [span for span in loop.spans.since(loop.began) if span.version == number]
        found = probation(old, spans, config)
        if found is not None:
            words, stays = found
            if not stays:
                return "restore", words, {}
            return "watch", words, {"outcome": "kept", "serves": str(new.folder.absolute())}
        loop.work.stage("probation", sum(s.drafts > 0 for s in spans), config.probation)
        loop.pause(config.every)


def probation(
    old: list[tuple[int, int]], spans: list[Span], config: LoopConfig
) -> tuple[str, bool] | None:
    """In words what live traffic says of the new draft, and whether it stays; None: not yet.

    `old` has drafts and accepted tokens of the old draft's looks at the same traffic. With too few
    of them nothing can be held against the new draft, and the gate's word counts alone.
    """
    drafted = [span for span in spans if span.drafts]
    length = acceptance(spans)
    ended = len(drafted) >= config.probation or len(spans) >= MISSING_TIMES * config.probation
    if len(old) < OLD_LOOKS or sum(drafts for drafts, _ in old) < OLD_DRAFTS:
        words = f"too little of the old draft's traffic was seen to compare ({len(old)} looks)"
        return (words, True) if ended else None
    test = Drift(config.alpha, baseline_units=len(old), baseline_drafts=0)
    for drafts, accepted in old:
        test.add(drafts, accepted)
    for span in drafted:
        test.add(span.drafts, span.accepted)
    before = f"{test.baseline:.2f} with the old draft"
    if test.dropped:
        return f"live acceptance is {length:.2f}, {before}: beyond doubt worse", False
    if ended:
        now = f"{length:.2f}" if length else "unknown, as nothing was drafted"
        return f"live acceptance is {now}, {before}", True
    return None


def take_back(loop: Loop) -> Next:
    """Let the old draft serve again."""
    old = read_draft(Path(loop.found("serves")))
    serves = ask_for_versions(loop.config.changed_at)[-1]
    if serves["sha256"] != old.sha256:
        serves = ask_for_change(loop.config.changed_at, old.folder, report=loop.work.say)
    words = f"{old.folder} serves again, as version {serves['number']}"
    return "watch", words, {"outcome": "rolled back"}


STATES: dict[State, Callable[[Loop], Next]] = {
    "watch": watch,
    "collect": collect,
    "trial": try_out,
    "adapt": train_it,
    "gate": judge_it,
    "swap": put_in,
    "probation": hold_to_it,
    "restore": take_back,
}

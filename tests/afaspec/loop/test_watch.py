"""What a watch makes of a server's counters: spans, new drafts, restarts, silence, and a drop."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest

from afaspec.cli.live.watch import words
from afaspec.loop.watch import BASELINE, RECENT, Look, looks
from drafts.errors import UserError
from serving.metrics import ServerCounters, SpecCounters, server_counters

DRAFTS = 200  # a look


@dataclass
class Counted:
    """Counters as a server's page has them, a look further each time they are asked for."""

    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    chance: float = 0.5
    version: int | None = 1
    away: bool = False
    totals: list[int] = field(default_factory=lambda: [0, 0, 0, 0])
    tagged: dict[str, float] = field(default_factory=dict)  # chance by tag
    tags: dict[str, tuple[int, int]] = field(default_factory=dict)

    def counters(self) -> ServerCounters:
        if self.away:
            raise UserError("no server answers here")
        first = int(self.random.binomial(DRAFTS, self.chance))
        second = int(self.random.binomial(first, self.chance))
        for i, more in enumerate((8, DRAFTS, first, second)):
            self.totals[i] += more
        requests, drafts, *kept = self.totals
        spec = SpecCounters(drafts, 2 * drafts, sum(kept), tuple(kept))
        for tag, chance in self.tagged.items():
            drafted, accepted = self.tags.get(tag, (0, 0))
            more = int(self.random.binomial(DRAFTS, chance))
            self.tags[tag] = drafted + DRAFTS, accepted + more
        return ServerCounters(requests, drafts + sum(kept), spec, self.version, dict(self.tags))


def watched(server: Counted) -> Iterator[Look]:
    ticks = itertools.count(0.0, 5.0)
    return looks(server, 5.0, sleep=lambda _: None, clock=lambda: next(ticks))  # type: ignore[arg-type]


def test_figures_are_those_of_the_last_looks() -> None:
    server = Counted()
    seen = list(itertools.islice(watched(server), 60))
    assert [look.seconds for look in seen] == [5.0] * 60
    assert {look.requests for look in seen} == {8}
    assert seen[0].tokens_per_second == seen[0].tokens / 5
    assert seen[-1].all.recent == pytest.approx(1.75, abs=0.1)
    assert len(seen[-1].per_position) == 2
    assert seen[-1].per_position[0] == pytest.approx(0.5, abs=0.05)
    assert seen[BASELINE - 2].all.baseline is None
    assert seen[BASELINE].all.baseline == pytest.approx(1.75, abs=0.05)
    assert not any(look.dropped for look in seen)


def test_a_drop_is_called_and_a_new_draft_begins_anew() -> None:
    server = Counted()
    watch = watched(server)
    for _ in range(BASELINE + 20):
        assert not next(watch).dropped
    server.chance = 0.4
    late = list(itertools.islice(watch, 40))
    assert not late[0].dropped
    assert late[-1].dropped
    assert late[-1].all.drift >= 1
    server.version = 2
    look = next(watch)
    assert (look.version, look.note, look.dropped) == (2, "version 2 of the draft", [])
    assert look.all.recent is None
    assert look.all.drift == 0
    for _ in range(RECENT):
        look = next(watch)
    assert look.all.recent == pytest.approx(1.56, abs=0.1)
    assert look.all.baseline is None


def test_a_drop_of_one_tag_alone_is_called_by_its_name() -> None:
    server = Counted(tagged={"": 0.5, "a": 0.5, "b": 0.5})
    watch = watched(server)
    for _ in range(BASELINE + 20):
        look = next(watch)
    assert look.tags.keys() == {"a", "b"}
    assert look.dropped == []
    server.tagged["b"] = 0.35
    for _ in range(40):
        look = next(watch)
    assert look.dropped == ["b"]
    assert look.tags["a"].drift < 1
    assert "DROPPED for b" in words(look)


def test_a_server_may_go_away_and_come_back() -> None:
    server = Counted()
    watch = watched(server)
    next(watch)
    server.away = True
    look = next(watch)
    assert look.note.startswith("no server answers here")
    assert (look.requests, look.tokens) == (0, 0)
    server.away = False
    assert next(watch).requests == 8
    server.totals = [0, 0, 0, 0]
    look = next(watch)
    assert look.note == "the server has started anew"
    assert next(watch).requests == 8


def test_the_version_is_read_from_the_page() -> None:
    page = (
        'vllm:request_success_total{model_name="m"} 3\n'
        'vllm:generation_tokens_total{model_name="m"} 9\n'
        'afaspec:draft_version{draft="0123"} 4.0\n'
        'afaspec:spec_drafts_by_tag_total{route="/v1/completions",tag="a"} 5.0\n'
        'afaspec:spec_accepted_tokens_by_tag_total{route="/v1/completions",tag="a"} 3.0\n'
        'afaspec:spec_drafts_by_tag_total{route="/v1/chat/completions",tag="a"} 2.0\n'
    )
    found = server_counters(page, ("m",))
    assert found is not None
    assert found.draft_version == 4
    assert found.tags == {"a": (7, 3)}
    without = server_counters(page[: page.index("afaspec")])
    assert without is not None
    assert without.draft_version is None

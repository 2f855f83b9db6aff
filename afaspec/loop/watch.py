"""Looking at a running server again and again: is its draft accepted as it was?"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from bench.stats.drift import Drift
from drafts.errors import UserError
from serving.metrics import ServerCounters
from serving.remote import RemoteServer

RECENT = 12  # looks that the recent figures are of
BASELINE = 40  # looks with drafts that make the baseline, at least


@dataclass(frozen=True)
class Figures:
    """Of all requests, or of those with one tag. Acceptance lengths are None where nothing was
    drafted: `recent` is that of the last looks, `baseline` that of the draft's first traffic, once
    that is enough. `drift` passes 1 where acceptance fell (`bench.stats.drift`)."""

    recent: float | None
    baseline: float | None
    drift: float
    dropped: bool


@dataclass(frozen=True)
class Look:
    """What a look found. `seconds` is the span since the last one, `at` the time (Unix).

    `requests`, `tokens`, `drafts` and `accepted` tokens are of that span, `counts` the last two by
    tag; `per_position` is the share of drafts whose token at each position was kept, of the last
    looks. `answered` is false where the server did not; `note` says what stands in the way of a
    figure.
    """

    at: float
    seconds: float
    requests: int
    tokens: int
    drafts: int
    accepted: int
    counts: dict[str, tuple[int, int]]
    per_position: tuple[float, ...]
    all: Figures
    tags: dict[str, Figures]
    version: int | None
    answered: bool = True
    note: str = ""

    @property
    def tokens_per_second(self) -> float:
        """That the server wrote since the last look."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def dropped(self) -> list[str]:
        """Whose acceptance fell: tags, and `all requests`."""
        found = ["all requests"] if self.all.dropped else []
        return found + [tag for tag, figures in self.tags.items() if figures.dropped]


class Series:
    """Units of one kind of requests, as they come."""

    def __init__(self, alpha: float):
        self._test = Drift(alpha, BASELINE)
        self._recent: deque[tuple[int, int]] = deque(maxlen=RECENT)

    def add(self, drafts: int, accepted: int) -> None:
        """A span's counts."""
        self._recent.append((drafts, accepted))
        self._test.add(drafts, accepted)

    def figures(self) -> Figures:
        """What they say so far."""
        drafts, accepted = (sum(column) for column in zip((0, 0), *self._recent, strict=True))
        recent = 1 + accepted / drafts if drafts else None
        test = self._test
        return Figures(recent, test.baseline, test.statistic, test.dropped)


class Watch:
    """What is known of the running draft. The chance of a call in vain is shared out: half of it is
    for all requests together, the rest for tags, each later one less."""

    def __init__(self, alpha: float):
        self.alpha = alpha
        self.all = Series(alpha / 2)
        self.tags: dict[str, Series] = {}
        self.spans: deque[ServerCounters] = deque(maxlen=RECENT)

    def add(self, span: ServerCounters) -> None:
        """Counts since the last look."""
        self.spans.append(span)
        self.add_counts(span.spec.drafts, span.spec.accepted_tokens, span.tags)

    def add_counts(self, drafts: int, accepted: int, tags: Mapping[str, tuple[int, int]]) -> None:
        """The same, of drafts and accepted tokens alone; `tags` has them by tag."""
        self.all.add(drafts, accepted)
        for tag, counts in tags.items():
            if tag and tag not in self.tags:
                place = len(self.tags) + 1
                self.tags[tag] = Series(self.alpha / 2 / (place * (place + 1)))
            if tag:
                self.tags[tag].add(*counts)

    @property
    def dropped(self) -> list[str]:
        """Whose acceptance fell: tags, and `all requests`."""
        found = ["all requests"] if self.all.figures().dropped else []
        return found + [tag for tag, series in self.tags.items() if series.figures().dropped]

    def per_position(self) -> tuple[float, ...]:
        """Shares of the last looks' drafts."""
        drafts = sum(one.spec.drafts for one in self.spans)
        columns = zip(*(one.spec.accepted_per_position for one in self.spans), strict=False)
        return tuple(sum(column) / drafts for column in columns) if drafts else ()


def looks(
    server: RemoteServer,
    every: float,
    alpha: float = 0.05,
    *,
    sleep: Callable[[float], object] = time.sleep,
    clock: Callable[[], float] = time.time,
) -> Iterator[Look]:
    """A look every so many seconds, without end.

    The test begins anew where the draft's version changes or the server's counters begin anew. A
    server that does not answer is looked at again.
    """
    watch, last, then = Watch(alpha), server.counters(), clock()
    while True:
        sleep(every)
        now, note, span = clock(), "", None
        try:
            found = server.counters()
        except UserError as error:
            found, note = last, str(error)
        else:
            if found.requests < last.requests or found.spec.drafts < last.spec.drafts:
                note = "the server has started anew"
            elif found.draft_version != last.draft_version:
                note = f"version {found.draft_version} of the draft"
            if note:
                watch = Watch(alpha)
            else:
                watch.add(span := found - last)
        yield Look(
            at=now,
            seconds=now - then,
            requests=span.requests if span else 0,
            tokens=span.tokens if span else 0,
            drafts=span.spec.drafts if span else 0,
            accepted=span.spec.accepted_tokens if span else 0,
            counts=dict(span.tags) if span else {},
            per_position=watch.per_position(),
            all=watch.all.figures(),
            tags={tag: series.figures() for tag, series in watch.tags.items()},
            version=found.draft_version,
            answered=found is not last,
            note=note,
        )
        if found is not last:
            last, then = found, now

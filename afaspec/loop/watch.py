"""Looking at a running server again and again: is its draft accepted as it was?"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from bench.stats.drift import Drift
from drafts.errors import UserError
from serving.metrics import ServerCounters
from serving.remote import RemoteServer

RECENT = 12  # looks that the recent figures are of
BASELINE = 40  # looks with drafts that make the baseline, at least


@dataclass(frozen=True)
class Look:
    """What a look found. `seconds` is the span since the last one, `at` the time (Unix).

    Acceptance lengths are None where nothing was drafted: `recent` is that of the last looks,
    `baseline` that of the draft's first traffic, once that is enough. `drift` passes 1 where
    acceptance fell (`bench.stats.drift`). `note` says what stands in the way of a figure.
    """

    at: float
    seconds: float
    requests: int
    tokens: int
    drafts: int
    per_position: tuple[float, ...]
    recent: float | None
    baseline: float | None
    drift: float
    dropped: bool
    version: int | None
    note: str = ""

    @property
    def tokens_per_second(self) -> float:
        """That the server wrote since the last look."""
        return self.tokens / self.seconds if self.seconds else 0.0


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
    test, spans = Drift(alpha, BASELINE), deque[ServerCounters](maxlen=RECENT)
    last, then = server.counters(), clock()
    while True:
        sleep(every)
        now = clock()
        try:
            found = server.counters()
        except UserError as error:
            yield _look(now, now - then, None, spans, test, last.draft_version, str(error))
            continue
        note = ""
        if found.requests < last.requests or found.spec.drafts < last.spec.drafts:
            note, last = "the server has started anew", found
        if found.draft_version != last.draft_version:
            note = f"version {found.draft_version} of the draft"
        span = found - last
        if note:
            test, spans = Drift(alpha, BASELINE), deque(maxlen=RECENT)
        else:
            spans.append(span)
            test.add(span.spec.drafts, span.spec.accepted_tokens)
        yield _look(now, now - then, span, spans, test, found.draft_version, note)
        last, then = found, now


def _look(
    at: float,
    seconds: float,
    span: ServerCounters | None,
    spans: deque[ServerCounters],
    test: Drift,
    version: int | None,
    note: str,
) -> Look:
    drafts = sum(one.spec.drafts for one in spans)
    accepted = sum(one.spec.accepted_tokens for one in spans)
    positions = zip(*(one.spec.accepted_per_position for one in spans), strict=False)
    return Look(
        at=at,
        seconds=seconds,
        requests=span.requests if span else 0,
        tokens=span.tokens if span else 0,
        drafts=span.spec.drafts if span else 0,
        per_position=tuple(sum(column) / drafts for column in positions) if drafts else (),
        recent=1 + accepted / drafts if drafts else None,
        baseline=test.baseline,
        drift=test.statistic,
        dropped=test.dropped,
        version=version,
        note=note,
    )

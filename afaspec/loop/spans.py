"""Looking at the server all the time, whatever else the loop does."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from afaspec.loop.metrics import WatchMetrics
from afaspec.loop.watch import Look, looks
from serving.remote import RemoteServer

FILE = "looks.jsonl"


@dataclass(frozen=True)
class Span:
    """What one look saw: counts of the `seconds` before `at`; `counts` has drafts and accepted
    tokens by tag. `version` is that of the draft, None where the server did not say."""

    at: float
    seconds: float
    requests: int
    tokens: int
    drafts: int
    accepted: int
    counts: dict[str, tuple[int, int]]
    version: int | None
    note: str


class Spans:
    """A thread that looks and writes a line a look. Use it as a context manager."""

    def __init__(
        self, folder: Path, server: RemoteServer, every: float, shown: WatchMetrics | None = None
    ):
        self.path, self._server, self._every, self._shown = folder / FILE, server, every, shown
        self._spans = list(read_spans(folder))
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Spans:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(timeout=5)

    def since(self, at: float) -> list[Span]:
        """Those that ended after `at`, the oldest first."""
        found = []
        for span in reversed(self._spans):
            if span.at <= at:
                break
            found.append(span)
        return found[::-1]

    def _run(self) -> None:
        for look in looks(self._server, self._every, sleep=self._over.wait):
            if self._over.is_set():
                return
            span = span_of(look)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(span)) + "\n")
            self._spans.append(span)
            if self._shown:
                self._shown.show(look)


def span_of(look: Look) -> Span:
    """The counts of a look."""
    return Span(
        look.at, look.seconds, look.requests, look.tokens, look.drafts, look.accepted,
        look.counts, look.version, look.note,
    )  # fmt: skip


def read_spans(folder: Path) -> Iterator[Span]:
    """Those of a loop's folder; a line that a kill cut is passed over."""
    path = folder / FILE
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            yield Span(**json.loads(line))
        except (ValueError, TypeError):
            continue


def acceptance(spans: list[Span]) -> float | None:
    """The acceptance length of some spans; None where nothing was drafted."""
    drafts = sum(span.drafts for span in spans)
    return 1 + sum(span.accepted for span in spans) / drafts if drafts else None

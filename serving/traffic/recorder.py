"""Chooses which requests are kept, and keeps them in a thread of its own: no answer waits for a
disk."""

from __future__ import annotations

import json
import logging
import os
import queue
import random
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prometheus_client import Counter

from serving.traffic.exchange import OPT_OUT, ROUTES, TAG, Exchange, row_of
from serving.traffic.redact import make_redactor, redacted
from serving.traffic.shards import KEY, Limits, Traffic, now

SETTINGS = "AFASPEC_COLLECT"  # in the environment of a server that collects: these settings as JSON
WAITING = 1000  # exchanges that may wait for the disk; more are let go, and counted
BATCH = 64
TEXTS = ("request", "response", "tag")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CollectSettings:
    """What is kept of the traffic, and where. `rate` is the share of requests.

    `redact` are regular expressions, `redact_function` is `module:name`; `ids_only` keeps token
    ids in place of texts. The key, if any, stands in the environment.
    """

    folder: str
    rate: float = 0.1
    max_mib: float = 1024.0
    max_days: float = 30.0
    redact: tuple[str, ...] = ()
    redact_function: str | None = None
    ids_only: bool = False

    def as_environment(self) -> dict[str, str]:
        """For the process that collects."""
        return {SETTINGS: json.dumps(asdict(self))}

    @classmethod
    def from_environment(cls) -> CollectSettings:
        """What `as_environment` has put there."""
        found = json.loads(os.environ[SETTINGS])
        return cls(**found | {"redact": tuple(found["redact"])})


def check_settings(settings: CollectSettings) -> None:
    """Raise `UserError` for settings that cannot be followed, before a server is started."""
    make_redactor(settings.redact, settings.redact_function)
    Traffic(Path(settings.folder), key=os.environ.get(KEY))


class Recorder:
    """Opened once a process. `close` waits until all is on disk."""

    def __init__(self, settings: CollectSettings):
        """Raises `UserError` for settings that cannot be followed."""
        self.settings = settings
        self._redact = make_redactor(settings.redact, settings.redact_function)
        limits = Limits(settings.max_mib, settings.max_days)
        self._traffic = Traffic(Path(settings.folder), limits, os.environ.get(KEY))
        self._waiting: queue.Queue[Exchange | None] = queue.Queue(WAITING)
        self.kept = Counter("afaspec:traffic_kept", "Requests kept.")
        self.lost = Counter("afaspec:traffic_lost", "Requests chosen but not kept.", ["reason"])
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()

    def begin(self, method: str, path: str, headers: Mapping[str, str]) -> Exchange | None:
        """An exchange to fill while it passes; None for one that is not kept."""
        route = next((route for route in ROUTES if path.endswith(route)), None)
        if method != "POST" or route is None or headers.get(OPT_OUT, "").lower() == "no":
            return None
        if random.random() >= self.settings.rate:
            return None
        return Exchange(route, now(), tag=headers.get(TAG))

    def end(self, exchange: Exchange) -> None:
        """Keep a finished exchange, or let it go where too many wait."""
        try:
            self._waiting.put_nowait(exchange)
        except queue.Full:
            self.lost.labels(reason="disk too slow").inc()

    def close(self) -> None:
        """Write what waits, and end."""
        self._waiting.put(None)
        self._thread.join()

    def _write(self) -> None:
        more = True
        while more:
            batch = [self._waiting.get()]
            while len(batch) < BATCH and not self._waiting.empty():
                batch.append(self._waiting.get())
            more = None not in batch
            rows = [row for one in batch if one is not None and (row := self._row(one))]
            if rows:
                try:
                    self._traffic.append(rows)
                    self.kept.inc(len(rows))
                except Exception as error:  # a full disk must not end the server
                    logger.error("afaspec keeps no traffic: %s", error)
                    self.lost.labels(reason="not written").inc(len(rows))

    def _row(self, exchange: Exchange) -> dict[str, Any] | None:
        row = row_of(exchange, ids_only=self.settings.ids_only)
        if row is None:
            self.lost.labels(reason="not complete").inc()
            return None
        if self._redact is not None:
            try:
                texts = {name: redacted(row[name], self._redact) for name in TEXTS if name in row}
            except Exception as error:  # a function of the user's; nothing is kept unredacted
                logger.error("afaspec cannot redact: %s", type(error).__name__)
                self.lost.labels(reason="not redacted").inc()
                return None
            row |= texts
        return row

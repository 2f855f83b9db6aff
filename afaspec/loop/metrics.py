"""What a watch finds, as Prometheus metrics of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import CollectorRegistry, Gauge, generate_latest

from afaspec.loop.watch import Look

PLAIN = "text/plain; version=0.0.4; charset=utf-8"


class WatchMetrics:
    """Gauges on a page of their own, at `port` of `host`.

    `step_cost` is what a step with drafts costs in steps without: the acceptance length of a bench
    over its speedup. With it, today's acceptance gives an estimate of today's speedup.
    """

    def __init__(self, port: int, host: str = "127.0.0.1", step_cost: float | None = None):
        """Raises `OSError` where it cannot listen."""
        self.step_cost = step_cost
        registry = CollectorRegistry()

        def gauge(name: str, text: str, labels: tuple[str, ...] = ()) -> Gauge:
            return Gauge(f"afaspec:{name}", text, labels, registry=registry)

        of = ("tag",)  # none: all requests
        self.length = gauge("acceptance_length", "Tokens a target step, of the last looks.", of)
        self.baseline = gauge("acceptance_length_baseline", "That of the first traffic.", of)
        self.position = gauge(
            "acceptance_per_position", "Share of drafts whose token was kept.", ("position",)
        )
        self.drift = gauge("drift_statistic", "A drop of acceptance is called at 1.", of)
        self.dropped = gauge("drift_called", "1 where a drop is called.", of)
        self.speed = gauge("tokens_per_second", "Tokens that the server writes.")
        self.version = gauge("watched_draft_version", "Version of the draft, where it has one.")
        self.looked = gauge("looked_at_seconds", "When the counters were last read (Unix time).")
        if step_cost is not None:
            self.speedup = gauge("speedup_estimated", "Acceptance length over a step's cost.")
        serve_page(registry, port, host)

    def show(self, look: Look) -> None:
        """Set all of them."""
        for tag, figures in {"": look.all, **look.tags}.items():
            if figures.recent is not None:
                self.length.labels(tag=tag).set(figures.recent)
            if figures.baseline is not None:
                self.baseline.labels(tag=tag).set(figures.baseline)
            self.drift.labels(tag=tag).set(figures.drift)
            self.dropped.labels(tag=tag).set(figures.dropped)
        for position, share in enumerate(look.per_position):
            self.position.labels(position=str(position)).set(share)
        self.speed.set(look.tokens_per_second)
        if look.answered:
            self.looked.set(look.at)
        if self.step_cost is not None and look.all.recent is not None:
            self.speedup.set(look.all.recent / self.step_cost)
        if look.version is not None:
            self.version.set(look.version)


class _Silent(WSGIRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


def serve_page(registry: CollectorRegistry, port: int, host: str = "127.0.0.1") -> None:
    """Show a registry's metrics, from a thread that ends with the process.

    Always as plain text, as vLLM does: in the format that Prometheus would rather have,
    prometheus_client writes `afaspec_` for `afaspec:`. Raises `OSError` where it cannot listen.
    """

    def page(_: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        start("200 OK", [("Content-Type", PLAIN)])
        return [generate_latest(registry)]

    server = make_server(host, port, page, handler_class=_Silent)
    threading.Thread(target=server.serve_forever, daemon=True).start()

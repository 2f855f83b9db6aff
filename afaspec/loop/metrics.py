"""What a watch finds, as Prometheus metrics of its own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Gauge, start_http_server

from afaspec.loop.watch import Look


class WatchMetrics:
    """Gauges on a page of their own, at `port` of `host`."""

    def __init__(self, port: int, host: str = "127.0.0.1"):
        """Raises `OSError` where it cannot listen."""
        registry = CollectorRegistry()

        def gauge(name: str, text: str, labels: tuple[str, ...] = ()) -> Gauge:
            return Gauge(f"afaspec:{name}", text, labels, registry=registry)

        self.length = gauge("acceptance_length", "Tokens a target step, of the last looks.")
        self.baseline = gauge("acceptance_length_baseline", "That of the draft's first traffic.")
        self.position = gauge(
            "acceptance_per_position", "Share of drafts whose token was kept.", ("position",)
        )
        self.drift = gauge("drift_statistic", "A drop of acceptance is called at 1.")
        self.dropped = gauge("drift_called", "1 where a drop is called.")
        self.speed = gauge("tokens_per_second", "Tokens that the server writes.")
        self.version = gauge("watched_draft_version", "Version of the draft, where it has one.")
        start_http_server(port, host, registry)

    def show(self, look: Look) -> None:
        """Set all of them."""
        if look.recent is not None:
            self.length.set(look.recent)
        if look.baseline is not None:
            self.baseline.set(look.baseline)
        for position, share in enumerate(look.per_position):
            self.position.labels(position=str(position)).set(share)
        self.drift.set(look.drift)
        self.dropped.set(look.dropped)
        self.speed.set(look.tokens_per_second)
        if look.version is not None:
            self.version.set(look.version)

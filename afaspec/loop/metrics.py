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
        start_http_server(port, host, registry)

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
        if look.version is not None:
            self.version.set(look.version)

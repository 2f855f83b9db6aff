"""Acceptance by route and tag, inside vLLM's server: each finished request is counted on /metrics.

vLLM counts per request where it is asked to (`--per-request-spec-decode-metrics`), but tells only
the request's own client. Here the engine's outputs are looked at as they pass.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import aclosing
from contextvars import ContextVar
from typing import Any

from prometheus_client import Counter

from serving.traffic.exchange import LONGEST_TAG, ROUTES, TAG

MIDDLEWARE = "serving.traffic.acceptance.AcceptanceByTag"
REQUESTS, DRAFTS, ACCEPTED = (
    f"afaspec:{name}_by_tag" for name in ("requests", "spec_drafts", "spec_accepted_tokens")
)
MOST_TAGS = 100  # whoever asks chooses the tag, and each one is a series for ever
OTHER = "other"

Message = MutableMapping[str, Any]
App = Callable[[Message, Any, Any], Awaitable[None]]
asked: ContextVar[tuple[str, str] | None] = ContextVar("asked", default=None)  # route and tag


class AcceptanceByTag:
    """The ASGI middleware."""

    def __init__(self, app: App):
        self.app = app
        labels = ["route", "tag"]
        self.requests = Counter(REQUESTS, "Requests that ended.", labels)
        self.drafts = Counter(DRAFTS, "Speculative steps of requests that ended.", labels)
        self.accepted = Counter(ACCEPTED, "Drafted tokens that were kept.", labels)
        self._tags: set[str] = set()

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            look_at(scope["app"].state.engine_client, self._count)
        elif scope["type"] == "http":
            route = next((one for one in ROUTES if scope["path"].endswith(one)), None)
            asked.set((route, self._tag(scope["headers"])) if route else None)
        await self.app(scope, receive, send)

    def _tag(self, headers: Any) -> str:
        given = dict(headers).get(TAG.encode(), b"").decode("latin-1")[:LONGEST_TAG]
        if given not in self._tags and len(self._tags) >= MOST_TAGS:
            return OTHER
        self._tags.add(given)
        return given

    def _count(self, output: Any) -> None:
        now = asked.get()
        if now is None:
            return
        for made in output.outputs:
            counted = getattr(made, "spec_decode_metrics", None)
            self.requests.labels(*now).inc()
            if counted is not None:
                histogram = counted.histogram
                self.drafts.labels(*now).inc(sum(histogram))
                self.accepted.labels(*now).inc(sum(i * n for i, n in enumerate(histogram)))


def look_at(engine: Any, count: Callable[[Any], None]) -> None:
    """Have `count` see each finished output of the engine, on its way to who asked for it."""
    original = engine.generate

    async def generate(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        async with aclosing(original(*args, **kwargs)) as outputs:  # closed where a client leaves
            async for output in outputs:
                if output.finished:
                    count(output)
                yield output

    engine.generate = generate

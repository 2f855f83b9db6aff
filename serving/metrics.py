"""vLLM's counters of speculative decoding, from an engine or from a server's /metrics page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

PREFIX = "vllm:spec_decode_num_"
POSITIONS = "accepted_tokens_per_pos"
REQUESTS = "vllm:request_success_total"
TOKENS = "vllm:generation_tokens_total"
MODEL = "model_name"  # the label
DRAFT_VERSION = "afaspec:draft_version"  # of a server whose draft can be changed
BY_TAG = ("afaspec:spec_drafts_by_tag_total", "afaspec:spec_accepted_tokens_by_tag_total")


@dataclass(frozen=True)
class SpecCounters:
    """Counts since the start of the engine, summed over its replicas; subtract two for a span.

    `drafts` counts speculative steps; `accepted_per_position[i]` those whose token i was kept.
    """

    drafts: int
    draft_tokens: int
    accepted_tokens: int
    accepted_per_position: tuple[int, ...]

    def __sub__(self, earlier: SpecCounters) -> SpecCounters:
        pairs = zip_longest(self.accepted_per_position, earlier.accepted_per_position, fillvalue=0)
        return SpecCounters(
            self.drafts - earlier.drafts,
            self.draft_tokens - earlier.draft_tokens,
            self.accepted_tokens - earlier.accepted_tokens,
            tuple(after - before for after, before in pairs),
        )


@dataclass(frozen=True)
class ServerCounters:
    """Counts since the start of a server; subtract two for a span.

    `requests` counts those that ended (with success or aborted), `tokens` those written.
    `draft_version` is no count: it is that of the running draft, where the server says it. `tags`
    has drafts and accepted tokens by the tag of the request, where the server counts so.
    """

    requests: int
    tokens: int
    spec: SpecCounters
    draft_version: int | None = None
    tags: Mapping[str, tuple[int, int]] = field(default_factory=dict, hash=False)

    def __sub__(self, earlier: ServerCounters) -> ServerCounters:
        return ServerCounters(
            self.requests - earlier.requests,
            self.tokens - earlier.tokens,
            self.spec - earlier.spec,
            self.draft_version,
            {
                tag: (drafts - before[0], accepted - before[1])
                for tag, (drafts, accepted) in self.tags.items()
                for before in [earlier.tags.get(tag, (0, 0))]
            },
        )


def counters_from_engine(llm: Any) -> SpecCounters:
    """Counters of a `vllm.LLM`, which must have been made with `disable_log_stats=False`."""
    samples = []
    for metric in llm.get_metrics():
        if metric.name.startswith(PREFIX):
            name = metric.name.removeprefix(PREFIX)
            values = metric.values if name == POSITIONS else [metric.value]
            samples += [(name, position, value) for position, value in enumerate(values)]
    return _sum(samples)


def counters_from_prometheus(text: str, models: Sequence[str] = ()) -> SpecCounters:
    """Counters from the text of a server's /metrics page; all zero without speculation.

    Those of `models` alone, where any are named.
    """
    samples = []
    for name, labels, value in _samples(text, models):
        if name.startswith(PREFIX) and name.endswith("_total"):
            counter = name.removeprefix(PREFIX).removesuffix("_total")
            samples.append((counter, int(labels.get("position", 0)), value))
    return _sum(samples)


def server_counters(text: str, models: Sequence[str] = ()) -> ServerCounters | None:
    """All counters that a server's /metrics page has; None where vLLM's are not on it.

    Those of `models` alone, where any are named.
    """
    totals: dict[str, float] = {}
    tags: dict[str, list[int]] = {}
    for name, labels, value in _samples(text, models):
        totals[name] = totals.get(name, 0) + value
        if name in BY_TAG:
            tags.setdefault(labels["tag"], [0, 0])[BY_TAG.index(name)] += int(value)
    if REQUESTS not in totals or TOKENS not in totals:
        return None
    version = totals.get(DRAFT_VERSION)
    return ServerCounters(
        int(totals[REQUESTS]),
        int(totals[TOKENS]),
        counters_from_prometheus(text, models),
        None if version is None else int(version),
        {tag: (drafts, accepted) for tag, (drafts, accepted) in tags.items()},
    )


def _samples(text: str, models: Sequence[str]) -> list[tuple[str, dict[str, str], float]]:
    """Name, labels and value of every sample on the page; none where it is not such a page.

    One page may count several models (a router's), each under its own label; samples without one
    count for all.
    """
    from prometheus_client.parser import text_string_to_metric_families

    try:
        return [
            (sample.name, sample.labels, sample.value)
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if not models or sample.labels.get(MODEL, models[0]) in models
        ]
    except (ValueError, KeyError, IndexError):  # HTML, for one
        return []


def counters_from_histogram(histogram: Sequence[int], draft_tokens: int) -> SpecCounters:
    """Counters of one request; entry j of its histogram counts the steps that accepted j tokens."""
    per_position = tuple(sum(histogram[i + 1 :]) for i in range(len(histogram) - 1))
    return SpecCounters(sum(histogram), draft_tokens, sum(per_position), per_position)


def _sum(samples: Iterable[tuple[str, int, float]]) -> SpecCounters:
    """Add up (name, position, value) samples of all replicas."""
    totals: Counter[tuple[str, int]] = Counter()
    for name, position, value in samples:
        totals[name, position] += int(value)
    return SpecCounters(
        totals["drafts", 0],
        totals["draft_tokens", 0],
        totals["accepted_tokens", 0],
        tuple(count for (name, _), count in sorted(totals.items()) if name == POSITIONS),
    )


def sum_counters(counters: list[SpecCounters]) -> SpecCounters | None:
    """The sum of several requests' counters; None for an empty list."""
    if not counters:
        return None
    positions = zip(*(c.accepted_per_position for c in counters), strict=True)
    return SpecCounters(
        sum(c.drafts for c in counters),
        sum(c.draft_tokens for c in counters),
        sum(c.accepted_tokens for c in counters),
        tuple(sum(column) for column in positions),
    )

"""What a reader of a server run's figures should know before he trusts them."""

from __future__ import annotations

from bench.server.measure import LoadRun
from bench.stats.latency import arrival_figures, client_figures, latencies
from serving.metrics import sum_counters

LATE_SHARE = 0.02  # of the mean latency: a client later than that measures itself
BUSY_SHARE = 0.02  # of a request's time: what one request alone may wait for the client
# Of the core that the client has: with many requests at once each has a small share of it, and
# still waits while the client is busy with the others.
BUSY_CORE = 0.5
SLOWDOWN = 1.5  # of the last third of the requests: a queue grows
DRAIN = 0.25  # of the time, after the last request was sent


def warnings_of(run: LoadRun) -> list[str]:
    """Sentences about failed requests, uncounted tokens, other traffic and a slow client."""
    found = [
        *_failures(run), *_repeats(run), *_counting(run), *_other_traffic(run), *_arrivals(run),
        *_client(run),
    ]  # fmt: skip
    where = f"{run.name} at {run.load.words}"
    return [f"{where}: {sentence}" for sentence in found]


def _failures(run: LoadRun) -> list[str]:
    errors = [answer.error for answer in run.answers if answer.error]
    if not errors:
        return []
    return [f"{len(errors)} of {len(run.answers)} requests failed; the first: {errors[0]}"]


def _repeats(run: LoadRun) -> list[str]:
    found = []
    if run.again:
        turns = "a turn was" if run.again == 1 else f"{run.again} turns were"
        found.append(f"the server went away meanwhile; {turns} asked again, without a warm-up")
    if retried := sum(answer.retried > 0 for answer in run.answers):
        found.append(
            f"{retried} of {len(run.answers)} requests were refused at first and sent again; their "
            "times count from the first attempt"
        )
    return found


def _arrivals(run: LoadRun) -> list[str]:
    """Open loops that were not what was asked for, or more than the server can do."""
    if not run.load.is_paced or run.load.rate is None:
        return []
    found, seen = [], arrival_figures(run.blocks, run.load.rate)
    if seen["slowdown"] is not None and seen["slowdown"] > SLOWDOWN:
        found.append(
            f"the server does not keep up: the last third of the requests took "
            f"{seen['slowdown']:.1f} times as long as the first, and more of them would take longer"
        )
    if seen["drain"] > DRAIN:
        found.append(
            f"{100 * seen['drain']:.0f}% of the time no request arrived any more; give more "
            "--requests for figures under load"
        )
    return found


def _counting(run: LoadRun) -> list[str]:
    by_text = sum(answer.counted_by == "tokenizer" for answer in run.good)
    if not by_text:
        return []
    return [
        f"the server does not say how many tokens it wrote; those of {by_text} answers were "
        "counted by tokenising their text again, which can be off by a few"
    ]


def _other_traffic(run: LoadRun) -> list[str]:
    """Counters of the server that do not match what was asked of it."""
    good = run.good
    if not run.server.counted:
        return []
    ended = sum(spent.requests for spent in run.spent)
    written = sum(spent.tokens for spent in run.spent)
    if len(good) < len(run.answers):
        return []  # failed requests may have been counted
    if ended != len(good):
        return [
            f"the server ended {ended} requests, of which {len(good)} were ours; other traffic "
            "is in its counters and in the latencies"
        ]
    tokens = sum(answer.tokens for answer in good)
    if written != tokens:
        return [f"the server counts {written} tokens, its answers had {tokens}"]
    by_request = [answer.counters for answer in good if answer.counters is not None]
    ours = sum_counters(by_request)
    server = sum_counters([spent.spec for spent in run.spent])
    if run.k and len(by_request) == len(good) and ours != server:
        return [f"the server's counters {server} are not the sum over the answers {ours}"]
    return []


def _client(run: LoadRun) -> list[str]:
    figures, e2e = client_figures(run.blocks), latencies(run.answers).e2e
    found = []
    if len(e2e) and figures["send_lag_ms"]["p99"] > 1000 * LATE_SHARE * e2e.mean():
        found.append(f"requests were sent late (p99 {figures['send_lag_ms']['p99']:.1f} ms)")
    if (share := figures["cpu_share_of_request"]) is not None and share > BUSY_SHARE:
        found.append(f"this client spent {100 * share:.1f}% of each request's time on computing")
    if (share := figures["cpu_share_of_core"]) > BUSY_CORE:
        found.append(
            f"this client was busy {100 * share:.0f}% of the time, and requests wait for it"
        )
    return found

"""Latencies of streamed answers, by the definitions of `vllm bench serve`.

TTFT: until the first piece with tokens (TTFA: of the answer, behind any reasoning). E2E: until the
last one. TPOT: (E2E - TTFT) over the tokens
after the first, one value a request. ITL: between one piece and the next; with speculation a piece
has several tokens and still counts once. Unlike there, all start when the request should have been
sent, which under open load may be before it was (the difference is the send lag).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.records.run import Answer, Block
from bench.stats.resample import spread

Seconds = NDArray[np.float64]
THIRD_AT_LEAST = 4  # requests of a block, to say that the last took longer than the first


@dataclass(frozen=True, eq=False)
class Latencies:
    """In seconds, over the requests that succeeded; `tpot` only of those with two tokens or more.

    `ttft`, `ttfa`, `e2e` [requests]; `itl` [pieces after the first, of all requests]. `ttfa` is
    until the first piece of the answer, and empty where no answer had reasoning before it.
    """

    ttft: Seconds
    ttfa: Seconds
    tpot: Seconds
    itl: Seconds
    e2e: Seconds


def latencies(answers: Sequence[Answer]) -> Latencies:
    """The latencies of all answers that did not fail."""
    good = [answer for answer in answers if answer.error is None]
    return Latencies(
        ttft=np.array([answer.ttft for answer in good]),
        ttfa=_until_answers(good),
        tpot=np.array([(a.e2e - a.ttft) / (a.tokens - 1) for a in good if a.tokens > 1]),
        itl=np.concatenate([np.diff(a.chunks) for a in good]) if good else np.array([]),
        e2e=np.array([answer.e2e for answer in good]),
    )


def _until_answers(good: Sequence[Answer]) -> Seconds:
    """Until the answer behind the reasoning; one that never came is in nothing."""
    came = [a for a in good if a.answered is not None]
    if all(a.answered == a.chunks[0] for a in came) and len(came) == len(good):
        return np.array([])
    return np.array([a.answered - a.intended for a in came if a.answered is not None])


def latency_figures(answers: Sequence[Answer]) -> dict[str, Any]:
    """The report's `latency`: mean and percentiles in ms, and how many requests there were."""
    found = vars(latencies(answers))
    return {
        **{f"{kind}_ms": spread(1000 * seconds) for kind, seconds in found.items()},
        "requests": len(answers),
        "failed": sum(answer.error is not None for answer in answers),
    }


def goodput_figures(blocks: Sequence[Block], limits: Mapping[str, float]) -> dict[str, Any]:
    """Requests that kept within all `limits` (ms by latency): their share of all, and a second.

    A failed request keeps none; one token alone has no TPOT, and one without reasoning its TTFT as
    TTFA.
    """
    answers = [answer for block in blocks for answer in block.answers]
    kept = sum(_within(answer, limits) for answer in answers)
    return {
        "slo_ms": dict(limits),
        "share": kept / len(answers),
        "requests_per_second": kept / sum(block.wall_seconds for block in blocks),
    }


def _within(answer: Answer, limits: Mapping[str, float]) -> bool:
    if answer.error is not None:
        return False
    answered = answer.chunks[0] if answer.answered is None else answer.answered
    seconds = {
        "ttft": answer.ttft,
        "ttfa": answered - answer.intended,
        "tpot": (answer.e2e - answer.ttft) / max(1, answer.tokens - 1),
        "e2e": answer.e2e,
    }
    return all(1000 * seconds[name] <= limit for name, limit in limits.items())


def arrival_figures(blocks: Sequence[Block], rate: float) -> dict[str, Any]:
    """Whether an open loop was what it was asked to be, and whether the server kept up with it.

    `asked` and `sent` requests per second (null for all at once); the share of the time in which
    none arrived any more (`drain`); and by how much the last third of the requests of a block took
    longer than the first (`slowdown`, a quotient of means; null with fewer than 12 of them).
    """
    sent = [sorted(answer.sent for answer in block.answers) for block in blocks]
    spans = sum(times[-1] - times[0] for times in sent)
    wall = sum(block.wall_seconds for block in blocks)
    finite = np.isfinite(rate) and spans > 0
    return {
        "asked": rate if np.isfinite(rate) else None,
        "sent": sum(len(times) - 1 for times in sent) / spans if finite else None,
        "drain": 1 - sum(times[-1] for times in sent) / wall,
        "slowdown": _slowdown(blocks),
    }


def _slowdown(blocks: Sequence[Block]) -> float | None:
    first, last = list[float](), list[float]()
    for block in blocks:
        in_order = sorted(block.answers, key=lambda answer: answer.intended)
        took = [answer.e2e for answer in in_order if answer.error is None]
        third = len(took) // 3
        if third >= THIRD_AT_LEAST:
            first += took[:third]
            last += took[-third:]
    return float(np.mean(last) / np.mean(first)) if first else None


def client_figures(blocks: Sequence[Block]) -> dict[str, Any]:
    """What the load generator itself cost, and how late it sent.

    CPU milliseconds per request, as a share of the mean request's time and of one core; send lag
    (sent minus intended) in ms.
    """
    answers = [answer for block in blocks for answer in block.answers]
    cpu = sum(block.cpu_seconds for block in blocks)
    lag = 1000 * np.array([answer.sent - answer.intended for answer in answers])
    e2e = latencies(answers).e2e
    return {
        "cpu_ms_per_request": 1000 * cpu / len(answers),
        "cpu_share_of_request": float(cpu / len(answers) / e2e.mean()) if len(e2e) else None,
        "cpu_share_of_core": cpu / sum(block.wall_seconds for block in blocks),
        "send_lag_ms": {
            "mean": float(lag.mean()),
            "p99": float(np.percentile(lag, 99)),
            "max": float(lag.max()),
        },
    }

"""Latencies of streamed answers, by the definitions of `vllm bench serve`.

TTFT: until the first piece with tokens. E2E: until the last one. TPOT: (E2E - TTFT) over the tokens
after the first, one value a request. ITL: between one piece and the next; with speculation a piece
has several tokens and still counts once. Unlike there, all start when the request should have been
sent, which under open load may be before it was (the difference is the send lag).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.records.run import Answer, Block
from bench.stats.resample import spread

Seconds = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Latencies:
    """In seconds, over the requests that succeeded; `tpot` only of those with two tokens or more.

    `ttft`, `e2e` [requests]; `itl` [pieces after the first, of all requests].
    """

    ttft: Seconds
    tpot: Seconds
    itl: Seconds
    e2e: Seconds


def latencies(answers: Sequence[Answer]) -> Latencies:
    """The latencies of all answers that did not fail."""
    good = [answer for answer in answers if answer.error is None]
    return Latencies(
        ttft=np.array([answer.ttft for answer in good]),
        tpot=np.array([(a.e2e - a.ttft) / (a.tokens - 1) for a in good if a.tokens > 1]),
        itl=np.concatenate([np.diff(a.chunks) for a in good]) if good else np.array([]),
        e2e=np.array([answer.e2e for answer in good]),
    )


def latency_figures(answers: Sequence[Answer]) -> dict[str, Any]:
    """The report's `latency`: mean and percentiles in ms, and how many requests there were."""
    found = vars(latencies(answers))
    return {
        **{f"{kind}_ms": spread(1000 * seconds) for kind, seconds in found.items()},
        "requests": len(answers),
        "failed": sum(answer.error is not None for answer in answers),
    }


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

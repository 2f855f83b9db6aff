"""Our latencies beside vLLM's own arithmetic, fed with the same recorded times."""

from __future__ import annotations

import numpy as np
import pytest

from bench.records.run import Answer, Block
from bench.stats.latency import client_figures, latency_figures
from tests.vllm_client import VllmWorker

PERCENTILES = (50, 90, 99)


def recorded(requests: int, seed: int = 0) -> list[Answer]:
    """Answers with several tokens a piece, one of a single token, and a failed one."""
    generator = np.random.default_rng(seed)
    answers = []
    for i in range(requests):
        pieces = int(generator.integers(2, 40))
        gaps = generator.gamma(2.0, 0.01, pieces)
        start = float(generator.uniform(0, 5))
        tokens = pieces + int(generator.integers(0, 3 * pieces))
        answers.append(Answer(start, start, list(start + 0.05 + np.cumsum(gaps)), tokens))
        if i == 0:
            answers.append(Answer(start, start, [start + 0.1], 1))
    return [*answers, Answer(1.0, 1.0, [1.5], 3, error="the answer ended early")]


def test_definitions_are_those_of_vllm_bench_serve(vllm_worker: VllmWorker) -> None:
    answers = recorded(60)
    outputs = [
        {
            "success": answer.error is None,
            "latency": answer.e2e,
            "output_tokens": answer.tokens,
            "ttft": answer.ttft,
            "itl": [float(gap) for gap in np.diff(answer.chunks)],
            "start_time": answer.sent,
        }
        for answer in answers
    ]
    theirs = vllm_worker.bench_serve_metrics(outputs, list(PERCENTILES))
    ours = latency_figures(answers)
    assert (theirs["completed"], theirs["failed"]) == (len(answers) - 1, 1)
    assert (ours["requests"], ours["failed"]) == (len(answers), 1)
    for kind, name in (("ttft", "ttft"), ("tpot", "tpot"), ("itl", "itl"), ("e2e", "e2el")):
        figures = ours[f"{kind}_ms"]
        assert figures["mean"] == pytest.approx(theirs[f"mean_{name}_ms"])
        assert len(theirs[f"percentiles_{name}_ms"]) == len(PERCENTILES)
        for percentile, value in theirs[f"percentiles_{name}_ms"]:
            assert figures[f"p{percentile}"] == pytest.approx(value)


def test_latency_counts_from_when_a_request_was_due() -> None:
    answer = Answer(intended=1.0, sent=1.5, chunks=[2.0, 2.4, 2.4], tokens=5)
    assert (answer.ttft, answer.e2e) == pytest.approx((1.0, 1.4))
    figures = latency_figures([answer])
    assert figures["tpot_ms"]["mean"] == pytest.approx(100)  # 0.4 s over the 4 later tokens
    assert figures["itl_ms"]["mean"] == pytest.approx(200)  # 0.4 s over the 2 later pieces
    client = client_figures([Block(wall_seconds=2.0, cpu_seconds=0.014, answers=[answer])])
    assert client["send_lag_ms"]["max"] == pytest.approx(500)
    assert client["cpu_ms_per_request"] == pytest.approx(14)
    assert client["cpu_share_of_request"] == pytest.approx(0.01)
    assert client["cpu_share_of_core"] == pytest.approx(0.007)


def test_nothing_succeeded() -> None:
    figures = latency_figures([Answer(0.0, 0.0, error="HTTP 500")])
    assert figures["ttft_ms"] is figures["itl_ms"] is figures["e2e_ms"] is None
    assert figures["failed"] == 1

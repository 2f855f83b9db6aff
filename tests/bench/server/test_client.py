"""The load generator against servers that stall, stutter and fail: is anything left out?"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import numpy as np
import pytest

from bench.server.arrivals import poisson_arrivals
from bench.server.client import Job, run_closed, run_open
from bench.stats.latency import client_figures, latencies, latency_figures
from tests.bench.server.sse_server import SseServer, Stream

REQUESTS = 40


def jobs(count: int, **body: Any) -> list[Job]:
    return [Job("/v1/completions", json.dumps({"i": i, **body}).encode()) for i in range(count)]


async def stall(stream: Stream, body: dict[str, Any]) -> None:
    """Nobody gets anything before all have asked."""
    server = stream.server
    if server.running == REQUESTS:
        server.release.set()
    await asyncio.wait_for(server.release.wait(), 60)
    await stream.event(choices=[{"text": "a"}])
    await stream.event(choices=[{"text": "b"}])
    await stream.finish(2)


def test_open_loops_charge_a_stall_to_all_whom_it_keeps_waiting() -> None:
    times = poisson_arrivals(100.0, REQUESTS, seed=0)
    with SseServer(stall) as server:
        turn = run_open(server.url, jobs(REQUESTS), times)
        assert server.most == REQUESTS  # nobody waited at the client
    lag = np.array([answer.sent - answer.intended for answer in turn.answers])
    assert (lag >= 0).all()
    assert [answer.intended for answer in turn.answers] == pytest.approx(list(times))
    release = max(answer.sent for answer in turn.answers)  # the last one ends the stall
    assert release >= times[-1]
    e2e = latencies(turn.answers).e2e
    assert (e2e >= release - times).all()
    assert e2e[0] >= times[-1] - times[0]  # the first waited for all that came after it
    figures = client_figures([turn])
    assert figures["send_lag_ms"]["max"] == 1000 * lag.max()
    assert 0 < figures["cpu_ms_per_request"] * REQUESTS <= 1000 * turn.cpu_seconds + 1e-6


async def count(stream: Stream, body: dict[str, Any]) -> None:
    await asyncio.sleep(0.01)
    await stream.event(choices=[{"text": str(body["i"])}])
    await stream.finish(1)


def test_closed_loops_keep_their_concurrency() -> None:
    done: list[int] = []
    with SseServer(count) as server:
        turn = run_closed(server.url, jobs(11), 3, on_done=lambda: done.append(1))
        assert server.most == 3
    assert [answer.text for answer in turn.answers] == [str(i) for i in range(11)]
    assert len(done) == 11
    assert all(answer.sent >= answer.intended for answer in turn.answers)


async def stutter(stream: Stream, body: dict[str, Any]) -> None:
    """Every second byte a piece of its own; comments, line ends of either kind, ids, counters."""
    histogram = {"acceptance_histogram": [1, 2, 1], "num_draft_tokens": 8}
    text = b"".join(
        [
            b": ping\n\n",
            'data: {"choices": [{"text": "zł", "token_ids": [7, 8]}]}\n\n'.encode(),
            b'data: {"choices": [{"delta": {"content": "x"}, "token_ids": [9]}]}\r\n\r\n',
            b'data: {"choices": [], "usage": {"completion_tokens": 3}, "metrics": '
            + json.dumps({"speculative_decoding": histogram}).encode()
            + b"}\n\ndata: [DONE]\n\n",
        ]
    )
    for start in range(0, len(text), 2):
        await stream.send(text[start : start + 2])


def test_messages_cut_anywhere_are_read_whole() -> None:
    with SseServer(stutter) as server:
        (answer,) = run_closed(server.url, jobs(1), 1).answers
    assert answer.error is None
    assert (answer.text, list(answer.token_ids or []), answer.tokens) == ("złx", [7, 8, 9], 3)
    assert len(answer.chunks) == 2
    assert answer.counters is not None
    assert answer.counters.drafts == 4
    assert answer.counters.accepted_per_position == (3, 1)
    assert answer.counters.draft_tokens == 8


async def fail(stream: Stream, body: dict[str, Any]) -> None:
    kind = body["i"]
    if kind == 0:
        await stream.event(error={"message": "out of memory"})
        await stream.send(b"data: [DONE]\n\n")
    elif kind == 1:
        await stream.event(choices=[{"text": "a"}])
        stream.writer.close()
    elif kind == 2:
        await stream.finish(0)
    elif kind == 3:
        await stream.event(choices=[{"text": "a"}])
    else:
        await count(stream, body)


def test_failures_are_counted_and_say_why() -> None:
    with SseServer(fail) as server:
        turn = run_closed(server.url, jobs(5), 1)
    errors = [answer.error or "" for answer in turn.answers]
    assert "out of memory" in errors[0]
    assert "Error" in errors[1]
    assert "no tokens" in errors[2]
    assert "ended early" in errors[3]
    assert errors[4] == ""
    figures = latency_figures(turn.answers)
    assert (figures["requests"], figures["failed"]) == (5, 4)
    assert len(latencies(turn.answers).ttft) == 1


def test_a_server_that_is_gone_fails_every_request() -> None:
    with SseServer(count) as server:
        url = server.url
    turn = run_closed(url, jobs(2), 1)
    assert all("Connect" in (answer.error or "") for answer in turn.answers)

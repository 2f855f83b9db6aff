"""What does collecting cost the process that serves: CPU time for each request, by what is kept?

    python docs/examples/collect_cpu.py

The middleware runs before an application that only sends a streamed answer, so that nothing else is
timed; the thread that writes to the disk is counted. A server's tokens/s scatter by more than this
from one minute to the next (docs/examples/collect_cost.py), so that it cannot be seen there.
"""

from __future__ import annotations

import asyncio
import json
import random
import tempfile
import time
from collections.abc import MutableMapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from prometheus_client import REGISTRY
from rich.console import Console
from rich.table import Table

from bench.stats.resample import Resampler, figure
from serving.traffic.middleware import App, Collecting, Receive, Send
from serving.traffic.recorder import CollectSettings, Recorder

SHARES = (0.0, 0.1, 1.0)
PROMPT = "Write a Python function that reads a file and returns its longest line. " * 8


def stream(tokens: int) -> list[bytes]:
    """An answer as vLLM streams it, two tokens a piece."""
    pieces = [
        {"id": "chatcmpl-1", "choices": [{"index": 0, "delta": {"content": " and then"}}]}
    ] * (tokens // 2)
    last = {"id": "chatcmpl-1", "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
    whole = [b"data: " + json.dumps(piece).encode() + b"\n\n" for piece in [*pieces, last]]
    return [*whole, b"data: [DONE]\n\n"]


def sending(pieces: list[bytes]) -> App:
    """An application that answers with them."""

    async def app(scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for number, piece in enumerate(pieces, 1):
            more = number < len(pieces)
            await send({"type": "http.response.body", "body": piece, "more_body": more})

    return app


async def ask(app: App, requests: int) -> None:
    """So many requests, one after another."""
    body = json.dumps({"messages": [{"role": "user", "content": PROMPT}], "stream": True}).encode()
    scope = {
        "type": "http", "method": "POST", "path": "/v1/chat/completions",
        "headers": [(b"content-type", b"application/json"), (b"host", b"127.0.0.1:8000")],
    }  # fmt: skip

    async def receive() -> MutableMapping[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: MutableMapping[str, Any]) -> None:
        pass

    for _ in range(requests):
        await app(dict(scope), receive, send)


def main(
    tokens: Annotated[int, typer.Option(help="Of an answer.")] = 256,
    requests: Annotated[int, typer.Option(help="In a block.")] = 300,
    rounds: Annotated[int, typer.Option()] = 30,
) -> None:
    """Measure and print."""
    inner = sending(stream(tokens))
    spent: dict[float, list[float]] = {share: [] for share in SHARES}
    random.seed(0)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            for share in random.sample(SHARES, len(SHARES)):
                began = time.process_time()
                if share:
                    settings = CollectSettings(str(Path(folder) / f"{number}-{share}"), rate=share)
                    recorder = Recorder(settings)
                    asyncio.run(ask(Collecting(inner, recorder), requests))
                    recorder.close()
                else:
                    asyncio.run(ask(inner, requests))
                spent[share].append((time.process_time() - began) / requests)
                if share:
                    for counter in (recorder.kept, recorder.lost):
                        REGISTRY.unregister(counter)
    table = Table("kept", "CPU of a request", "more than without", "requests/s for 1% of a core")
    resampler = Resampler(rounds)
    plain = resampler.sums(np.array(spent[0.0])) / rounds
    for share, seconds in spent.items():
        own = figure(1e6 * resampler.sums(np.array(seconds)) / rounds)
        more = figure(1e6 * resampler.sums(np.array(seconds)) / rounds - 1e6 * plain)
        table.add_row(
            f"{share:.0%}",
            f"{own.value:.0f} µs",
            f"{more.value:.0f} µs ({more.low:.0f} to {more.high:.0f})" if share else "",
            f"{0.01 / (more.value / 1e6):,.0f}" if share else "",
        )
    Console(width=100).print(table)


if __name__ == "__main__":
    typer.run(main)

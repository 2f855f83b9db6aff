"""How many streams can the client of `afaspec bench --url` read on one core?

    python docs/examples/many_streams.py --streams 50,100,200,400

A server on another core streams answers as a fast engine would: a piece every `--gap` milliseconds
in each stream, all at the pace of a clock. So the true gap between pieces is known, and what the
client says above it is its own delay. The client has one core to itself; its share of that core is
the figure that a run's warning goes by.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import socket
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from bench.server.client import Job, run_closed
from bench.stats.latency import client_figures, latencies

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENT = {
    "id": "cmpl-0123456789abcdef0123456789abcdef",
    "object": "text_completion",
    "created": 1795867344,
    "model": "models/Llama-3.1-8B-Instruct",
    "choices": [
        {"index": 0, "text": " two tokens", "logprobs": None, "finish_reason": None,
         "stop_reason": None, "token_ids": [1403, 11460]}
    ],
}  # fmt: skip


def main(
    streams: Annotated[str, typer.Option(help="how many at once, one run each")] = "50,100,200,400",
    pieces: Annotated[int, typer.Option(help="of an answer")] = 100,
    gap: Annotated[float, typer.Option(help="milliseconds between pieces of a stream")] = 40.0,
) -> None:
    cores = sorted(os.sched_getaffinity(0))
    bound = socket.create_server(("127.0.0.1", 0), backlog=1024)
    url = f"http://127.0.0.1:{bound.getsockname()[1]}"
    server = multiprocessing.get_context("fork").Process(
        target=_serve, args=(bound, pieces, gap / 1000, cores[-1]), daemon=True
    )
    server.start()
    os.sched_setaffinity(0, cores[:1])
    columns = ("streams", "pieces/s", "client's core", "gap, ms (mean)", "p99", "delay p99, ms")
    table = Table(*columns, title=f"A piece every {gap:g} ms in each stream, one core")
    body = json.dumps({"model": "m", "prompt": "x", "stream": True}).encode()
    for count in map(int, streams.split(",")):
        jobs = [Job("/v1/completions", body)] * (2 * count)
        block = run_closed(url, jobs, count)
        failed = [answer.error for answer in block.answers if answer.error]
        assert not failed, failed[0]
        itl = 1000 * latencies(block.answers).itl
        late = 1000 * np.concatenate([_late(answer.chunks, gap / 1000) for answer in block.answers])
        share = client_figures([block])["cpu_share_of_core"]
        rate = pieces * len(jobs) / block.wall_seconds
        table.add_row(
            str(count), f"{rate:,.0f}", f"{100 * share:.0f}%", f"{itl.mean():.2f}",
            f"{np.percentile(itl, 99):.1f}", f"{np.percentile(late, 99):.1f}",
        )  # fmt: skip
    Console(width=100).print(table)
    server.kill()


def _late(chunks: object, gap: float) -> np.ndarray:
    """How much later than the earliest of its stream, on the server's clock, each piece came."""
    times = np.asarray(chunks) - gap * np.arange(len(np.asarray(chunks)))
    return np.asarray(times - times.min())


def _serve(bound: socket.socket, pieces: int, gap: float, core: int) -> None:
    os.sched_setaffinity(0, [core])
    data = b"data: " + json.dumps(EVENT).encode() + b"\n\n"
    piece = f"{len(data):x}\r\n".encode() + data + b"\r\n"
    usage = b'data: {"choices": [], "usage": {"completion_tokens": %d}}\n\n' % (2 * pieces)
    end = usage + b"data: [DONE]\n\n"
    last = f"{len(end):x}\r\n".encode() + end + b"\r\n0\r\n\r\n"

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except asyncio.IncompleteReadError:  # the client has gone
                return
            lines = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:] if b": " in line)
            if size := int(lines.get(b"Content-Length", b"0")):
                await reader.readexactly(size)
            if head.startswith(b"GET"):
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
                continue
            writer.write(HEAD)
            begin = loop.time()
            for number in range(pieces):
                await asyncio.sleep(begin + gap * number - loop.time())
                writer.write(piece)
            writer.write(last)

    async def run() -> None:
        async with await asyncio.start_server(connection, sock=bound) as running:
            await running.serve_forever()

    asyncio.run(run())


if __name__ == "__main__":
    typer.run(main)

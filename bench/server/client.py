"""The load generator: requests to one server over HTTP, streamed, and when their tokens came.

While requests run it only notes when each piece of an answer arrived; JSON is read after the last
answer. Closed loops send from `concurrency` workers. Open loops send at times fixed beforehand, by
a thread of their own that no answer can hold up, and count latency from the time intended, so that
a server that stalls is charged with the wait of all whom it keeps waiting.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bench.records.run import Answer, Block
from serving.metrics import SpecCounters, counters_from_histogram
from serving.remote import api_headers

if TYPE_CHECKING:
    from aiohttp import ClientSession


TIMEOUT_SECONDS = 3600.0
# vLLM's server closes a connection after 5 idle seconds; one that is about to be closed would fail.
KEEPALIVE_SECONDS = 3.0


@dataclass(frozen=True)
class Job:
    """A request: the path of its endpoint and its body as JSON."""

    path: str
    body: bytes


@dataclass
class _Raw:
    """An answer as it arrived: times by `perf_counter`, and messages not yet read."""

    intended: float
    sent: float = 0.0
    messages: list[tuple[float, bytes]] = field(default_factory=list)
    error: str | None = None


Post = Callable[[int, float], "asyncio.Task[None]"]  # job, intended time


def run_closed(
    url: str,
    jobs: Sequence[Job],
    concurrency: int,
    *,
    on_done: Callable[[], None] = lambda: None,
) -> Block:
    """Send all `jobs` to the server at `url`, `concurrency` at a time."""

    async def send(post: Post, start: float) -> None:
        queue = iter(range(len(jobs)))

        async def worker() -> None:
            for job in queue:
                await post(job, time.perf_counter())

        await asyncio.gather(*(worker() for _ in range(concurrency)))

    return asyncio.run(_run_block(url, jobs, send, on_done))


def run_open(
    url: str,
    jobs: Sequence[Job],
    times: Iterable[float],
    *,
    on_done: Callable[[], None] = lambda: None,
) -> Block:
    """Send each of `jobs` at its time (seconds from the start), whatever the others do."""
    planned = [float(moment) for moment in times]

    async def send(post: Post, start: float) -> None:
        loop, stop = asyncio.get_running_loop(), threading.Event()
        tasks: list[asyncio.Task[None]] = []
        all_sent = asyncio.Event()

        def fire(job: int) -> None:
            tasks.append(post(job, start + planned[job]))
            if len(tasks) == len(planned):
                all_sent.set()

        def keep_time() -> None:  # sleeps more exactly than an event loop, which rounds to 1 ms
            for job, moment in enumerate(planned):
                if stop.wait(max(0.0, start + moment - time.perf_counter())):
                    return
                loop.call_soon_threadsafe(fire, job)

        clock = threading.Thread(target=keep_time, daemon=True)
        clock.start()
        try:
            await all_sent.wait()
            await asyncio.gather(*tasks)
        finally:
            stop.set()
            clock.join()

    return asyncio.run(_run_block(url, jobs, send, on_done))


async def _run_block(
    url: str,
    jobs: Sequence[Job],
    send: Callable[[Post, float], Any],
    on_done: Callable[[], None],
) -> Block:
    import aiohttp

    raw: list[_Raw] = [_Raw(0.0)] * len(jobs)
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_SECONDS)
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_SECONDS)
    headers = {"Content-Type": "application/json", **api_headers()}
    async with aiohttp.ClientSession(
        connector=connector, timeout=timeout, headers=headers
    ) as session:
        with contextlib.suppress(aiohttp.ClientError, OSError):  # requests will say it better
            async with session.get(f"{url}/health") as answer:  # opens the first connection
                await answer.read()

        async def one(job: int) -> None:
            await _post(session, url + jobs[job].path, jobs[job].body, raw[job])
            on_done()

        def post(job: int, intended: float) -> asyncio.Task[None]:
            raw[job] = _Raw(intended)
            return asyncio.create_task(one(job))

        gc.collect()
        gc.freeze()  # a full collection would hold up every stream at once
        try:
            start, cpu = time.perf_counter(), time.process_time()
            await send(post, start)
            wall, cpu = time.perf_counter() - start, time.process_time() - cpu
        finally:
            gc.unfreeze()
    return Block(wall, cpu, [_read(answer, start) for answer in raw])


async def _post(session: ClientSession, url: str, body: bytes, raw: _Raw) -> None:
    import aiohttp

    raw.sent = time.perf_counter()
    try:
        async with session.post(url, data=body) as response:
            if response.status != 200:
                raw.error = f"HTTP {response.status}: {(await response.text())[:500]}"
                return
            rest = b""
            async for data in response.content.iter_any():
                now = time.perf_counter()
                *whole, rest = (rest + data).replace(b"\r\n", b"\n").split(b"\n\n")
                raw.messages += [(now, message) for message in whole]
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raw.error = f"{type(error).__name__}: {error}"


def _read(raw: _Raw, start: float) -> Answer:
    """The answer that the messages make up."""
    chunks: list[float] = []
    texts: list[str] = []
    ids: list[int] = []
    usage: dict[str, Any] = {}
    counters, error, done, with_ids = None, raw.error, False, False
    for moment, message in raw.messages:
        if not message.startswith(b"data:"):  # a comment that keeps the connection alive
            continue
        content = message.removeprefix(b"data:").strip()
        if content == b"[DONE]":
            done = True
            continue
        data = json.loads(content)
        if "error" in data:
            error = error or str(data["error"])
        elif choices := data.get("choices"):
            chunks.append(moment - start)
            texts.append(choices[0].get("text") or choices[0].get("delta", {}).get("content") or "")
            with_ids = with_ids or choices[0].get("token_ids") is not None
            ids += choices[0].get("token_ids") or []
        else:
            usage = data.get("usage") or usage
            counters = _counters(data) or counters
    if error is None and not (done and chunks):
        error = "the answer ended early" if chunks else "the answer had no tokens"
    if error is None and "completion_tokens" not in usage:
        error = "the server does not say how many tokens it wrote"
    return Answer(
        intended=raw.intended - start,
        sent=raw.sent - start,
        chunks=chunks,
        tokens=int(usage.get("completion_tokens", 0)),
        text="".join(texts),
        token_ids=ids if with_ids else None,
        counters=counters,
        error=error,
    )


def _counters(data: Mapping[str, Any]) -> SpecCounters | None:
    """What `--per-request-spec-decode-metrics` adds to an answer's last message."""
    found = (data.get("metrics") or {}).get("speculative_decoding")
    if not found:
        return None
    return counters_from_histogram(found["acceptance_histogram"], found["num_draft_tokens"])

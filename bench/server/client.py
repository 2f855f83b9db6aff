"""The load generator: requests to one server over HTTP, streamed, and when their tokens came.

While requests run it only notes when each piece of an answer arrived; what the pieces say is read
after the last answer (`bench.server.stream`). Closed loops send from `concurrency` workers. Open
loops send at times fixed beforehand, by a thread of their own that no answer can hold up, and count
latency from the time intended, so that a server that stalls is charged with the wait of all whom it
keeps waiting.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bench.records.run import Block
from bench.server.stream import RawAnswer, read_answer
from serving.remote import api_headers

if TYPE_CHECKING:
    from aiohttp import ClientSession


TIMEOUT_SECONDS = 3600.0
# vLLM's server closes a connection after 5 idle seconds; one that is about to be closed would fail.
KEEPALIVE_SECONDS = 3.0
ERROR_SHOWN = 500  # characters of a refusal
# A body that something on the way compresses comes in lumps, whose times are those of the lumps.
HEADERS = {"Content-Type": "application/json", "Accept-Encoding": "identity"}


@dataclass(frozen=True)
class Job:
    """A request: the path of its endpoint and its body as JSON."""

    path: str
    body: bytes


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

    raw: list[RawAnswer] = [RawAnswer(0.0)] * len(jobs)
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_SECONDS)
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_SECONDS)
    headers = {**HEADERS, **api_headers()}
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
            raw[job] = RawAnswer(intended)
            return asyncio.create_task(one(job))

        gc.collect()
        gc.freeze()  # a full collection would hold up every stream at once
        try:
            start, cpu = time.perf_counter(), time.process_time()
            await send(post, start)
            wall, cpu = time.perf_counter() - start, time.process_time() - cpu
        finally:
            gc.unfreeze()
    return Block(wall, cpu, [read_answer(answer, start) for answer in raw])


async def _post(session: ClientSession, url: str, body: bytes, raw: RawAnswer) -> None:
    import aiohttp

    raw.sent = time.perf_counter()
    try:
        async with session.post(url, data=body) as response:
            if response.status != 200:
                text = (await response.read()).decode(errors="replace")
                raw.error = f"HTTP {response.status}: {' '.join(text.split())[:ERROR_SHOWN]}"
                return
            raw.kind = response.content_type
            async for data in response.content.iter_any():
                raw.reads.append((time.perf_counter(), data))
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raw.error = f"{type(error).__name__}: {error}"

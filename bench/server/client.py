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
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bench.records.run import Block
from bench.server.stream import RawAnswer, read_answer
from serving.remote import OVERRUN, api_headers

if TYPE_CHECKING:
    from aiohttp import ClientSession


# vLLM's server closes a connection after 5 idle seconds; one that is about to be closed would fail.
KEEPALIVE_SECONDS = 3.0
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds before a request is sent again
ERROR_SHOWN = 500  # characters of a refusal
# A body that something on the way compresses comes in lumps, whose times are those of the lumps.
HEADERS = {"Content-Type": "application/json", "Accept-Encoding": "identity"}


@dataclass(frozen=True)
class Job:
    """A request: the path of its endpoint and its body as JSON."""

    path: str
    body: bytes


@dataclass(frozen=True)
class Way:
    """How requests go: with these `headers`, for `timeout` seconds at most, and sent again up to
    `retries` times where the server cannot take them now."""

    headers: Mapping[str, str] = field(default_factory=api_headers)
    timeout: float = 3600.0
    retries: int = 0


Post = Callable[[int, float], "asyncio.Task[None]"]  # job, intended time


def run_closed(
    url: str,
    jobs: Sequence[Job],
    concurrency: int,
    way: Way | None = None,
    *,
    ramp_up: float = 0.0,
    on_done: Callable[[], None] = lambda: None,
) -> Block:
    """Send all `jobs` to the server at `url`, `concurrency` at a time.

    Of these each begins `ramp_up` / `concurrency` seconds after the one before.
    """

    async def send(post: Post, start: float) -> None:
        queue = iter(range(len(jobs)))

        async def worker(place: int) -> None:
            await asyncio.sleep(ramp_up * place / concurrency)
            for job in queue:
                await post(job, time.perf_counter())

        await asyncio.gather(*(worker(place) for place in range(concurrency)))

    return asyncio.run(_run_block(url, jobs, send, way or Way(), on_done))


def run_open(
    url: str,
    jobs: Sequence[Job],
    times: Iterable[float],
    way: Way | None = None,
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

    return asyncio.run(_run_block(url, jobs, send, way or Way(), on_done))


def lost_connection(error: str) -> bool:
    """Whether a request failed since nobody was there, and not by what was said to it."""
    return re.match(r"(Client|Server|Connection|Timeout)\w*: ", error) is not None


async def _run_block(
    url: str,
    jobs: Sequence[Job],
    send: Callable[[Post, float], Any],
    way: Way,
    on_done: Callable[[], None],
) -> Block:
    import aiohttp

    raw: list[RawAnswer] = [RawAnswer(0.0)] * len(jobs)
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_SECONDS)
    timeout = aiohttp.ClientTimeout(total=way.timeout)
    headers = {**HEADERS, **way.headers}
    async with aiohttp.ClientSession(
        connector=connector, timeout=timeout, headers=headers
    ) as session:
        with contextlib.suppress(aiohttp.ClientError, OSError):  # requests will say it better
            async with session.get(f"{url}/health") as answer:  # opens the first connection
                await answer.read()

        async def one(job: int) -> None:
            await _post(session, url + jobs[job].path, jobs[job].body, raw[job], way.retries)
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


async def _post(
    session: ClientSession, url: str, body: bytes, raw: RawAnswer, retries: int
) -> None:
    """Send it, and again where that may help; its times stay those of the first."""
    raw.sent = time.perf_counter()
    while True:
        wait = await _attempt(session, url, body, raw)
        if wait is None or raw.retried == retries:
            return
        await asyncio.sleep(max(wait, min(FIRST_WAIT * 2**raw.retried, LONGEST_WAIT)))
        raw.retried, raw.error = raw.retried + 1, None


async def _attempt(session: ClientSession, url: str, body: bytes, raw: RawAnswer) -> float | None:
    """One attempt; where another may help, the seconds after which the server wants it."""
    import aiohttp

    try:
        async with session.post(url, data=body) as response:
            if response.status != 200:
                text = (await response.read()).decode(errors="replace")
                raw.error = f"HTTP {response.status}: {' '.join(text.split())[:ERROR_SHOWN]}"
                after = response.headers.get("Retry-After", "0")
                wait = float(after) if after.isdecimal() else 0.0
                return wait if response.status in OVERRUN else None
            raw.kind = response.content_type
            async for data in response.content.iter_any():
                raw.reads.append((time.perf_counter(), data))
    except aiohttp.ClientConnectionError as error:
        raw.error = f"{type(error).__name__}: {error}"
        return None if raw.reads else 0.0
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raw.error = f"{type(error).__name__}: {error}"
    return None

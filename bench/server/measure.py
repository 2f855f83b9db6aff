"""Put loads on servers in turns and keep what came back."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from urllib.parse import urlsplit

from bench.records.progress import Progress
from bench.records.run import Answer, Block
from bench.server.arrivals import Load, poisson_arrivals
from bench.server.client import Job, run_closed, run_open
from bench.server.config import ServerConfig
from bench.server.requests import Request, make_job, refused_fields
from bench.server.tokens import with_counts
from drafts.errors import UserError
from serving.metrics import ServerCounters
from serving.remote import RemoteServer

# After its last request a server may spin for a second on shared memory, in its neighbour's way.
PAUSE_SECONDS = 1.5
REQUESTS_PER_WORKER = 4
# Requests of a block at concurrency 1, where short blocks cost nothing. With more at once a block
# ends with fewer and fewer of them, so there it is the whole round.
BLOCK = 8


@dataclass
class LoadRun:
    """What one arm gave at one load: by round its blocks, and what its counters grew by in each.

    Request i of a round asks prompt i modulo the number of `prompts`.
    """

    name: str
    server: RemoteServer
    load: Load
    prompts: int
    rounds: list[list[Block]] = field(default_factory=list)
    counters: list[list[ServerCounters]] = field(default_factory=list)

    @property
    def blocks(self) -> list[Block]:
        """The blocks of all rounds."""
        return [block for blocks in self.rounds for block in blocks]

    @property
    def answers(self) -> list[Answer]:
        """The answers of all blocks, failed ones among them."""
        return [answer for block in self.blocks for answer in block.answers]

    @property
    def good(self) -> list[Answer]:
        """Those that did not fail."""
        return [answer for answer in self.answers if answer.error is None]

    @property
    def spent(self) -> list[ServerCounters]:
        """What the counters grew by in every block."""
        return [counters for row in self.counters for counters in row]


def measure_servers(
    config: ServerConfig,
    servers: Mapping[str, RemoteServer],
    requests: Sequence[Request],
    progress: Progress = lambda stage, done, total: None,
) -> list[list[LoadRun]]:
    """Per load, in the order of `config.loads`, what each arm gave.

    At each load every server is warmed up; then the arms take turns, in an order that is drawn anew
    for every block (see `bench.engine.measure`). Raises `UserError` when every request of a block
    fails.
    """
    sizes = [round_size(config, load, len(requests)) for load in config.loads]
    total, ended = sum(sizes) * config.rounds * len(servers), count(1)
    progress("measuring", 0, total)

    def on_done() -> None:
        progress("measuring", next(ended), total)

    results, order = [], random.Random(config.seed)
    for load, size in zip(config.loads, sizes, strict=True):
        prompts = min(len(requests), size)
        runs = [LoadRun(name, server, load, prompts) for name, server in servers.items()]
        for one in runs:
            _warm_up(config, one, requests)
        per_block = block_size(load, size, prompts)
        for round_index in range(config.rounds):
            for one in runs:
                one.rounds.append([])
                one.counters.append([])
            for start in range(0, size, per_block):
                asked = range(start, min(start + per_block, size))
                for one in order.sample(runs, len(runs)):
                    if len(runs) > 1 and is_local(one.server):
                        time.sleep(PAUSE_SECONDS)
                    jobs = _jobs(config, one.server, requests, asked)
                    _take_block(config, one, jobs, round_index, on_done)
        results.append(runs)
    return results


def round_size(config: ServerConfig, load: Load, prompts: int) -> int:
    """How many requests make a round. Raises `UserError` for fewer than run at once."""
    workers = load.concurrency or 1
    if config.requests is None:
        return max(prompts, REQUESTS_PER_WORKER * workers)
    if config.requests < workers:
        raise UserError(
            f"{config.requests} requests cannot run {workers} at once",
            hint=f"give --requests {REQUESTS_PER_WORKER * workers} or more",
        )
    return config.requests


def block_size(load: Load, size: int, prompts: int) -> int:
    """How many of a round's `size` requests make a block."""
    return BLOCK if load.concurrency == 1 and size <= prompts else size


def is_local(server: RemoteServer) -> bool:
    """Does the server run on this machine?"""
    host = urlsplit(server.url).hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")


def _jobs(
    config: ServerConfig, server: RemoteServer, requests: Sequence[Request], asked: range
) -> list[Job]:
    return [make_job(requests[i % len(requests)], config, server.model) for i in asked]


def _warm_up(config: ServerConfig, one: LoadRun, requests: Sequence[Request]) -> None:
    size = max(config.warmup, one.load.concurrency or 1)
    before = one.server.counters()
    jobs = _jobs(config, one.server, requests, range(size))
    block = with_counts(_sent(config, one, jobs, seed=config.seed), config, one.server)
    _require_answers(one, jobs, block)
    one.server.settled_counters(before.requests + size)


def _take_block(
    config: ServerConfig,
    one: LoadRun,
    jobs: Sequence[Job],
    round_index: int,
    on_done: Callable[[], None],
) -> None:
    before = one.server.counters()
    block = _sent(config, one, jobs, config.seed + round_index, on_done)
    block = with_counts(block, config, one.server)
    _require_answers(one, jobs, block)
    ended = sum(answer.error is None for answer in block.answers)
    after = one.server.settled_counters(before.requests + ended)
    one.rounds[-1].append(block)
    one.counters[-1].append(after - before)


def _sent(
    config: ServerConfig,
    one: LoadRun,
    jobs: Sequence[Job],
    seed: int,
    on_done: Callable[[], None] = lambda: None,
) -> Block:
    """The jobs at the load that is measured. `seed` draws their times, where they come by rate."""
    if one.load.concurrency is not None:
        return run_closed(one.server.url, jobs, one.load.concurrency, on_done=on_done)
    assert one.load.rate is not None
    times = poisson_arrivals(one.load.rate, len(jobs), seed)
    return run_open(one.server.url, jobs, times, on_done=on_done)


def _require_answers(one: LoadRun, jobs: Sequence[Job], block: Block) -> None:
    errors = [answer.error for answer in block.answers if answer.error]
    if errors and len(errors) == len(block.answers):
        hint = "read the server's log, and try one request by hand"
        if names := refused_fields(jobs[0], errors[0]):
            hint = f"leave out what this server does not take: --omit-fields {','.join(names)}"
        raise UserError(
            f"every request to {one.name!r} failed; the first: {errors[0]}",
            where=one.server.url,
            hint=hint,
        )

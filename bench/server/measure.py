"""Put loads on servers in turns and keep what came back."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, product
from urllib.parse import urlsplit

from bench.records.progress import Note, Progress
from bench.records.run import Answer, Block
from bench.records.turns import Turns
from bench.server.arrivals import Load, poisson_arrivals
from bench.server.client import Job, Way, lost_connection, run_closed, run_open
from bench.server.config import ServerConfig
from bench.server.requests import Request, make_job, refused_fields
from bench.server.tokens import with_counts
from drafts.errors import UserError
from serving.metrics import ServerCounters
from serving.remote import RemoteServer, TransientError

# After its last request a server may spin for a second on shared memory, in its neighbour's way.
PAUSE_SECONDS = 1.5
REQUESTS_PER_WORKER = 4
ATTEMPTS = 3  # at a turn whose server goes away
POLL_SECONDS = 1.0
PLAIN = "none"  # the arm without speculation, where no counters show it
# Requests of a block at concurrency 1, where short blocks cost nothing. With more at once a block
# ends with fewer and fewer of them, so there it is the whole round.
BLOCK = 8


@dataclass(frozen=True)
class Turn:
    """What an arm gave in a block, and what its server's counters grew by (None: nobody counts)."""

    block: Block
    counters: ServerCounters | None


@dataclass
class LoadRun:
    """What one arm gave at one load: by round its blocks, and what its counters grew by in each.

    Request i of a round asks prompt i modulo the number of `prompts`. `again` counts turns that
    were asked once more, as the server went away in them.
    """

    name: str
    server: RemoteServer
    load: Load
    prompts: int
    again: int = 0
    rounds: list[list[Block]] = field(default_factory=list)
    counters: list[list[ServerCounters | None]] = field(default_factory=list)

    @property
    def k(self) -> int:
        """The tokens that it drafts a step: by its server's counters, else by its answers' own."""
        counts = [answer.counters for answer in self.answers if answer.counters]
        return self.server.k or max((len(c.accepted_per_position) for c in counts), default=0)

    @property
    def plain(self) -> bool:
        """Whether it decodes without speculation."""
        return decodes_plainly(self.name, self.server)

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
        """What the counters grew by in every block, where they are seen."""
        return [counters for row in self.counters for counters in row if counters is not None]


def decodes_plainly(name: str, server: RemoteServer) -> bool:
    """Whether a server drafts nothing: as its counters show, else as its arm's name says."""
    return server.k == 0 if server.counted else name == PLAIN


def measure_servers(
    config: ServerConfig,
    servers: Mapping[str, RemoteServer],
    requests: Sequence[Request],
    progress: Progress = lambda stage, done, total: None,
    *,
    turns: Turns[Turn] | None = None,
    note: Note = lambda text: None,
) -> list[list[LoadRun]]:
    """Per load, in the order of `config.loads`, what each arm gave.

    At each load every server is warmed up; then the arms take turns, in an order that is drawn anew
    for every block (see `bench.engine.measure`). Those of `turns` have ended before, and others are
    added to it. A block in which a server restarts is asked again. Raises `UserError` when every
    request of a block fails, or a server does not come back.
    """
    turns = turns or Turns[Turn]()
    sizes = [round_size(config, load, len(requests)) for load in config.loads]
    total, ended = sum(sizes) * config.rounds * len(servers), count(1)
    progress("measuring", 0, total)

    def on_done() -> None:
        progress("measuring", next(ended), total)

    results, order = [], random.Random(config.seed)
    for place, (load, size) in enumerate(zip(config.loads, sizes, strict=True)):
        prompts = min(len(requests), size)
        runs = [LoadRun(name, server, load, prompts) for name, server in servers.items()]
        per_block = block_size(load, size, prompts)
        starts = range(0, size, per_block)
        places = list(product(range(config.rounds), starts))
        for one in runs:
            if any((place, r, one.name, start) not in turns.ended for r, start in places):
                _warm_up(config, one, requests, note)
        for round_index in range(config.rounds):
            for one in runs:
                one.rounds.append([])
                one.counters.append([])
            for start in starts:
                asked = range(start, min(start + per_block, size))
                for one in order.sample(runs, len(runs)):
                    key = (place, round_index, one.name, start)
                    if key in turns.ended:
                        for _ in asked:
                            on_done()
                    else:
                        if len(runs) > 1 and is_local(one.server):
                            time.sleep(PAUSE_SECONDS)
                        jobs = _jobs(config, one.server, requests, asked, round_index * size)
                        turns.add(key, _taken(config, one, jobs, round_index, on_done, note))
                    one.rounds[-1].append(turns.ended[key].block)
                    one.counters[-1].append(turns.ended[key].counters)
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
    config: ServerConfig,
    server: RemoteServer,
    requests: Sequence[Request],
    asked: range,
    first_seed: int = 0,
) -> list[Job]:
    return [
        make_job(requests[i % len(requests)], config, server.model, config.seed + first_seed + i)
        for i in asked
    ]


def _warm_up(config: ServerConfig, one: LoadRun, requests: Sequence[Request], note: Note) -> None:
    if not config.warmup:
        return
    size = max(config.warmup, one.load.concurrency or 1)
    jobs = _jobs(config, one.server, requests, range(size))
    _taken(config, one, jobs, 0, lambda: None, note)


def _taken(
    config: ServerConfig,
    one: LoadRun,
    jobs: Sequence[Job],
    round_index: int,
    on_done: Callable[[], None],
    note: Note,
) -> Turn:
    """The jobs as a turn of that arm, asked again where its server went away meanwhile."""
    reported, why = iter(jobs), ""

    def once() -> None:
        if next(reported, None) is not None:  # a request that is asked again was reported before
            on_done()

    for _ in range(ATTEMPTS):
        try:
            before = one.server.counters() if one.server.counted else None
            block = _sent(config, one, jobs, config.seed + round_index, once)
            if all(answer.error for answer in block.answers):
                one.server.check()  # is it gone, or does it refuse what we ask?
            block = with_counts(block, config, one.server)
            _require_answers(one, jobs, block)
            if before is None:
                return Turn(block, None)
            ended = sum(answer.error is None for answer in block.answers)
            after = one.server.settled_counters(before.requests + ended)
            if after.requests >= before.requests:
                return Turn(block, after - before)
            why = "its server was started anew"
            note(f"{one.name}: {why}; this turn is asked again")
        except TransientError as gone:
            why = gone.problem
            note(f"{one.name}: {why}; waiting for it")
            _wait_for(one, config.patience)
        one.again += 1
    raise UserError(
        f"the server of {one.name!r} went away in {ATTEMPTS} turns one after another: {why}",
        where=one.server.url,
        hint="read the server's log; the same command goes on from here",
    )


def _wait_for(one: LoadRun, seconds: float) -> None:
    """Until the server answers again. Raises `UserError` where it does not."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return one.server.check()
        except TransientError as gone:
            if time.monotonic() > deadline:
                raise UserError(
                    f"{gone.problem}, and did not come back in {seconds:g} seconds",
                    where=one.server.url,
                    hint="start it again; the same command goes on from here",
                ) from None
            time.sleep(POLL_SECONDS)


def _sent(
    config: ServerConfig,
    one: LoadRun,
    jobs: Sequence[Job],
    seed: int,
    on_done: Callable[[], None] = lambda: None,
) -> Block:
    """The jobs at the load that is measured. `seed` draws their times, where they come by rate."""
    way = Way(one.server.headers, config.timeout, config.retries)
    if one.load.concurrency is not None:
        return run_closed(
            one.server.url, jobs, one.load.concurrency, way, ramp_up=config.ramp_up, on_done=on_done
        )
    assert one.load.rate is not None
    times = poisson_arrivals(one.load.rate, len(jobs), seed)
    return run_open(one.server.url, jobs, times, way, on_done=on_done)


def _require_answers(one: LoadRun, jobs: Sequence[Job], block: Block) -> None:
    errors = [answer.error for answer in block.answers if answer.error]
    if errors and len(errors) == len(block.answers):
        if all(map(lost_connection, errors)):
            raise TransientError(f"no request came through ({errors[0]})", where=one.server.url)
        hint = "read the server's log, and try one request by hand"
        if names := refused_fields(jobs[0], errors[0]):
            hint = f"leave out what this server does not take: --omit-fields {','.join(names)}"
        raise UserError(
            f"every request to {one.name!r} failed; the first: {errors[0]}",
            where=one.server.url,
            hint=hint,
        )

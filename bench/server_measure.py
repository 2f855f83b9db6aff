"""Put loads on servers in turns and keep what came back."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from bench.arrivals import Load, poisson_arrivals
from bench.client import Job, Turn, run_closed, run_open
from bench.measure import Progress
from bench.server_config import ServerConfig
from bench.server_prompts import Request, make_job
from drafts.errors import UserError
from serving.metrics import ServerCounters
from serving.remote import RemoteServer, api_headers

# After its last request a server may spin for a second on shared memory, in its neighbour's way.
PAUSE_SECONDS = 1.5
REQUESTS_PER_WORKER = 4


@dataclass
class LoadRun:
    """What one arm gave at one load: per round its turn, and what its counters grew by.

    Request i of a turn asks prompt i modulo the number of `prompts`.
    """

    name: str
    server: RemoteServer
    load: Load
    prompts: int
    turns: list[Turn] = field(default_factory=list)
    counters: list[ServerCounters] = field(default_factory=list)


def measure_servers(
    config: ServerConfig,
    servers: Mapping[str, RemoteServer],
    requests: Sequence[Request],
    progress: Progress = lambda stage, done, total: None,
) -> list[list[LoadRun]]:
    """Per load, in the order of `config.loads`, what each arm gave.

    At each load every server is warmed up; then the arms take turns, in an order that rotates from
    round to round. Raises `UserError` when every request of a turn fails.
    """
    sizes = [turn_size(config, load, len(requests)) for load in config.loads]
    meter = _Meter(progress, sum(sizes) * config.rounds * len(servers))
    results = []
    for load, size in zip(config.loads, sizes, strict=True):
        prompts = min(len(requests), size)
        runs = [LoadRun(name, server, load, prompts) for name, server in servers.items()]
        for one in runs:
            _warm_up(config, one, requests)
        for round_index in range(config.rounds):
            shift = round_index % len(runs)
            for one in runs[shift:] + runs[:shift]:
                if len(runs) > 1:
                    time.sleep(PAUSE_SECONDS)
                jobs = _jobs(config, one.server, requests, size)
                _take_turn(config, one, jobs, round_index, meter)
        results.append(runs)
    return results


def turn_size(config: ServerConfig, load: Load, prompts: int) -> int:
    """How many requests make a turn. Raises `UserError` for fewer than run at once."""
    workers = load.concurrency or 1
    if config.requests is None:
        return max(prompts, REQUESTS_PER_WORKER * workers)
    if config.requests < workers:
        raise UserError(
            f"{config.requests} requests a turn cannot run {workers} at once",
            mend=f"give --requests {REQUESTS_PER_WORKER * workers} or more",
        )
    return config.requests


@dataclass
class _Meter:
    """Counts requests for the progress bar."""

    progress: Progress
    total: int
    done: int = 0

    def __post_init__(self) -> None:
        self.progress("measuring", 0, self.total)

    def step(self) -> None:
        self.done += 1
        self.progress("measuring", self.done, self.total)


def _jobs(
    config: ServerConfig, server: RemoteServer, requests: Sequence[Request], size: int
) -> list[Job]:
    return [make_job(requests[i % len(requests)], config, server.model) for i in range(size)]


def _warm_up(config: ServerConfig, one: LoadRun, requests: Sequence[Request]) -> None:
    workers = one.load.concurrency or 1
    size = max(config.warmup, workers)
    before = one.server.counters()
    jobs = _jobs(config, one.server, requests, size)
    turn = run_closed(one.server.url, jobs, workers, headers=api_headers())
    _require_answers(one, turn)
    one.server.settled_counters(before.requests + size)


def _take_turn(
    config: ServerConfig, one: LoadRun, jobs: Sequence[Job], round_index: int, meter: _Meter
) -> None:
    before = one.server.counters()
    url, headers = one.server.url, api_headers()
    if one.load.concurrency is not None:
        turn = run_closed(url, jobs, one.load.concurrency, headers=headers, on_done=meter.step)
    else:
        assert one.load.rate is not None
        times = poisson_arrivals(one.load.rate, len(jobs), config.seed + round_index)
        turn = run_open(url, jobs, times, headers=headers, on_done=meter.step)
    _require_answers(one, turn)
    ended = sum(answer.error is None for answer in turn.answers)
    after = one.server.settled_counters(before.requests + ended)
    one.turns.append(turn)
    one.counters.append(after - before)


def _require_answers(one: LoadRun, turn: Turn) -> None:
    errors = [answer.error for answer in turn.answers if answer.error]
    if errors and len(errors) == len(turn.answers):
        raise UserError(
            f"every request to {one.name!r} failed; the first: {errors[0]}",
            where=one.server.url,
            mend="read the server's log, and try one request by hand",
        )

"""What a large run costs to report: made-up answers of servers, 10,000 prompts of 1,000 tokens.

    python docs/examples/large_report.py --out runs/large

Prints seconds, the most memory that was held, and the size of the page. Nothing is measured here
but the report itself: the answers are drawn, as four servers at one load would have given them.
"""

from __future__ import annotations

import resource
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from bench.records.arms import Arm
from bench.records.run import Answer, Block
from bench.report.files import write_report
from bench.server.arrivals import Load
from bench.server.measure import LoadRun
from bench.server.report import build_server_report
from serving.metrics import ServerCounters, SpecCounters, sum_counters
from serving.remote import RemoteServer

K = 3
ARMS = {"none": 0.0, "base": 0.4, "lora": 0.55, "afa-lora": 0.5}  # chance that a token is accepted
STEP_SECONDS = 0.01


def main(
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("runs/large"),
    prompts: Annotated[int, typer.Option(min=2)] = 10_000,
    tokens: Annotated[int, typer.Option(min=2)] = 1_000,
    concurrency: Annotated[int, typer.Option(min=1)] = 200,
) -> None:
    """Make the answers, then the report."""
    runs = [drawn(name, prompts, tokens, concurrency) for name in ARMS]
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    typer.echo(f"{prompts:,} prompts of {tokens:,} tokens and {len(ARMS)} arms: {held:.2f} GiB")
    began = time.perf_counter()
    report = build_server_report(
        [runs],
        arms={name: Arm(name, "unknown" if chance else None) for name, chance in ARMS.items()},
        common=common(prompts, tokens, concurrency),
        provenance={name: own(name, prompts, tokens, concurrency) for name in ARMS},
        prompts=[f"prompt {i}" for i in range(prompts)],
        categories=None,
    )
    built = time.perf_counter()
    page = write_report(report, out)
    written = time.perf_counter()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    files = sum(path.stat().st_size for path in out.iterdir()) / 2**20
    typer.echo(
        f"built in {built - began:.1f} s, written in {written - built:.1f} s, at most {most:.2f} "
        f"GiB; the page has {page.stat().st_size / 2**20:.2f} MiB, all files {files:.0f} MiB"
    )


def drawn(name: str, prompts: int, tokens: int, concurrency: int) -> LoadRun:
    """What an arm gave: each answer's pieces, a step apart."""
    generator, chance = np.random.default_rng(0), ARMS[name]
    answers, workers = [], np.zeros(concurrency)
    for _ in range(prompts):
        at_least = np.cumprod(generator.random((tokens, K)) < chance, axis=1)
        made = 1 + at_least.sum(axis=1)
        steps = int(np.searchsorted(np.cumsum(made), tokens - 1)) + 1
        worker = int(workers.argmin())
        start = float(workers[worker])
        chunks = start + 0.05 + STEP_SECONDS * np.arange(steps + 1)
        workers[worker] = chunks[-1]
        per_position = tuple(int(n) for n in at_least[:steps].sum(axis=0))
        spec = SpecCounters(steps, K * steps, sum(per_position), per_position) if chance else None
        ids = generator.integers(0, 49_152, tokens).tolist()
        answers.append(Answer(start, start, chunks.tolist(), tokens, "", ids, spec))
    total = sum_counters([answer.counters for answer in answers if answer.counters])
    nothing = SpecCounters(0, 0, 0, ())
    run = LoadRun(
        name,
        RemoteServer("http://far:1", "m", "m", 4096, None, K if chance else 0),
        Load(concurrency=concurrency),
        prompts,
    )
    run.rounds = [[Block(float(workers.max()), 1.0, answers)]]
    run.counters = [[ServerCounters(prompts, prompts * tokens, total or nothing)]]
    return run


def common(prompts: int, tokens: int, concurrency: int) -> dict[str, object]:
    """The settings that a report names."""
    return {
        "mode": "server", "target": {"path": "made up", "sha256": None}, "k": K, "rounds": 1,
        "temperature": 0.0, "max_tokens": tokens, "prompts": prompts, "dtype": "made up",
        "concurrency": str(concurrency), "loads": [f"concurrency {concurrency}"], "time": "now",
    }  # fmt: skip


def own(name: str, prompts: int, tokens: int, concurrency: int) -> dict[str, object]:
    """An arm's, which says whether it drafts."""
    method = "made up" if ARMS[name] else None
    return {**common(prompts, tokens, concurrency), "method": method, "draft": None}


if __name__ == "__main__":
    typer.run(main)

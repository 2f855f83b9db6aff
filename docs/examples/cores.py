"""Should vLLM's server keep a core back for its scheduler? Side by side, arm by arm.

Of each arm (no draft, and each draft given) two servers are started, one that keeps a core
(VLLM_CPU_NUM_OF_RESERVED_CPU=1, vLLM's own choice) and one that keeps none, and the same prompts go
to both in turns. Prints tokens/s of both with 95% intervals, and on how many threads each model
ran. An engine in process (`afaspec bench` without --serve, the demo) keeps none in any case.

    python docs/examples/cores.py --out runs/cores
    python docs/examples/cores.py TARGET --draft base=DRAFT --draft mine=MERGED --concurrency 1,4
    python docs/examples/cores.py --limit 2 --max-tokens 8 --rounds 1 --enforce-eager --out runs/try

Run it on a machine that does nothing else.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from afaspec.capture.adapted_target import open_target
from afaspec.cli.console import note, progress
from afaspec.pairs.names import open_draft
from bench.records.arms import Arm
from bench.records.progress import Progress
from bench.records.speeds import THROUGHPUT
from bench.report.console import stage_bars
from bench.server.arrivals import parse_loads
from bench.server.config import ServerConfig
from bench.server.run import run_server_bench
from drafts.files import write_json
from serving.server.process import ServerProcess, ServerSettings

RESERVED = "VLLM_CPU_NUM_OF_RESERVED_CPU"
KEPT = ("1", "0")
Json = dict[str, Any]


def main(
    target: Annotated[str, typer.Argument(help="As for afaspec bench.")] = "embedded",
    draft: Annotated[list[str] | None, typer.Option(help="NAME=FOLDER; repeatable.")] = None,
    prompts: Annotated[str, typer.Option(help="As for afaspec bench.")] = "suite:code",
    out: Annotated[Path, typer.Option(help="Folder of results and logs.")] = Path("runs/cores"),
    k: Annotated[int, typer.Option("--k")] = 3,
    limit: Annotated[int, typer.Option(help="Prompts.")] = 16,
    max_tokens: Annotated[int, typer.Option()] = 96,
    rounds: Annotated[int, typer.Option()] = 3,
    concurrency: Annotated[str, typer.Option(help="Loads: 1,4.")] = "1",
    enforce_eager: Annotated[bool, typer.Option("--enforce-eager")] = False,
) -> None:
    """Measure both ways of every arm; prints a table."""
    opened = open_target(target)
    named = [text.partition("=") for text in draft or ["base=embedded-draft"]]
    arms = [Arm("none"), *(Arm(name, open_draft(folder)) for name, _, folder in named)]
    config = ServerConfig(
        prompts=prompts, target=opened, loads=parse_loads(concurrency, None), limit=limit,
        max_tokens=max_tokens, rounds=rounds, ignore_eos=True,
    )  # fmt: skip
    flags = ("--enforce-eager",) if enforce_eager else ()
    rows: list[Json] = []
    for arm in arms:
        settings = {
            kept: ServerSettings(
                opened, arm.drafter, k, port=0, own_args=flags,
                log=out / f"server-{arm.name}-{kept}.log",
            )
            for kept in KEPT
        }  # fmt: skip
        note(f"{arm.name}: servers that keep {' and '.join(KEPT)} cores")
        with progress(refresh_per_second=1) as bars:
            rows += measured(arm, settings, config, stage_bars(bars))
        write_json(out / "cores.json", rows)
    Console(width=100).print(table(rows))


def measured(
    arm: Arm, settings: dict[str, ServerSettings], config: ServerConfig, stage: Progress
) -> list[Json]:
    """Of each load tokens/s of the arm's two servers, and the threads of their models."""
    with ExitStack() as stack:
        servers = {}
        for kept, one in settings.items():
            os.environ[RESERVED] = kept  # what is set counts more than afaspec's choice
            servers[kept] = stack.enter_context(ServerProcess(one))
        for done, server in enumerate(servers.values()):
            stage("starting servers", done, len(servers))
            server.wait_ready()
        stage("starting servers", len(servers), len(servers))
        threads = {kept: server.threads() for kept, server in servers.items()}
        urls = {f"keeps-{kept}": server.url for kept, server in servers.items()}
        report = run_server_bench(config, urls, stage)
    steps = [report.arms] if report.load is None else [step["arms"] for step in report.load]
    return [
        {
            "arm": arm.name,
            "load": load.words,
            "threads": threads,
            THROUGHPUT.rate: {
                kept: measured[THROUGHPUT.rate] for kept, measured in zip(KEPT, step, strict=True)
            },
        }
        for load, step in zip(config.loads, steps, strict=True)
    ]


def table(rows: list[Json]) -> Table:
    """A row for each arm and load."""
    made = Table("arm", "load", *(f"keeps {kept}: tokens/s (threads)" for kept in KEPT), "ratio")
    for row in rows:
        speeds = [row[THROUGHPUT.rate][kept] for kept in KEPT]
        cells = [
            f"{speed['value']:.1f} [{speed['low']:.1f}, {speed['high']:.1f}] "
            f"({row['threads'][kept]})"
            for kept, speed in zip(KEPT, speeds, strict=True)
        ]
        ratio = speeds[1]["value"] / speeds[0]["value"]
        made.add_row(row["arm"], row["load"], *cells, f"{ratio:.2f}")
    return made


if __name__ == "__main__":
    typer.run(main)

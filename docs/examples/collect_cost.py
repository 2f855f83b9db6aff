"""What does collecting traffic cost a server? Side by side: none, a share of 0.1, and everything.

Three servers of the same pair get the same prompts in turns; printed is the speed of each as a
share of the one that collects nothing, with 95% intervals.

    python docs/examples/collect_cost.py --out runs/collect-cost
    python docs/examples/collect_cost.py --limit 4 --max-tokens 16 --rounds 2 --out runs/try

Run it on a machine that does nothing else.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from afaspec.capture.adapted_target import open_target
from afaspec.cli.console import progress
from afaspec.pairs.names import open_draft
from bench.records.speeds import THROUGHPUT
from bench.report.console import stage_bars
from bench.report.files import write_report
from bench.server.arrivals import parse_loads
from bench.server.config import ServerConfig
from bench.server.run import run_server_bench
from serving.server.process import ServerProcess, ServerSettings
from serving.server.serve import collecting
from serving.traffic.recorder import CollectSettings

SHARES = {"none": None, "a-tenth": 0.1, "everything": 1.0}


def main(
    target: Annotated[str, typer.Argument(help="As for afaspec bench.")] = "embedded",
    draft: Annotated[str, typer.Option(help="Its draft.")] = "embedded-draft",
    out: Annotated[Path, typer.Option(help="Folder of results.")] = Path("runs/collect-cost"),
    limit: Annotated[int, typer.Option(help="Prompts.")] = 32,
    max_tokens: Annotated[int, typer.Option()] = 64,
    rounds: Annotated[int, typer.Option()] = 5,
    concurrency: Annotated[str, typer.Option(help="A load.")] = "4",
    enforce_eager: Annotated[bool, typer.Option("--enforce-eager")] = False,
) -> None:
    """Measure, write a report and print a table."""
    opened = open_target(target)
    config = ServerConfig(
        prompts="suite:code", target=opened, loads=parse_loads(concurrency, None), limit=limit,
        max_tokens=max_tokens, rounds=rounds, ignore_eos=True,
    )  # fmt: skip
    eager = ("--enforce-eager",) if enforce_eager else ()
    with ExitStack() as stack, progress(refresh_per_second=1) as bars:
        servers = {}
        for name, share in SHARES.items():
            kept = CollectSettings(str((out / f"traffic-{name}").absolute()), rate=share or 1.0)
            more = collecting(kept) if share else {}
            settings = ServerSettings(
                opened, open_draft(draft), port=0, log=out / f"server-{name}.log",
                **more | {"own_args": (*eager, *more.get("own_args", ()))},
            )  # fmt: skip
            servers[name] = stack.enter_context(ServerProcess(settings))
            servers[name].wait_ready()
        urls = {name: server.url for name, server in servers.items()}
        report = run_server_bench(config, urls, stage_bars(bars))
    write_report(report, out)
    table = Table("collects", "tokens/s", "of the one that collects nothing")
    for arm in report.arms:
        speed, ratio = arm[THROUGHPUT.rate], arm[THROUGHPUT.speedup]
        shown = f"{ratio['value']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})" if ratio else ""
        table.add_row(arm["name"], f"{speed['value']:.1f}", shown)
    Console(width=100).print(table)


if __name__ == "__main__":
    typer.run(main)

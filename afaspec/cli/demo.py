"""`afaspec demo`: the whole product once, on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    data: Annotated[
        str | None,
        typer.Option(help="Folder of source files or JSONL of your own (default: C++ headers)."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of all results.")] = Path("runs/demo"),
    train_prompts: Annotated[
        int | None, typer.Option(help="Prompts the target answers for training.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps of each arm.")] = None,
    tune: Annotated[
        bool | None,
        typer.Option(
            "--tune/--no-tune",
            help="Tune each arm's learning rate by short runs (default: only with --data).",
        ),
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="Rounds of measuring.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything.")] = None,
    enforce_eager: Annotated[
        bool | None, typer.Option("--enforce-eager", help="Do not compile in vLLM.")
    ] = None,
) -> None:
    """Adapt the embedded draft to another domain, and measure it in vLLM.

    Plain LoRA and AFA-LoRA train on the same data in the same order, each with its own learning
    rate; both are merged and benchmarked against the base draft and no speculation. A second run
    reuses what is there.

    [bold]Examples[/]

      afaspec demo

      afaspec demo --data path/to/my/source --out runs/mine
    """
    from rich.console import Console

    from afaspec.cli.console import console, progress
    from afaspec.config import load_config
    from afaspec.demo import DemoConfig, run_demo
    from bench.report.console import render_table, stage_bars
    from bench.report.words import headline
    from serving.runtime import require_vllm

    flags = {"data": data, "out": out, "train_prompts": train_prompts, "steps": steps}
    flags |= {"rounds": rounds, "seed": seed, "enforce_eager": enforce_eager}
    flags["tune"] = data is not None if tune is None else tune
    config = load_config(DemoConfig, None, flags)
    require_vllm()
    with progress() as bars:
        say = lambda text: bars.console.print(text, highlight=False, soft_wrap=True)  # noqa: E731
        finished = run_demo(config, stage_bars(bars), say)
    Console().print(render_table(finished.report))
    console.print(headline(finished.report.arms), highlight=False)
    console.print(f"Report: {finished.page}", highlight=False, soft_wrap=True)

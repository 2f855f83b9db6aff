"""`afaspec demo`: the whole product once, on this machine."""

from __future__ import annotations

from afaspec.cli.flags import configured
from afaspec.demo.config import DemoConfig


@configured(DemoConfig)
def demo(config: DemoConfig) -> None:
    """Adapt a general draft to another domain, and measure it in vLLM.

    Plain LoRA and AFA-LoRA train on the same data in the same order, each with its own learning
    rate; both are merged and benchmarked against the base draft, n-gram lookup and no speculation.
    General prompts are replayed, and the table says how much of the base draft's acceptance on
    others of them is kept. A second run reuses what is there.

    [bold]Examples[/]

      afaspec demo

      afaspec demo --data path/to/my/source --out runs/mine

      afaspec demo --target embedded --out runs/small
    """
    from rich.console import Console

    from afaspec.cli.console import console, note, progress
    from afaspec.demo.run import run_demo
    from bench.report.console import render_table, stage_bars
    from bench.report.words import sentences
    from serving.runtime import require_vllm

    if config.tune is None:
        config = config.model_copy(update={"tune": config.data is not None})
    require_vllm()
    with progress() as bars:
        finished = run_demo(config, stage_bars(bars), note)
    Console().print(render_table(finished.report))
    console.print(sentences(finished.report.arms), highlight=False)
    console.print(f"Report: {finished.page}", highlight=False, soft_wrap=True)

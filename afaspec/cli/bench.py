"""`afaspec bench`: measure drafts side by side in vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from afaspec.cli.flags import SuiteFolder, TargetAdapter


def bench(
    target: Annotated[str, typer.Argument(help="Folder of the target model, or 'embedded'.")],
    prompts: Annotated[
        str | None,
        typer.Option(help="JSONL file, folder of source files, dataset id, or suite:NAME."),
    ] = None,
    suite: Annotated[
        str | None, typer.Option(help="NAME or NAME/CATEGORY of a suite; see `afaspec suites`.")
    ] = None,
    size: Annotated[str | None, typer.Option(help="Of the suite: quick (default) or full.")] = None,
    suite_folder: SuiteFolder = None,
    draft: Annotated[
        list[str] | None,
        typer.Option(
            "--draft", help="NAME=FOLDER of a draft (or NAME=embedded-draft); repeatable."
        ),
    ] = None,
    target_adapter: TargetAdapter = None,
    ngram: Annotated[bool, typer.Option("--ngram", help="Also measure prompt lookup.")] = False,
    none: Annotated[
        bool,
        typer.Option("--none/--no-none", help="Measure without speculation too, for the speedup."),
    ] = True,
    out: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("runs/bench"),
    k: Annotated[int, typer.Option("--k", help="Speculative tokens per step.")] = 3,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "--max-new-tokens", help="Tokens to write per prompt.")
    ] = 128,
    rounds: Annotated[int, typer.Option(help="How often to run every prompt.")] = 3,
    concurrency: Annotated[int, typer.Option(help="Requests at once.")] = 1,
    limit: Annotated[int | None, typer.Option(help="Use at most this many prompts.")] = None,
    split: Annotated[
        str | None, typer.Option(help="Use only the 'eval' (or 'train') side of the prompts.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy, and checks the output.")] = 0.0,
    draft_sample_method: Annotated[
        str | None, typer.Option(help="How the draft samples at temperature > 0, by vLLM's names.")
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Always write all --max-tokens.")
    ] = False,
    prompt_tokens: Annotated[int, typer.Option(help="Prompt length cut from plain text.")] = 128,
    max_prompt_tokens: Annotated[
        int | None, typer.Option(help="Longest prompt allowed (default: what the target allows).")
    ] = None,
    truncate_prompts: Annotated[
        bool, typer.Option("--truncate-prompts", help="Keep the end of prompts that are too long.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="Type that vLLM computes in.")] = "bfloat16",
    enforce_eager: Annotated[
        bool, typer.Option("--enforce-eager", help="Do not compile: starts sooner, runs slower.")
    ] = False,
    cache_gib: Annotated[float, typer.Option(help="KV cache per engine, in GiB.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of sampling, choice and intervals.")] = 0,
) -> None:
    """Measure drafts side by side in vLLM: acceptance, speed, and whether the output is the same.

    Every draft is checked against the target before anything starts. Then the arms take turns,
    so that all meet the same machine. Writes report.html, report.json and plots to --out.

    [bold]Examples[/]

      afaspec bench embedded --prompts src/ --draft base=embedded-draft --draft mine=runs/merged

      afaspec bench models/target --prompts eval.jsonl --draft models/draft --ngram --rounds 5

      afaspec bench models/target --prompts src/ --draft base=models/draft --limit 50 --k 5

      afaspec bench embedded --suite builtin --draft base=embedded-draft
    """
    from rich.console import Console

    from afaspec.adapted_target import resolve_target
    from afaspec.cli.console import console, note, progress
    from bench.arms import choose_arms
    from bench.config import BenchConfig, as_split
    from bench.report import write_report
    from bench.run import run_bench
    from bench.suites import prompt_source
    from bench.summary import headline
    from bench.table import render_table, stage_bars

    config = BenchConfig(
        target=resolve_target(target, target_adapter, note),
        prompts=prompt_source(prompts, suite, size),
        suite_folder=suite_folder,
        arms=choose_arms([_resolved(text) for text in draft or []], none=none, ngram=ngram),
        k=k,
        max_tokens=max_tokens,
        rounds=rounds,
        concurrency=concurrency,
        temperature=temperature,
        seed=seed,
        limit=limit,
        split=as_split(split),
        prompt_tokens=prompt_tokens,
        max_prompt_tokens=max_prompt_tokens,
        truncate_prompts=truncate_prompts,
        ignore_eos=ignore_eos,
        dtype=dtype,
        enforce_eager=enforce_eager,
        cache_gib=cache_gib,
        draft_sample_method=draft_sample_method,
    )
    with progress() as bars:
        report = run_bench(config, stage_bars(bars), log_folder=out / "logs")
    page = write_report(report, out)
    Console().print(render_table(report))
    console.print(headline(report.arms), highlight=False)
    console.print(f"Report: {page}", highlight=False, soft_wrap=True)


def _resolved(text: str) -> str:
    """NAME=embedded-draft with the shipped draft's folder in place of its name."""
    from afaspec.embedded.assets import resolve_model

    name, _, folder = text.partition("=")
    return f"{name}={resolve_model(folder)}" if folder == "embedded-draft" else text

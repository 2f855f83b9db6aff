"""`afaspec sweep`: measure drafts over a grid of k, load, temperature and answer length."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from afaspec.cli.flags import TargetAdapter


def sweep(
    target: Annotated[str, typer.Argument(help="Folder of the target model, or 'embedded'.")],
    prompts: Annotated[
        str, typer.Option(help="What `afaspec bench` takes: JSONL file, folder, suite, dataset id.")
    ],
    draft: Annotated[
        list[str] | None,
        typer.Option(
            "--draft", help="NAME=FOLDER of a draft (or NAME=embedded-draft); repeatable."
        ),
    ] = None,
    target_adapter: TargetAdapter = None,
    ngram: Annotated[bool, typer.Option("--ngram", help="Also measure prompt lookup.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of cells and result.")] = Path("runs/sweep"),
    k: Annotated[
        str, typer.Option("--k", help="Speculative tokens per step: 1,2,3 or 1..8.")
    ] = "1,2,3,5",
    concurrency: Annotated[str, typer.Option(help="Requests at once.")] = "1,4",
    temperature: Annotated[str, typer.Option(help="Temperatures; 0 is greedy.")] = "0",
    max_tokens: Annotated[str, typer.Option(help="Tokens to write per prompt.")] = "128",
    draft_sample_method: Annotated[
        str, typer.Option(help="How drafts sample at temperature > 0: greedy, probabilistic.")
    ] = "greedy",
    rounds: Annotated[int, typer.Option(help="How often to run every prompt.")] = 2,
    together: Annotated[
        int, typer.Option(help="Engines with a draft loaded at a time, beside the one without.")
    ] = 4,
    limit: Annotated[int | None, typer.Option(help="Use at most this many prompts.")] = None,
    split: Annotated[
        str | None, typer.Option(help="Use only the 'eval' (or 'train') side of the prompts.")
    ] = None,
    suite_folder: Annotated[
        Path | None, typer.Option(help="Folder with the files of suites.")
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
    seed: Annotated[int, typer.Option(help="Seed of sampling and choice.")] = 0,
) -> None:
    """Measure drafts over a grid: which k is best at each load, and when to draft at all.

    Every cell is measured beside no speculation, in turns. Finished cells are kept in --out: a
    second run measures what is missing, and the grid may grow. Writes sweep.html, sweep.json,
    sweep.csv and plots there; `afaspec what-if` answers further questions from the same folder.

    [bold]Examples[/]

      afaspec sweep embedded --prompts src/ --draft base=embedded-draft --k 1..5 --concurrency 1,4

      afaspec sweep models/target --prompts eval.jsonl --draft models/draft --ngram --limit 64

      afaspec sweep models/target --prompts eval.jsonl --draft models/draft --temperature 0,0.8
      --draft-sample-method greedy,probabilistic --concurrency 1,8,32 --max-tokens 64,256
    """
    from afaspec.capture.adapted_target import resolve_target
    from afaspec.cli.console import console, note, progress
    from afaspec.cli.measure.bench import _resolved
    from bench.records.arms import choose_arms
    from bench.records.config import as_split
    from bench.report.console import stage_bars
    from bench.sweep.grid import SweepConfig, parse_axis
    from bench.sweep.page import headline
    from bench.sweep.plots import condition_name
    from bench.sweep.report import build_sweep, write_sweep
    from bench.sweep.run import run_sweep, sweep_provenance
    from drafts.files import require_writable

    require_writable(out)
    methods = tuple(part.strip() for part in draft_sample_method.split(","))
    config = SweepConfig(
        target=resolve_target(target, target_adapter, note),
        prompts=prompts,
        arms=choose_arms([_resolved(text) for text in draft or []], none=False, ngram=ngram),
        ks=parse_axis(k, "--k"),
        temperatures=parse_axis(temperature, "--temperature", float),
        concurrencies=parse_axis(concurrency, "--concurrency"),
        max_tokens=parse_axis(max_tokens, "--max-tokens"),
        sample_methods=methods,
        rounds=rounds,
        together=together,
        seed=seed,
        limit=limit,
        split=as_split(split),
        suite_folder=suite_folder,
        prompt_tokens=prompt_tokens,
        max_prompt_tokens=max_prompt_tokens,
        truncate_prompts=truncate_prompts,
        ignore_eos=ignore_eos,
        dtype=dtype,
        enforce_eager=enforce_eager,
        cache_gib=cache_gib,
    )
    with progress() as bars:
        results = run_sweep(config, out, stage_bars(bars))
    result = build_sweep(results, sweep_provenance(config, out))
    page = write_sweep(result, out)
    note(headline(result))
    for finding in result.findings:
        said = " ".join([*finding["words"], finding["advice"]])
        note(f"{finding['label']} ({condition_name(finding)}): {said}")
    for cell in result.cells:
        if cell["refused"]:
            reason = cell["refused"].splitlines()[0]
            note(f"Not run: {cell['label']}, k={cell['k']}: {reason}")
    console.print(f"Report: {page}", highlight=False, soft_wrap=True)

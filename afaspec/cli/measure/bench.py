"""`afaspec bench`: measure drafts side by side in vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from afaspec.cli.flags import GateFile, GateTolerance, SuiteFolder, TargetAdapter
from drafts.errors import UserError


def bench(
    target: Annotated[
        str | None,
        typer.Argument(help="Folder of the target model, or 'embedded'; with --url optional."),
    ] = None,
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
    concurrency: Annotated[
        str | None,
        typer.Option(
            help="Requests at once; of servers several, each a load: 1,4,16.", show_default="1"
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Use at most this many prompts.")] = None,
    split: Annotated[
        str | None, typer.Option(help="Use only the 'eval' (or 'train') side of the prompts.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy, and checks the output.")] = 0.0,
    draft_sample_method: Annotated[
        str | None, typer.Option(help="How the draft samples at temperature > 0, by vLLM's names.")
    ] = None,
    samples: Annotated[
        int,
        typer.Option(help="Requests per arm that test the distribution at temperature > 0; 0: no."),
    ] = 1000,
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
    url: Annotated[
        list[str] | None,
        typer.Option("--url", help="NAME=URL of a running vLLM server, an arm each; repeatable."),
    ] = None,
    serve: Annotated[
        str | None,
        typer.Option(help="Start a server for each arm and measure those: together or in-turn."),
    ] = None,
    server_args: Annotated[
        str, typer.Option(help="With --serve: flags for vLLM's servers, in one string.")
    ] = "",
    model: Annotated[
        str | None, typer.Option(help="Of servers: the name they serve the model by.")
    ] = None,
    request_rate: Annotated[
        str | None,
        typer.Option(help="Of servers: requests per second, at random times: 0.5,1,2 or inf."),
    ] = None,
    requests: Annotated[
        int | None,
        typer.Option(help="Of servers: requests in a round (default: each prompt once)."),
    ] = None,
    reuse_prefixes: Annotated[
        bool,
        typer.Option("--reuse-prefixes", help="Of servers: let prompts hit the prefix cache."),
    ] = False,
    gate: GateFile = None,
    gate_tolerance: GateTolerance = 0.0,
) -> None:
    """Measure drafts side by side in vLLM: acceptance, speed, and whether the output is the same.

    Every draft is checked against the target before anything starts. Then the arms take turns,
    so that all meet the same machine. Writes report.html, report.json and plots to --out.

    [bold]Examples[/]

      afaspec bench embedded --prompts src/ --draft base=embedded-draft --draft mine=runs/merged

      afaspec bench models/target --prompts eval.jsonl --draft models/draft --ngram --rounds 5

      afaspec bench models/target --prompts src/ --draft base=models/draft --limit 50 --k 5

      afaspec bench embedded --suite builtin --draft base=embedded-draft

      afaspec bench --url none=http://host:8000 --url mine=http://host:8001 --suite builtin

      afaspec bench embedded --serve together --draft base=embedded-draft --suite builtin
      --concurrency 1,4,16

      afaspec bench models/target --suite builtin --draft new=runs/new --gate baseline/report.json
    """
    from rich.console import Console

    from afaspec.capture.adapted_target import resolve_target
    from afaspec.cli.console import console, note, progress
    from afaspec.cli.measure.gate import hold, read_baseline
    from afaspec.cli.measure.servers import flags_of, measure, require_one_way
    from bench.engine.run import run_bench
    from bench.prompts.suites import prompt_source
    from bench.records.arms import choose_arms, parse_arm
    from bench.records.config import BenchConfig, as_split
    from bench.report.console import render_loads, render_table, stage_bars, warnings
    from bench.report.files import write_report
    from bench.report.words import headline
    from bench.runs.saved import SavedRun
    from bench.server.arrivals import parse_loads, whole
    from bench.server.config import ServerConfig
    from drafts.files import require_writable

    require_writable(out)  # now, not when all is measured
    source = prompt_source(prompts, suite, size)
    only_servers = {
        "--request-rate": request_rate, "--requests": requests, "--model": model,
        "--reuse-prefixes": reuse_prefixes, "--server-args": server_args,
    }  # fmt: skip
    of_servers = require_one_way(url or [], serve, only_servers)
    if target is None and not url:
        raise UserError("TARGET is missing", hint="give the target's folder, or 'embedded'")
    folder = None if target is None else resolve_target(target, target_adapter, note)
    early: dict[str, Any] = {
        "max_tokens": max_tokens, "temperature": temperature, "ignore_eos": ignore_eos,
        "mode": "server" if of_servers else None,
    }  # fmt: skip
    baseline = read_baseline(gate, early if of_servers else {**early, "k": k, "dtype": dtype})
    drafts = [_resolved(text) for text in draft or []]
    shared: dict[str, Any] = {
        "prompts": source,
        "suite_folder": suite_folder,
        "max_tokens": max_tokens,
        "rounds": rounds,
        "temperature": temperature,
        "seed": seed,
        "limit": limit,
        "split": as_split(split),
        "prompt_tokens": prompt_tokens,
        "max_prompt_tokens": max_prompt_tokens,
        "truncate_prompts": truncate_prompts,
        "ignore_eos": ignore_eos,
    }
    if of_servers:
        settings = ServerConfig(
            target=folder,
            loads=parse_loads(concurrency, request_rate),
            requests=requests,
            model=model,
            reuse_prefixes=reuse_prefixes,
            **shared,
        )
        arms = tuple(map(parse_arm, drafts)) if url else choose_arms(drafts, none=none, ngram=ngram)
        with progress(refresh_per_second=1) as bars:  # drawing them delays the streams
            report = measure(
                settings,
                url or [],
                serve,
                arms,
                stage_bars(bars),
                k=k,
                cache_gib=cache_gib,
                draft_sample_method=draft_sample_method,
                server_args=flags_of(server_args, dtype, enforce_eager),
                log_folder=out / "logs",
            )
    else:
        assert folder is not None
        config = BenchConfig(
            target=folder,
            arms=choose_arms(drafts, none=none, ngram=ngram),
            k=k,
            concurrency=whole(concurrency or "1"),
            dtype=dtype,
            enforce_eager=enforce_eager,
            cache_gib=cache_gib,
            draft_sample_method=draft_sample_method,
            samples=samples,
            **shared,
        )
        with progress() as bars:
            report = run_bench(config, stage_bars(bars), log_folder=out / "logs")
    page = write_report(report, out)
    Console().print(render_table(report))
    if of_servers:
        Console().print(render_loads(report))
        for warning in warnings(report):
            note(f"Warning: {warning}")
    console.print(headline(report.arms), highlight=False)
    console.print(f"Report: {page}", highlight=False, soft_wrap=True)
    if baseline is not None:
        hold(baseline, SavedRun(out.name, page.with_name("report.json"), report), gate_tolerance)


def _resolved(text: str) -> str:
    """NAME=embedded-draft with the shipped draft's folder in place of its name."""
    from afaspec.embedded.names import resolve_model

    name, _, folder = text.partition("=")
    return f"{name}={resolve_model(folder)}" if folder == "embedded-draft" else text

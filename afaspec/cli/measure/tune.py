"""`afaspec tune`: how many tokens to draft at each load on this machine, as vLLM takes it."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from afaspec.cli.flags import configured
from bench.records.settings import PromptSource
from bench.sweep.settings import SweepSettings
from drafts.errors import UserError


class TuneConfig(SweepSettings, PromptSource):
    """A sweep of one draft, and where the answer goes."""

    GROUP: ClassVar[str] = "Models"

    target: str = Field(description="folder or hub id of the target model, `smollm2` or `embedded`")
    draft: str = Field(description="folder or hub id of the draft, smollm2-draft or embedded-draft")
    target_adapter: Path | None = Field(
        None, description="LoRA adapter (PEFT) that the target is served with"
    )
    out: Path = Field(Path("runs/tune"), description="folder of cells and answer")


@configured(TuneConfig, arguments=("target",))
def tune(config: TuneConfig) -> None:
    """Measure --draft at each k and load on this machine, and write what to serve it with.

    Every k is measured beside no speculation, in turns. The answer is the k of which most can be
    said for sure, with all that were tried counted in; where that is less than 1, it is not to
    draft. speculative_config.json in --out is what vLLM's --speculative-config takes, with k by
    load. Finished cells are kept: a second run measures what is missing.

    [bold]Examples[/]

      afaspec tune smollm2 --draft smollm2-draft --suite builtin --k 1..5 --concurrency 1,4,8

      afaspec tune models/target --draft runs/merged --prompts traffic.jsonl --limit 32
    """
    from afaspec.capture.adapted_target import open_target
    from afaspec.cli.console import console, note, progress, working
    from afaspec.pairs.names import open_draft
    from bench.prompts.suites import prompt_source
    from bench.records.arms import Arm
    from bench.report.console import stage_bars
    from bench.sweep.best_k import ranges, speedup
    from bench.sweep.choose import choose
    from bench.sweep.grid import SweepConfig
    from bench.sweep.report import build_sweep, write_sweep
    from bench.sweep.run import run_sweep, sweep_provenance
    from drafts.files import require_writable, write_json
    from serving.speculation import speculative_config

    for name in ("temperatures", "max_tokens", "sample_methods"):
        if len(getattr(config, name)) > 1:
            raise UserError(
                f"tunes for one of --{name.replace('_', '-').removesuffix('s')} at a time",
                hint="run it again with another --out, or see `afaspec sweep`",
            )
    require_writable(config.out)
    with working("reading the models"):
        draft = open_draft(config.draft)
        settings = SweepConfig(
            **config.shared_with(SweepSettings),
            prompts=prompt_source(config.prompts, config.suite, config.size),
            target=open_target(config.target, config.target_adapter, note),
            arms=(Arm("draft", draft),),
        )
    with progress() as bars:
        results = run_sweep(settings, config.out, stage_bars(bars), note=note)
    measured = [one for one in results if one.series is not None]
    if not measured:
        raise UserError(f"nothing could be measured: {results[0].refused}")
    page = write_sweep(build_sweep(results, sweep_provenance(settings, config.out)), config.out)
    loads = sorted({one.concurrency for one in measured})
    choices = [
        choose(load, [speedup(one) for one in measured if one.concurrency == load])
        for load in loads
    ]
    for choice in choices:
        console.print(choice.words[0].upper() + choice.words[1:], highlight=False, markup=False)
    most = max(choice.k for choice in choices)
    if most == 0:
        note("Serve it without a draft on this machine.")
    else:
        answer = speculative_config(draft, most)
        assert answer is not None
        entries = ranges({choice.concurrency: choice.k for choice in choices})
        if len({k for *_, k in entries}) > 1:
            answer["num_speculative_tokens_per_batch_size"] = entries
        path = config.out / "speculative_config.json"
        write_json(path, answer)
        target = settings.target.folder
        note(f'vllm serve {target} --speculative-config "$(cat {path})"')
    note(f"Report: {page}")

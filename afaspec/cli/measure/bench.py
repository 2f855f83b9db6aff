"""`afaspec bench`: measure drafts side by side in vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field
from rich.console import Console

from afaspec.cli.console import console, note, progress, working
from afaspec.cli.flags import configured
from afaspec.cli.measure.gate import GateSettings, hold, read_baselines
from afaspec.cli.measure.models import ModelNames
from afaspec.cli.measure.servers import ServerFlags, measure, require_one_way
from bench.prompts.suites import prompt_source
from bench.records.settings import BenchSettings, ClientSettings, Listed, PromptSource
from bench.report.console import render_loads, render_table, stage_bars, warnings
from bench.report.schema import Report
from bench.report.words import sentences
from bench.runs.saved import SavedRun
from drafts.errors import UserError
from drafts.files import require_writable
from drafts.target.info import TargetInfo

if TYPE_CHECKING:
    from bench.records.arms import Arm


class BenchCommand(GateSettings, ServerFlags, PromptSource, ModelNames):
    """A run in process or against servers, with the names of what it opens."""

    GROUP: ClassVar[str] = "Measuring"

    target: str | None = Field(
        None,
        description="folder or hub id of the target model, `smollm2` or `embedded`; "
        "with --url optional",
    )
    none: bool = Field(True, description="measure without speculation too, for the speedup")
    concurrency: Listed | None = Field(
        None, description="requests at once; of servers several, each a load: 1,4,16 (default: 1)"
    )
    out: Path = Field(Path("runs/bench"), description="folder for the report")


@configured(BenchCommand, arguments=("target",))
def bench(config: BenchCommand) -> None:
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
    from afaspec.capture.adapted_target import open_target
    from bench.records.turns import forget_turns
    from bench.report.files import write_report

    require_writable(config.out)  # now, not when all is measured
    source = prompt_source(config.prompts, config.suite, config.size)
    require_one_way(config)
    target = None
    if config.target is not None:
        with working("reading the target"):
            target = open_target(config.target, config.target_adapter, note)
    elif not config.url:
        hint = "give the target's folder, a hub id, `smollm2` or `embedded`"
        raise UserError("TARGET is missing", hint=hint)
    baselines = read_baselines(config.gate, gated_settings(config))
    if baselines and config.chat_date is None and target is not None:
        date = baselines[0].report.provenance.get("chat_date")
        config = config.model_copy(update={"chat_date": date})
    if config.of_servers:
        report = measure_servers(config, target, source)
    else:
        assert target is not None
        report = measure_engines(config, target, source)
    page = write_report(report, config.out)
    forget_turns(config.out)
    Console().print(render_table(report))
    if config.of_servers:
        Console().print(render_loads(report))
    for warning in warnings(report):
        note(f"Warning: {warning}.")
    console.print(sentences(report.arms), highlight=False)
    console.print(f"Report: {page}", highlight=False, soft_wrap=True)
    if baselines:
        new = SavedRun(config.out.name, page.with_name("report.json"), report)
        hold(baselines, new, config.gate_tolerance)


def gated_settings(config: BenchCommand) -> dict[str, Any]:
    """What a baseline must share, as far as it is known before anything is measured."""
    names = ("max_tokens", "temperature", "ignore_eos")
    shared = {name: getattr(config, name) for name in names}
    if config.of_servers:
        return {**shared, "mode": "server"}
    return {**shared, "mode": None, "k": config.k, "dtype": config.dtype}


def measure_engines(config: BenchCommand, target: TargetInfo, source: str) -> Report:
    """The report of engines in this process's care, one for each arm."""
    from bench.engine.run import run_bench
    from bench.records.config import BenchConfig
    from bench.server.arrivals import whole

    settings = BenchConfig(
        **config.shared_with(BenchSettings),
        target=target,
        prompts=source,
        arms=_opened(config),
        concurrency=whole(config.concurrency or "1"),
    )
    with progress() as bars:
        return run_bench(
            settings, stage_bars(bars), log_folder=config.out / "logs", keep=config.out, note=note
        )


def measure_servers(config: BenchCommand, target: TargetInfo | None, source: str) -> Report:
    """The report of servers that run, or are started for it."""
    from afaspec.pairs.names import served_name
    from bench.server.arrivals import parse_loads
    from bench.server.config import ServerConfig

    settings = ServerConfig(
        **config.shared_with(ClientSettings),
        target=target,
        prompts=source,
        loads=parse_loads(config.concurrency, config.request_rate),
    )
    arms = _described(config) if config.url else _opened(config)
    name = served_name(config.target, config.target_adapter) if config.target else None
    with progress(refresh_per_second=1) as bars:  # drawing them delays the streams
        return measure(config, settings, arms, stage_bars(bars), config.out, name)


def _opened(config: BenchCommand) -> tuple[Arm, ...]:
    """The arms; without --k each block drafter's whole block."""
    from bench.records.arms import with_own_k

    arms = config.open_arms(none=config.none)
    return arms if "k" in config.model_fields_set else tuple(map(with_own_k, arms))


def _described(config: BenchCommand) -> tuple[Arm, ...]:
    """What the user says that servers at --url draft with; how they do is their own."""
    from bench.records.arms import parse_arm
    from serving.speculation import WITHOUT_FOLDER

    for name in WITHOUT_FOLDER:
        if getattr(config, name):
            raise UserError(
                f"--{name} is for engines and servers that are started here",
                hint=f"start a server so, and give --url {name}=URL",
            )
    arms = tuple(map(parse_arm, config.open_drafts()))
    if own := next((arm for arm in arms if arm.fields or arm.draft in WITHOUT_FOLDER), None):
        raise UserError(
            f"how the server {own.name!r} drafts is set where it is started",
            hint=f"give --draft {own.name}=FOLDER alone, or --serve",
        )
    return arms

"""LoRA against AFA-LoRA on a target: what finetune_sft.py and finetune_grpo.py have in common.

Both arms see the same data in the same order for as many steps, and begin with the same weights.
Each arm's learning rate is the best of the same few, by what it reaches on a validation part in a
whole run with a seed that is used for nothing else. With that rate the arm is trained once for each
seed and measured on a test part. Every run leaves its result, and while it runs a checkpoint: a
second call goes on where the first one stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from peft import LoraConfig, PeftModel
from rich.console import Console
from rich.table import Table
from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, set_seed

from afaspec.adapters.afa import adapt
from afaspec.adapters.callback import AnnealingCallback
from afaspec.adapters.schedule import AnnealingSchedule
from afaspec.capture.target_model import load_model
from afaspec.cli.console import note, progress
from afaspec.pairs.names import resolve_model
from bench.records.arms import LABELS
from bench.report.plots.style import COLOURS, INK, WIDTH, styled
from bench.stats.intervals import Quotient
from bench.stats.seeds import seeded_comparison, seeded_figure
from bench.stats.verdict import Comparison, correct
from drafts.errors import UserError
from drafts.files import atomic_file, read_json, write_json
from drafts.tensors import has_bf16

ARMS = ("lora", "afa-lora")
BASE = "the target as it is"
TUNING_SEED = 1000  # of the runs that choose a learning rate; no other run has it
SAVES = 4  # checkpoints of a run
Part = Literal["validation", "test"]
Json = dict[str, Any]
Stage = Callable[[str, int, int], None]

# Options of both examples' command lines.
Out = Annotated[Path, typer.Option(help="Folder of all results.")]
Target = Annotated[str, typer.Option(help="Target to fine-tune.")]
Steps = Annotated[int, typer.Option(help="Optimizer steps of each run.")]
Seeds = Annotated[int, typer.Option(help="Runs of each arm.")]
Rank = Annotated[int, typer.Option(help="LoRA rank.")]
Sigma = Annotated[str, typer.Option(help="AFA's activation.")]
End = Annotated[float, typer.Option(help="beta is 0 from this part of the run on.")]


@dataclass(frozen=True)
class Settings:
    """What the results depend on; `sizes` are those of the method alone."""

    target: str
    data: str
    steps: int
    seeds: int
    rates: list[float]
    rank: int
    sigma: str
    end: float
    sizes: dict[str, int]


@dataclass(frozen=True)
class Method:
    """A way to fine-tune, and how to tell what it brought.

    `trainer(model, arguments, callbacks)` makes a trainer from the arguments that both methods
    share. `measure(model, part, seed)` says for each item of a part what is summed and over how
    much: `metric` is the quotient of the sums. `curve` is its name in the trainer's log.
    """

    metric: str
    higher_is_better: bool
    curve: str
    trainer: Callable[[PeftModel, Json, list[TrainerCallback]], Trainer]
    measure: Callable[[Any, Part, int], tuple[list[float], list[float]]]


class Progress(TrainerCallback):
    """Tells a stage of the trainer's steps."""

    def __init__(self, name: str, stage: Stage):
        self.name, self.stage = name, stage

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.stage(self.name, state.global_step, state.max_steps)


def compare_arms(settings: Settings, method: Method, out: Path) -> None:
    """All runs, then table, `result.json` and `result.png` in the folder."""
    claim(settings, out)
    with progress() as bars:
        tasks: dict[str, Any] = {}

        def stage(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=total)
            bars.update(tasks[name], completed=done)

        base = measured_base(settings, method, out, stage)
        arms = {arm: trained_arm(settings, method, arm, out, stage) for arm in ARMS}
    result = summary(settings, method, base, arms)
    write_json(out / "result.json", result)
    draw(result, out / "result.png")
    show(result)


def claim(settings: Settings, out: Path) -> None:
    """Record the settings in the folder, or check that they are those recorded there."""
    path = out / "settings.json"
    if not path.exists():
        write_json(path, asdict(settings))
    elif read_json(path) != asdict(settings):
        raise UserError("holds results of other settings", where=out, hint="choose another --out")


def measured_base(settings: Settings, method: Method, out: Path, stage: Stage) -> Json:
    """The target as it is, on the test part."""
    path = out / "base.json"
    if not path.exists():
        model = load_model(resolve_model(settings.target), "float32")
        over, under = method.measure(model, "test", 0)
        write_json(path, {"over": over, "under": under})
    stage(BASE, 1, 1)
    return dict(read_json(path))


def trained_arm(settings: Settings, method: Method, arm: str, out: Path, stage: Stage) -> Json:
    """The arm's learning rate and its runs, one for each seed."""
    rates = settings.rates if len(settings.rates) > 1 else []  # one alone need not be tried
    tries = {
        rate: value_of(one_run(settings, method, arm, rate, TUNING_SEED, "validation", out, stage))
        for rate in rates
    }
    best = max if method.higher_is_better else min
    rate = best(tries, key=lambda tried: tries[tried]) if tries else settings.rates[0]
    runs = [
        one_run(settings, method, arm, rate, seed, "test", out, stage)
        for seed in range(settings.seeds)
    ]
    return {
        "rate": rate,
        "tries": {f"{tried:g}": value for tried, value in tries.items()},
        "at_edge": bool(tries) and rate in (min(tries), max(tries)),
        "runs": runs,
    }


def value_of(run: Json) -> float:
    return float(sum(run["over"]) / sum(run["under"]))


def one_run(
    settings: Settings,
    method: Method,
    arm: str,
    rate: float,
    seed: int,
    part: Part,
    out: Path,
    stage: Stage,
) -> Json:
    """Train and measure once; what is in the folder already is not made again."""
    folder = out / "runs" / f"{arm}-{rate:g}-seed-{seed}"
    name = f"{LABELS[arm]}, rate {rate:g}, " + (
        "tuning" if seed == TUNING_SEED else f"seed {seed + 1} of {settings.seeds}"
    )
    if not (folder / "result.json").exists():
        began, checkpoint = time.monotonic(), last_checkpoint(folder)
        set_seed(seed)
        model = adapt(
            load_model(resolve_model(settings.target), "float32"),
            LoraConfig(
                r=settings.rank,
                lora_alpha=2 * settings.rank,
                target_modules="all-linear",
                task_type="CAUSAL_LM",
            ),
            settings.sigma if arm == "afa-lora" else None,
        )
        callbacks: list[TrainerCallback] = [Progress(name, stage)]
        if arm == "afa-lora":
            callbacks.append(AnnealingCallback(AnnealingSchedule(end=settings.end)))
        trainer = method.trainer(model, arguments(settings, folder, rate, seed), callbacks)
        trainer.remove_callback(PrinterCallback)  # the progress bars say enough
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
        over, under = method.measure(model, part, seed)
        curve = [
            [entry["step"], entry[method.curve]]
            for entry in trainer.state.log_history
            if method.curve in entry
        ]
        seconds = None if checkpoint else time.monotonic() - began  # of a whole run alone
        result = {"over": over, "under": under, "curve": curve, "seconds": seconds}
        write_json(folder / "result.json", result)
    stage(name, settings.steps, settings.steps)
    return dict(read_json(folder / "result.json"))


def arguments(settings: Settings, folder: Path, rate: float, seed: int) -> Json:
    """The trainer's arguments that do not depend on the method."""
    return {
        "output_dir": str(folder),
        "max_steps": settings.steps,
        "learning_rate": rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": settings.steps // 20,
        "weight_decay": 0.0,
        "logging_steps": max(settings.steps // 20, 1),
        "save_strategy": "steps",
        "save_steps": max(settings.steps // SAVES, 1),
        "save_total_limit": 1,
        "gradient_checkpointing": False,
        "seed": seed,
        "report_to": [],
        "disable_tqdm": True,
        "log_level": "error",
        "use_cpu": not torch.cuda.is_available(),
        "bf16": has_bf16(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
    }


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end (its state is written last)."""
    whole = [path.parent for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/trainer_state.json")]
    return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2]))) if whole else None


def summary(settings: Settings, method: Method, base: Json, arms: dict[str, Json]) -> Json:
    """What result.json holds: figures with 95% intervals, and the arms compared in pairs."""
    tables = {BASE: table_of([base])} | {a: table_of(found["runs"]) for a, found in arms.items()}
    comparisons = [
        seeded_comparison(
            arm, other, method.metric, tables[arm], tables[other], paired_seeds=other != BASE
        )
        for arm, other in (("lora", BASE), ("afa-lora", BASE), ("afa-lora", "lora"))
    ]
    return {
        "settings": asdict(settings),
        "metric": method.metric,
        "higher_is_better": method.higher_is_better,
        "items": len(base["over"]),
        "figures": {
            name: seeded_figure(table.over, table.under).as_json() for name, table in tables.items()
        },
        "arms": {
            arm: {
                "rate": found["rate"],
                "rate_at_edge": found["at_edge"],
                "validation": found["tries"],
                "by_seed": [value_of(run) for run in found["runs"]],
                "curves": [run["curve"] for run in found["runs"]],
                "seconds": [run["seconds"] for run in found["runs"]],
            }
            for arm, found in arms.items()
        },
        "comparisons": [in_words(comparison) for comparison in correct(comparisons)],
    }


def in_words(comparison: Comparison) -> Json:
    """The comparison as JSON; its sentence is of methods, each trained with all seeds."""
    arm, against = (LABELS.get(name, name) for name in (comparison.arm, comparison.against))
    return {**comparison.as_json(), "words": replace(comparison, arm=arm, against=against).words}


def table_of(runs: list[Json]) -> Quotient:
    """[seeds, items] of what was measured."""
    return Quotient(np.array([r["over"] for r in runs]), np.array([r["under"] for r in runs]))


def show(result: Json) -> None:
    """The table, and the comparisons in words."""
    metric, settings = result["metric"], result["settings"]
    better = "higher" if result["higher_is_better"] else "lower"
    table = Table(
        title=f"{metric} on {result['items']} test items ({better} is better), "
        f"{settings['seeds']} seeds of {settings['steps']} steps",
        title_justify="left",
    )
    for column in ("", metric, "95% interval", "by seed", "learning rate", "seconds a run"):
        table.add_column(column)
    for name, found in result["figures"].items():
        interval = f"{found['low']:.4f} to {found['high']:.4f}" if found["low"] is not None else ""
        row = [LABELS.get(name, name), f"{found['value']:.4f}"]
        if name in ARMS:
            arm = result["arms"][name]
            rate = f"{arm['rate']:g}" + (" (end of the grid)" if arm["rate_at_edge"] else "")
            by_seed = ", ".join(f"{value:.4f}" for value in arm["by_seed"])
            whole = [seconds for seconds in arm["seconds"] if seconds is not None]
            table.add_row(*row, interval, by_seed, rate, f"{np.mean(whole):.0f}" if whole else "")
        else:
            table.add_row(*row, interval)
    Console().print(table)
    for comparison in result["comparisons"]:
        note(comparison["words"])
    if settings["seeds"] == 1:
        note("With one seed, the intervals say nothing of what another training would give.")


def draw(result: Json, path: Path) -> None:
    """The training curves of both arms, and what each seed reached on the test part."""
    with styled(), atomic_file(path) as temporary:
        from matplotlib import pyplot

        figure, (left, right) = pyplot.subplots(
            1, 2, figsize=(1.7 * WIDTH, 3.4), gridspec_kw={"width_ratios": [2, 1]}
        )
        for place, name in enumerate(ARMS):
            arm, found, colour = result["arms"][name], result["figures"][name], COLOURS[name]
            for curve in arm["curves"]:
                left.plot(*zip(*curve, strict=True), color=colour, linewidth=0.8, alpha=0.45)
            mean = np.mean(arm["curves"], axis=0)
            left.plot(mean[:, 0], mean[:, 1], color=colour, linewidth=2.2, label=LABELS[name])
            if found["low"] is not None:
                right.vlines(place, found["low"], found["high"], color=colour, linewidth=2)
            right.scatter([place] * len(arm["by_seed"]), arm["by_seed"], color=colour, s=22)
            right.hlines(found["value"], place - 0.18, place + 0.18, color=INK, linewidth=1.6)
        left.set_title(f"{result['metric']} in training")
        left.set_xlabel("optimizer step")
        left.legend()
        right.set_title("on the test part")
        right.set_xticks(range(len(ARMS)), [LABELS[name] for name in ARMS])
        right.set_xlim(-0.5, len(ARMS) - 0.5)
        for axes in (left, right):
            axes.grid(axis="y")
        figure.savefig(temporary, format="png", dpi=150, facecolor="white")

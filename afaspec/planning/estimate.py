"""From small runs to whole ones: time, disk, memory, money, and when a draft has paid for itself.

A stage takes what its start took in the sample and, for its work, as many times what the sample's
took as it has more prompts, steps or rounds.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from afaspec.capture.memory import choose_batch_size, free_memory, size
from afaspec.capture.plan import choose_device, plan_capture, settle
from afaspec.planning.config import PlanConfig
from afaspec.planning.samples import (
    BenchSample,
    CaptureSample,
    TrainSample,
    apart,
    sample_bench,
    sample_capture,
    sample_training,
)
from drafts.checkpoint.info import DraftInfo
from drafts.files import make_folder
from drafts.target.info import TargetInfo

GAINS = (1.2, 1.5, 2.0)  # times the speed without a draft
ENGINES = 3  # no speculation, the base draft, the adapted one
HOUR = 3600.0


@dataclass(frozen=True)
class Stage:
    """Seconds, bytes on the disk afterwards, and the most bytes of memory."""

    name: str
    seconds: float
    disk: int
    memory: int


@dataclass(frozen=True)
class Estimate:
    """All stages, what stands in their way, and the days until a gain has paid for them."""

    stages: tuple[Stage, ...]
    advice: tuple[str, ...]
    cost: float | None
    payback: dict[float, float]  # days by how many times as fast serving becomes

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "seconds": self.seconds}


def estimate(
    config: PlanConfig,
    target: TargetInfo,
    draft: DraftInfo,
    on_stage: Callable[[str], None] = lambda name: None,
    note: Callable[[str], None] = lambda text: None,
) -> Estimate:
    """Time small runs in `config.out`, which leave nothing there, and say what the whole takes.

    Raises `UserError` where the inputs do not fit, as the commands themselves would.
    """
    prompts, batch = counts(config, target, draft, note)
    make_folder(config.out)
    with TemporaryDirectory(prefix="samples-", dir=config.out) as folder:
        captured, trained, measured = (Path(folder, name) for name in ("store", "run", "bench"))
        on_stage("capture")
        few = min(config.sample or batch, prompts)
        small = config.model_copy(update={"out": captured, "batch_size": min(batch, few)})
        capture = apart(sample_capture, small, few)
        on_stage("train")
        run = config.of_a_run(captured, config.draft, trained)
        training = apart(sample_training, run)
        bench = None
        if config.bench_prompts:
            on_stage("bench")
            bench = apart(sample_bench, config, small.source, measured)
    return from_samples(config, prompts, capture, training, bench, draft)


def counts(
    config: PlanConfig, target: TargetInfo, draft: DraftInfo, note: Callable[[str], None]
) -> tuple[int, int]:
    """How many prompts are to be captured, and how many at a time."""
    setup = settle(config, target, draft)
    if config.self_prompts is not None:
        return config.self_prompts, min(config.batch_size or 64, config.self_prompts)
    plan = plan_capture(setup, note)
    return len(plan.prompts), config.batch_size or choose_batch_size(plan)


def from_samples(
    config: PlanConfig,
    prompts: int,
    capture: CaptureSample,
    training: TrainSample,
    bench: BenchSample | None,
    draft: DraftInfo,
) -> Estimate:
    """What the whole takes, by the samples of its stages."""
    run = config.of_a_run(config.out, config.draft, config.out)
    more = prompts / capture.prompts
    held_out = min(run.validation_limit, round(run.eval_fraction * prompts))
    evaluations = 1 + -(-config.steps // config.eval_every)
    draft_bytes = sum(path.stat().st_size for path in draft.folder.iterdir() if path.is_file())
    stages = [
        Stage(
            "capture",
            capture.start + more * capture.work,
            round(more * capture.store_bytes),
            capture.memory,
        ),
        Stage(
            "train",
            training.start
            + config.steps * training.step
            + evaluations * held_out * training.held_out,
            4 * draft_bytes if config.arm == "full" else draft_bytes,  # weights, AdamW, the merge
            training.memory,
        ),
    ]
    rate = config.serving_rate
    if bench is not None:
        tokens = config.rounds * config.bench_prompts * config.bench_tokens
        rates = bench.plain, bench.drafted, bench.drafted
        running = sum(tokens / each for each in rates)
        start = bench.start * ENGINES / 2
        stages.append(Stage("bench", start + running, 0, bench.memory * ENGINES // 2))
        rate = rate or bench.plain
    seconds = sum(stage.seconds for stage in stages)
    cost = None if config.price is None else config.price * seconds / HOUR
    return Estimate(
        tuple(stages),
        tuple(advice(config, stages, capture)),
        cost,
        payback(config, seconds, rate),
    )


def payback(config: PlanConfig, seconds: float, rate: float | None) -> dict[float, float]:
    """Days of serving until the time saved is the time spent, by the gain in speed."""
    if config.tokens_per_day is None or rate is None:
        return {}
    a_day = config.tokens_per_day / rate  # seconds of serving without a draft
    return {gain: seconds / (a_day * (1 - 1 / gain)) for gain in GAINS}


def advice(config: PlanConfig, stages: list[Stage], capture: CaptureSample) -> Iterator[str]:
    """What to change where it does not fit."""
    folder = config.out.absolute()
    while not folder.exists():
        folder = folder.parent
    free, wanted = shutil.disk_usage(folder).free, sum(stage.disk for stage in stages)
    if wanted > free:
        fits = int(free / capture.store_bytes * capture.prompts)
        smaller = {
            "bf16": "--features int8 (half of it), --features none (texts alone), ",
            "int8": "--features none (texts alone), ",
            "none": "",
        }[config.features]
        yield (
            f"the disk of {folder} has {size(free)} free, {size(wanted)} are wanted: give "
            f"{smaller}--limit {fits} or another disk"
        )
    held = free_memory(choose_device("auto"))
    for stage in stages:
        if stage.memory > held:
            less = {
                "train": "--batch-tokens 4096 or --gradient-checkpointing to afaspec train",
                "capture": "a lower --batch-size",
                "bench": "fewer arms at a time",
            }[stage.name]
            yield f"{stage.name} holds {size(stage.memory)}, {size(held)} are free: give {less}"

"""Small runs of what is planned, each in a process of its own, so that its memory is its own."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from afaspec.capture.config import CaptureConfig
from afaspec.planning.config import PlanConfig
from afaspec.train.config import TrainConfig

STEPS = 5  # of training that are timed, after a first that compiles
BENCH_PROMPTS = 4
Result = TypeVar("Result")


@dataclass(frozen=True)
class CaptureSample:
    """Seconds until the first token, those after it, what came of them, and the most bytes held."""

    start: float
    work: float
    prompts: int
    tokens: int
    store_bytes: int
    memory: int


@dataclass(frozen=True)
class TrainSample:
    """Seconds around the steps, of a step, and of a held-out sequence; parameters that train."""

    start: float
    step: float
    held_out: float
    memory: int


@dataclass(frozen=True)
class BenchSample:
    """Seconds until both engines ran, and tokens/s without a draft and with the base draft."""

    start: float
    plain: float
    drafted: float
    memory: int


def apart(function: Callable[..., Result], *given: Any) -> Result:
    """function(began, *given) in a fresh process, which `began` now by `time.time`: what it takes
    to start is a part of the work."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, time.time(), *given).result()


def sample_capture(began: float, config: CaptureConfig, prompts: int) -> CaptureSample:
    """Capture that many of the prompts into `config.out`."""
    from afaspec.capture.adapted_target import open_target
    from afaspec.capture.run import CaptureProgress, capture
    from afaspec.pairs.names import open_draft

    first: list[float] = []

    def tell(progress: CaptureProgress) -> None:
        first.append(time.time())

    assert config.draft
    target = open_target(config.target, config.target_adapter)
    limits = {"limit": prompts} if config.self_prompts is None else {"self_prompts": prompts}
    small = config.model_copy(update=limits)
    store = capture(small, target, open_draft(config.draft), tell)
    if not first:
        raise AssertionError("the sample was captured before")
    return CaptureSample(
        start=first[0] - began,
        work=time.time() - first[0],
        prompts=store.prompts,
        tokens=store.tokens,
        store_bytes=sum(shard.bytes for shard in store.manifest.shards),
        memory=_most_held(),
    )


def sample_training(began: float, config: TrainConfig) -> TrainSample:
    """A few steps on the sample's store."""
    from afaspec.capture.adapted_target import open_target
    from afaspec.pairs.names import open_draft
    from afaspec.store.read import FeatureStore
    from afaspec.train.loader import split_sequences
    from afaspec.train.run import train

    ends = [0.0]
    changes = {"steps": STEPS + 1, "eval_every": STEPS + 1, "checkpoint_every": STEPS + 1}
    small = config.model_copy(update={**changes, "tensorboard": False})
    store = FeatureStore.open(small.store)
    inputs = store, open_draft(small.draft), open_target(store.manifest.target["path"])
    train(small, *inputs, lambda row: ends.append(time.time()) if row["step"] else None)
    step = median(after - before for before, after in pairwise(ends[1:-1]))
    held_out = len(split_sequences(store, small)[1])
    evaluated = max(ends[-1] - ends[-2] - step, 0.0)
    return TrainSample(
        start=ends[1] - began - step - evaluated,
        step=step,
        held_out=evaluated / held_out,
        memory=_most_held(),
    )


def sample_bench(began: float, config: PlanConfig, prompts: str, logs: Path) -> BenchSample:
    """A few prompts in vLLM, once, without a draft and with the base draft."""
    from afaspec.capture.adapted_target import open_target
    from afaspec.pairs.names import open_draft
    from bench.engine.run import run_bench
    from bench.records.arms import Arm
    from bench.records.config import BenchConfig
    from bench.records.speeds import DECODE

    first: list[float] = []

    def tell(stage: str, done: int, total: int) -> None:
        if stage != "starting engines":
            first.append(time.time())

    target = open_target(config.target, config.target_adapter)
    arms = (Arm("none"), Arm("base", open_draft(config.draft)))
    report = run_bench(
        BenchConfig(
            target=target,
            prompts=prompts,
            arms=arms,
            k=config.draft_steps,
            max_tokens=config.bench_tokens,
            rounds=1,
            limit=BENCH_PROMPTS,
            enforce_eager=config.enforce_eager,
        ),
        tell,
        log_folder=logs,
    )
    plain, drafted = (arm[DECODE.rate]["value"] for arm in report.arms)
    return BenchSample(first[0] - began, plain, drafted, _most_held())


def _most_held() -> int:
    """Bytes of this process and its children at their most, or of the GPU where there is one."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_reserved())
    whose = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
    return 1024 * max(resource.getrusage(who).ru_maxrss for who in whose)

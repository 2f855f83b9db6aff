"""The demo: adapt a base draft to another domain, and measure what it brought and what it cost.

Every stage is a function of the toolkit that has a command of its own, and leaves its result in the
demo's folder: a second run reuses what is there.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import torch

from afaspec.capture.adapted_target import open_target
from afaspec.capture.config import CaptureConfig
from afaspec.capture.run import CaptureProgress, capture
from afaspec.checkpoints.merge import merge
from afaspec.demo.config import DemoConfig
from afaspec.demo.tasks import write_tasks
from afaspec.pairs.known import PAIRS, SMOLLM2, best_pair
from afaspec.pairs.names import open_draft
from afaspec.store.read import FeatureStore
from afaspec.train.config import Arm as ArmName
from afaspec.train.config import TrainConfig
from afaspec.train.metrics import training_curve
from afaspec.train.run import Trained, train
from bench.engine.run import run_bench
from bench.prompts.select import Split
from bench.records.arms import Arm
from bench.records.config import BenchConfig
from bench.report.files import read_report, write_report
from bench.report.schema import Report
from bench.stats.offline import offline_acceptance
from drafts.checkpoint.info import DraftInfo
from drafts.errors import UserError
from drafts.files import read_json, write_json
from drafts.registry import load_draft, read_draft
from drafts.target.info import TargetInfo

ARMS: tuple[ArmName, ...] = ("lora", "afa-lora")
SPLITS: tuple[Split, ...] = ("train", "eval")
Stage = Callable[[str, int, int], None]


@dataclass
class Demo:
    """The report, and where it lies."""

    report: Report
    page: Path


@dataclass(frozen=True)
class Inputs:
    """What every stage works on, opened, and how it reports."""

    config: DemoConfig
    target: TargetInfo
    base: DraftInfo
    stage: Stage
    say: Callable[[str], None]


def run_demo(config: DemoConfig, stage: Stage, say: Callable[[str], None]) -> Demo:
    """Capture, train both arms, merge, and measure. `stage(name, done, total)` follows progress."""
    config = complete(config, say)
    prepare_folder(config)
    if (config.out / "report.json").exists():
        return Demo(read_report(config.out / "report.json"), config.out / "report.html")
    assert config.target
    assert config.draft
    target, base = open_target(config.target), open_draft(config.draft)
    inputs = Inputs(config, target, base, stage, say)
    train_store, eval_store = (domain_store(inputs, split) for split in SPLITS)
    replayed = general_store(inputs, "train") if config.general and config.mix else None
    general_eval = general_store(inputs, "eval") if config.general else None

    drafts = {"base": base}
    curves: dict[str, Any] = {}
    for arm in ARMS:
        rate = None
        if config.tune:
            rate = tune_rate(inputs, train_store, replayed, arm)
            say(f"{arm}: learning rate {rate:g}, best in short runs")
        out = config.out / arm
        trained = train_arm(inputs, train_store, replayed, arm, rate, config.steps, out)
        merged = config.out / f"{arm}-merged"
        if not merged.exists():
            merge(trained.folder, base, merged, target)
        drafts[arm] = read_draft(merged)
        curves[arm] = training_curve(trained.folder)

    offline, general = {}, {}
    for done, (name, draft) in enumerate(drafts.items()):
        stage("offline acceptance", done, len(drafts))
        loaded = load_draft(draft, target)
        offline[name] = offline_acceptance(loaded, eval_store, config.k)
        if general_eval is not None:
            general[name] = offline_acceptance(loaded, general_eval, config.k)
    stage("offline acceptance", len(drafts), len(drafts))
    report = run_bench(
        BenchConfig(
            target=target,
            prompts=domain(config),
            arms=(
                Arm("none"),
                Arm("ngram", "ngram"),
                *(Arm(name, draft) for name, draft in drafts.items()),
            ),
            k=config.k,
            max_tokens=config.new_tokens,
            rounds=config.rounds,
            limit=config.eval_prompts,
            split="eval",
            prompt_tokens=config.prompt_tokens,
            seed=config.seed,
            enforce_eager=config.enforce_eager,
        ),
        stage,
        offline=offline,
        general=general,
        training=curves,
        log_folder=config.out / "logs",
    )
    return Demo(report, write_report(report, config.out))


def complete(config: DemoConfig, say: Callable[[str], None]) -> DemoConfig:
    """The configuration with a pair in it, where it names none. Raises `UserError` for half of one.

    A machine without the package that holds the real target is told so, and gets the embedded pair.
    """
    if config.target is None and config.draft is not None:
        raise UserError("--draft is for a target", hint="give --target too")
    if config.target is None:
        pair, missing = best_pair()
        if missing is not None:
            say(f"{missing}\nThe demo takes the embedded pair, whose target is a toy.")
    elif config.target in PAIRS:
        pair = PAIRS[config.target]
    elif config.draft is None:
        raise UserError(f"no draft is known for {config.target}", hint="give --draft too")
    else:
        return config
    return config.model_copy(
        update={
            "target": pair.target,
            "draft": config.draft or pair.draft,
            "general": config.general or str(pair.general),
        }
    )


def domain(config: DemoConfig) -> str:
    """The prompts that are adapted to: of the default, a chat model gets tasks."""
    if config.data is None and config.target == SMOLLM2.target:
        tasks = config.out / "tasks.jsonl"
        if not tasks.exists():
            write_tasks(tasks)
        return str(tasks)
    return config.data or str(cpp_headers())


def cpp_headers() -> Path:
    """The C++ headers of PyTorch: real text of another domain on every machine with afaspec."""
    return Path(torch.__file__).parent / "include"


def prepare_folder(config: DemoConfig) -> None:
    """Record the settings; results of other settings in the folder are set aside."""
    path, wanted = config.out / "demo.json", json.loads(config.model_dump_json())
    if path.exists() and read_json(path) != wanted:
        number = 1
        while (aside := config.out.with_name(f"{config.out.name}.{number}")).exists():
            number += 1
        config.out.rename(aside)
    if not path.exists():
        write_json(path, wanted)


def domain_store(inputs: Inputs, split: Split) -> FeatureStore:
    """The target's answers to one split of the domain's prompts."""
    config = inputs.config
    limit = config.train_prompts if split == "train" else config.eval_prompts
    return captured(inputs, domain(config), split, limit, "target answers", f"store-{split}")


def general_store(inputs: Inputs, split: Split) -> FeatureStore:
    """The target's answers to general prompts: to replay (train), as many as make up the share of
    what is learned, or to measure what is kept (eval)."""
    config = inputs.config
    assert config.general
    share = config.mix / (1 - config.mix)
    limit = ceil(share * config.train_prompts) if split == "train" else config.eval_prompts
    return captured(inputs, config.general, split, limit, "general answers", f"general-{split}")


def captured(
    inputs: Inputs, prompts: str, split: Split, limit: int, stage: str, folder: str
) -> FeatureStore:
    """The target's answers to `limit` prompts of one split."""
    config = inputs.config

    def on_progress(progress: CaptureProgress) -> None:
        inputs.stage(f"{stage} ({split})", int(progress.done), progress.total)

    settings = CaptureConfig(
        target=str(inputs.target.folder),
        prompts=prompts,
        out=config.out / folder,
        draft=inputs.base.folder,
        split=split,
        limit=limit,
        prompt_tokens=config.prompt_tokens,
        max_new_tokens=config.new_tokens,
        seed=config.seed,
    )
    return capture(settings, inputs.target, inputs.base, on_progress, inputs.say)


def train_arm(
    inputs: Inputs,
    store: FeatureStore,
    replayed: FeatureStore | None,
    arm: ArmName,
    rate: float | None,
    steps: int,
    out: Path,
) -> Trained:
    """One training run at the given or the default rate; all arms see the same data in order."""
    config = inputs.config
    name = f"training {arm}" if steps == config.steps else f"tuning {arm} at {rate:g}"
    settings = TrainConfig(
        store=store.folder,
        draft=inputs.base.folder,
        out=out,
        arm=arm,
        rank=config.rank,
        steps=steps,
        learning_rate=rate,
        draft_steps=config.k,
        eval_every=min(40, steps),
        checkpoint_every=40,
        seed=config.seed,
        mix=None if replayed is None else [f"{replayed.folder}={config.mix:g}"],
    )

    def report(row: dict[str, Any]) -> None:
        inputs.stage(name, row["step"], steps)

    return train(settings, store, inputs.base, inputs.target, report, note=inputs.say)


def tune_rate(
    inputs: Inputs, store: FeatureStore, replayed: FeatureStore | None, arm: ArmName
) -> float:
    """The peak rate with the best held-out acceptance in short runs; never sees the eval split."""
    config, folder = inputs.config, inputs.config.out / "tuning"

    def tried(rate: float) -> float:
        out = folder / f"{arm}-{rate:g}"
        return train_arm(inputs, store, replayed, arm, rate, config.tuning_steps, out).length

    return max(config.learning_rates, key=tried)

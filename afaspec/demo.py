"""The demo: adapt the Python-trained base draft to another domain and measure what it brought.

Every stage is a function of the toolkit that has a command of its own, and leaves its result in the
demo's folder: a second run reuses what is there.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from afaspec.capture.config import CaptureConfig
from afaspec.capture.run import CaptureProgress, capture
from afaspec.checkpoints.merge import merge
from afaspec.embedded.names import resolve_model
from afaspec.store.read import FeatureStore
from afaspec.train.config import Arm as ArmName
from afaspec.train.config import TrainConfig
from afaspec.train.run import Trained, train
from bench.engine.run import run_bench
from bench.records.acceptance import Acceptance
from bench.records.arms import Arm
from bench.records.config import BenchConfig
from bench.report.files import read_report, write_report
from bench.report.schema import Report
from bench.stats.offline import offline_acceptance
from drafts.files import read_json, write_json
from drafts.registry import load_draft, read_draft
from drafts.target import read_target

ARMS: tuple[ArmName, ...] = ("lora", "afa-lora")
Stage = Callable[[str, int, int], None]


class DemoConfig(BaseModel):
    """The demo's settings; the defaults fit twelve minutes on two cores."""

    model_config = ConfigDict(extra="forbid")

    data: str | None = Field(None, description="folder or JSONL of your own [default: C++ headers]")
    out: Path = Field(Path("runs/demo"), description="folder of all results")
    target: str = Field("embedded", description="target model")
    draft: str = Field("embedded-draft", description="base draft")
    train_prompts: int = Field(320, gt=1, description="prompts the target answers for training")
    eval_prompts: int = Field(20, gt=0, description="other prompts, for measuring")
    prompt_tokens: int = Field(96, gt=0, description="prompt length in plain text")
    new_tokens: int = Field(128, gt=0, description="tokens of each answer")
    steps: int = Field(240, gt=0, description="optimizer steps of each arm")
    tuning_steps: int = Field(40, gt=0, description="steps of each try of a learning rate")
    tune: bool = Field(False, description="tune each arm's learning rate by short runs first")
    learning_rates: list[float] = Field(
        [1.25e-3, 2.5e-3, 5e-3], min_length=1, description="peak rates tried for each arm"
    )
    rank: int = Field(32, gt=0, description="LoRA rank")
    k: int = Field(3, gt=0, description="speculative tokens per step")
    rounds: int = Field(2, gt=0, description="rounds of measuring")
    enforce_eager: bool = Field(False, description="do not compile in vLLM")
    seed: int = 0


@dataclass
class Demo:
    """The report, and where it lies."""

    report: Report
    page: Path


def run_demo(config: DemoConfig, stage: Stage, say: Callable[[str], None]) -> Demo:
    """Capture, train both arms, merge, and measure. `stage(name, done, total)` follows progress."""
    claim(config)
    if (config.out / "report.json").exists():
        return Demo(read_report(config.out / "report.json"), config.out / "report.html")
    target, base = resolve_model(config.target), resolve_model(config.draft)
    data = config.data or str(cpp_headers())
    train_store = captured(config, target, base, data, "train", config.train_prompts, stage, say)
    eval_store = captured(config, target, base, data, "eval", config.eval_prompts, stage, say)

    drafts = {"base": base}
    curves: dict[str, Any] = {}
    for arm in ARMS:
        rate = None
        if config.tune:
            rate = tuned_rate(config, arm, train_store, base, stage)
            say(f"{arm}: learning rate {rate:g}, best in short runs")
        trained = run_arm(
            config, arm, rate, config.steps, config.out / arm, train_store, base, stage
        )
        drafts[arm] = config.out / f"{arm}-merged"
        if not drafts[arm].exists():
            merge(trained.folder, base, drafts[arm], target)
        curves[arm] = training_curve(trained.folder)

    offline = {
        name: offline_of(folder, target, eval_store, config.k) for name, folder in drafts.items()
    }
    report = run_bench(
        BenchConfig(
            target=target,
            prompts=data,
            arms=(Arm("none"), *(Arm(name, read_draft(folder)) for name, folder in drafts.items())),
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
        training=curves,
        log_folder=config.out / "logs",
    )
    return Demo(report, write_report(report, config.out))


def cpp_headers() -> Path:
    """The C++ headers of PyTorch: real text of another domain on every machine with afaspec."""
    import torch

    return Path(torch.__file__).parent / "include"


def claim(config: DemoConfig) -> None:
    """Record the settings; results of other settings in the folder are set aside."""
    path, wanted = config.out / "demo.json", json.loads(config.model_dump_json())
    if path.exists() and read_json(path) != wanted:
        number = 1
        while (aside := config.out.with_name(f"{config.out.name}.{number}")).exists():
            number += 1
        config.out.rename(aside)
    if not path.exists():
        write_json(path, wanted)


def captured(
    config: DemoConfig,
    target: Path,
    base: Path,
    data: str,
    split: Any,
    limit: int,
    stage: Stage,
    say: Callable[[str], None],
) -> FeatureStore:
    """The target's answers on one side of the prompts."""

    def on_progress(progress: CaptureProgress) -> None:
        stage(f"target answers ({split})", int(progress.done), progress.total)

    settings = CaptureConfig(
        target=str(target),
        prompts=data,
        out=config.out / f"store-{split}",
        draft=base,
        split=split,
        limit=limit,
        prompt_tokens=config.prompt_tokens,
        max_new_tokens=config.new_tokens,
        seed=config.seed,
    )
    return capture(settings, on_progress, say)


def run_arm(
    config: DemoConfig,
    arm: ArmName,
    rate: float | None,
    steps: int,
    out: Path,
    store: FeatureStore,
    base: Path,
    stage: Stage,
) -> Trained:
    """One training run at the given or the default rate; all arms see the same data in order."""
    name = f"training {arm}" if steps == config.steps else f"tuning {arm} at {rate:g}"
    settings = TrainConfig(
        store=store.folder,
        draft=base,
        out=out,
        arm=arm,
        rank=config.rank,
        steps=steps,
        learning_rate=rate,
        draft_steps=config.k,
        eval_every=min(40, steps),
        checkpoint_every=40,
        seed=config.seed,
    )
    return train(settings, lambda row: stage(name, row["step"], steps))


def tuned_rate(
    config: DemoConfig, arm: ArmName, store: FeatureStore, base: Path, stage: Stage
) -> float:
    """The peak rate with the best held-out acceptance in short runs; never sees the eval side."""
    tries = {
        rate: run_arm(
            config,
            arm,
            rate,
            config.tuning_steps,
            config.out / "tuning" / f"{arm}-{rate:g}",
            store,
            base,
            stage,
        ).acceptance_length
        for rate in config.learning_rates
    }
    return max(tries, key=lambda rate: tries[rate])


def training_curve(run: Path) -> dict[str, list[Any]]:
    """Loss, rate, held-out acceptance and beta by step, as the report keeps them."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        key: [row.get(key) for row in rows]
        for key in ("step", "loss", "lr", "acceptance_length", "beta")
    }


def offline_of(draft: Path, target: Path, store: FeatureStore, k: int) -> Acceptance:
    """Offline acceptance of a plain draft on a store."""
    loaded = load_draft(read_draft(draft), read_target(target)).eval()
    return offline_acceptance(loaded, (store[i] for i in range(len(store))), k)

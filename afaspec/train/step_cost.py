"""What a step of AFA-LoRA costs beside one of plain LoRA: `python -m afaspec.train.step_cost`.

Both arms live in one process and take turns, step by step, on the same batches; the figure is the
ratio of their times with a bootstrap interval over pairs of steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from afaspec.adapters.annealing import Annealer, annealed_layers
from afaspec.store.read import FeatureStore
from afaspec.train.arm import make_objective, prepare_arm
from afaspec.train.config import DEFAULT_LEARNING_RATES, Arm, TrainConfig
from afaspec.train.loader import draw, split_sequences
from afaspec.train.objective import collate
from bench.stats.resample import Figure, Resampler, figure, ratio
from drafts.registry import load_draft, read_draft
from drafts.target import TargetInfo, read_target


def stepper(config: TrainConfig, target: TargetInfo) -> Callable[[int], float]:
    """A function that runs training step number i of the arm and returns its seconds."""
    store = FeatureStore.open(config.store)
    ids, _ = split_sequences(len(store), config)
    torch.manual_seed(config.seed)
    draft = load_draft(read_draft(config.draft), target)
    _, trained = prepare_arm(draft, config)
    objective = make_objective(draft, target, config)
    optimizer = torch.optim.AdamW(trained, lr=DEFAULT_LEARNING_RATES[config.arm], fused=True)
    Annealer(annealed_layers(draft), config.annealing, 10**9).follow(optimizer)  # beta stays 1

    def step(i: int) -> float:
        batch = collate([store[j] for j in draw(ids, config, i)])
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            loss = objective(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - started

    return step


def step_cost(store: Path, draft: Path, target: Path, pairs: int = 40) -> Figure:
    """Seconds of an AFA-LoRA step over seconds of a LoRA step, while beta is 1."""
    arms: tuple[Arm, ...] = ("afa-lora", "lora")
    steppers = [
        stepper(TrainConfig(store=store, draft=draft, out=store, arm=arm), read_target(target))
        for arm in arms
    ]
    for step in steppers:  # compile and warm up
        for i in range(3):
            step(i)
    times = np.array([[step(i) for step in steppers[:: 1 - 2 * (i % 2)]] for i in range(pairs)])
    times[1::2] = times[1::2, ::-1]  # every other pair ran LoRA first
    resampler = Resampler(pairs)
    return figure(ratio(resampler.sums(times[:, 0]), resampler.sums(times[:, 1])))


def main(
    store: Annotated[Path, typer.Option(help="Feature store.")],
    draft: Annotated[Path, typer.Option(help="Base draft.")],
    target: Annotated[Path, typer.Option(help="Target model.")],
    pairs: Annotated[int, typer.Option(help="Pairs of steps.")] = 40,
) -> None:
    """Time AFA-LoRA's training step against plain LoRA's, side by side."""
    cost = step_cost(store, draft, target, pairs)
    typer.echo(
        f"AFA-LoRA / LoRA, seconds per step: {cost.value:.4f} "
        f"(95% interval {cost.low:.4f} to {cost.high:.4f}, {pairs} pairs)"
    )


if __name__ == "__main__":
    typer.run(main)

"""What a training step costs, measured on random data of a given length.

`time_step` tells a study beforehand. `python -m afaspec.train.step_cost` sets AFA-LoRA beside plain
LoRA: both live in one process and take turns, step by step, and the figure is the quotient of their
times with a bootstrap interval over pairs of steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from accelerate import Accelerator

from afaspec.embedded.names import open_draft, resolve_model
from afaspec.train.arm import Setup, set_up
from afaspec.train.config import Arm, TrainConfig
from afaspec.train.objective import Batch
from afaspec.train.step import training_step
from bench.stats.resample import Figure, Resampler, figure, ratio
from drafts.checkpoint.info import DraftInfo
from drafts.nn.interface import Draft
from drafts.target import TargetInfo, read_target

TOKENS = (96, 128)  # of the prompt and of the answer


@dataclass(frozen=True)
class StepCost:
    """Seconds of an optimizer step, and the parameters that it trains."""

    seconds: float
    trainable: int
    total: int


def time_step(
    config: TrainConfig, draft: DraftInfo, target: TargetInfo, tokens: tuple[int, int] = TOKENS
) -> StepCost:
    """Time a step of an arm on `tokens` (prompt, answer): the second, for the first compiles."""
    setup, step = stepper(config, draft, target, tokens)
    step()
    seconds = step()
    trainable = sum(p.numel() for p in setup.parameters)
    added = 0 if config.arm == "full" else trainable
    return StepCost(seconds, trainable, sum(p.numel() for p in setup.draft.parameters()) - added)


def relative_cost(
    draft: DraftInfo, target: TargetInfo, tokens: tuple[int, int] = TOKENS, pairs: int = 40
) -> Figure:
    """Seconds of an AFA-LoRA step over seconds of a LoRA step, while beta is 1."""
    arms: tuple[Arm, ...] = ("afa-lora", "lora")
    configs = [TrainConfig(store="", draft=draft.folder, out="", arm=arm) for arm in arms]
    steps = [stepper(config, draft, target, tokens)[1] for config in configs]
    for step in steps:  # compile and warm up
        for _ in range(3):
            step()
    times = np.array([[step() for step in steps[:: 1 - 2 * (i % 2)]] for i in range(pairs)])
    times[1::2] = times[1::2, ::-1]  # every other pair ran LoRA first
    resampler = Resampler(pairs)
    return figure(ratio(resampler.sums(times[:, 0]), resampler.sums(times[:, 1])))


def stepper(
    config: TrainConfig, draft: DraftInfo, target: TargetInfo, tokens: tuple[int, int]
) -> tuple[Setup, Callable[[], float]]:
    """The arm as it begins, and a function that runs a step of it and returns its seconds."""
    accelerator = Accelerator()
    setup = set_up(config, draft, target, accelerator.device)
    batch = random_batch(setup.draft, config.batch_size, tokens, target.hidden_size)
    batch = batch.to(accelerator.device)
    losses = [lambda: setup.objective(batch)] * config.accumulation

    def step() -> float:
        started = time.perf_counter()
        training_step(
            accelerator,
            losses,
            setup.parameters,
            [setup.optimizer],
            clip=config.clip,
            bf16=config.bf16,
        )
        return time.perf_counter() - started

    return setup, step


def random_batch(draft: Draft, rows: int, tokens: tuple[int, int], width: int) -> Batch:
    """`rows` sequences of `tokens` (prompt, answer), as from a target of that hidden size."""
    prompt, answer = tokens
    shape = (rows, prompt + answer)
    layers = draft.feature_size // width if draft.reads == "layers" else 0
    return Batch(
        input_ids=torch.randint(draft.vocab_size, shape),
        loss_mask=(torch.arange(prompt + answer) >= prompt).expand(shape).clone(),
        hidden=torch.randn(*shape, layers * width).bfloat16(),
        final=torch.randn(*shape, width).bfloat16(),
    )


def main(
    draft: Annotated[Path, typer.Option(help="Base draft.")],
    target: Annotated[Path, typer.Option(help="Target model.")],
    pairs: Annotated[int, typer.Option(help="Pairs of steps.")] = 40,
) -> None:
    """Time AFA-LoRA's training step against plain LoRA's, side by side."""
    opened = open_draft(draft), read_target(resolve_model(target))
    cost = relative_cost(*opened, pairs=pairs)
    typer.echo(
        f"AFA-LoRA / LoRA, seconds per step: {cost.value:.4f} "
        f"(95% interval {cost.low:.4f} to {cost.high:.4f}, {pairs} pairs)"
    )


if __name__ == "__main__":
    typer.run(main)

"""What a training step costs, measured on random data of a given length."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from afaspec.train.arm import set_up
from afaspec.train.config import TrainConfig
from afaspec.train.objective import Batch
from afaspec.train.step import training_step
from drafts.checkpoint.info import DraftInfo
from drafts.nn.interface import Draft
from drafts.target.info import TargetInfo


@dataclass(frozen=True)
class StepCost:
    """Seconds of an optimizer step, and the parameters that it trains."""

    seconds: float
    trainable: int
    total: int


def time_step(
    config: TrainConfig, draft: DraftInfo, target: TargetInfo, tokens: tuple[int, int]
) -> StepCost:
    """Time a step of an arm on `tokens` (prompt, answer): the second, for the first compiles."""
    accelerator = Accelerator()
    config = config.on(accelerator.device)
    setup = set_up(config, draft, target, accelerator.device)
    batch = random_batch(setup.draft, config.batch_size, tokens, target.hidden_size)
    batch = batch.to(accelerator.device)
    losses = [lambda: setup.objective(batch)] * config.accumulation
    for _ in range(2):
        started = time.perf_counter()
        training_step(
            accelerator,
            losses,
            setup.parameters,
            [setup.optimizer],
            clip=config.clip,
            bf16=config.bf16,
        )
        seconds = time.perf_counter() - started
    trainable = sum(p.numel() for p in setup.parameters)
    added = 0 if config.arm == "full" else trainable
    return StepCost(seconds, trainable, sum(p.numel() for p in setup.draft.parameters()) - added)


def random_batch(draft: Draft, rows: int, tokens: tuple[int, int], width: int) -> Batch:
    """`rows` sequences of `tokens` (prompt, answer), as from a target of that hidden size."""
    prompt, answer = tokens
    length, n = prompt + answer, rows * (prompt + answer)
    layers = draft.feature_size // width if draft.reads == "layers" else 0
    return Batch(
        input_ids=torch.randint(draft.vocab_size, (n,)),
        loss_mask=(torch.arange(length) >= prompt).repeat(rows),
        hidden=torch.randn(n, layers * width).bfloat16(),
        final=torch.randn(n, width).bfloat16(),
        lengths=[length] * rows,
    )

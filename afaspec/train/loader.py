"""Which sequences a run trains on, and when: a function of seed and step alone.

So every arm sees the same batches, and a killed run goes on exactly where it was.
"""

from __future__ import annotations

import torch

from afaspec.train.config import TrainConfig
from drafts.errors import UserError


def split_sequences(count: int, config: TrainConfig) -> tuple[list[int], list[int]]:
    """Sequence indices for training and the held-out ones, shuffled by the seed 0 for all arms."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    held = max(1, round(count * config.validation))
    if count - held < 1:
        raise UserError(
            f"holds {count} sequences, too few to hold some out",
            where=config.store,
            hint="capture more prompts",
        )
    return order[held:], order[: min(held, config.validation_limit)]


def draw(train_ids: list[int], config: TrainConfig, batch: int) -> list[int]:
    """The sequences of micro-batch number `batch`: epochs in seeded order, none skipped."""
    picked = []
    for i in range(batch * config.batch_size, (batch + 1) * config.batch_size):
        epoch, offset = divmod(i, len(train_ids))
        seed = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
        picked.append(train_ids[torch.randperm(len(train_ids), generator=seed)[offset]])
    return picked

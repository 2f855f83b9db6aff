"""Which sequences a run trains on, and when: a function of seed and step alone.

So every arm sees the same batches, and a killed run goes on exactly where it was.
"""

from __future__ import annotations

import torch

from afaspec.store.division import divide
from afaspec.store.read import FeatureStore
from afaspec.train.config import TrainConfig


def split_sequences(store: FeatureStore, config: TrainConfig) -> tuple[list[int], list[int]]:
    """Sequence numbers to train on and those to evaluate, the same for all arms and seeds."""
    division = divide(store, config.eval_fraction, limit=config.validation_limit)
    return division.train, division.held_out


def draw(train_ids: list[int], config: TrainConfig, batch: int) -> list[int]:
    """The sequences of micro-batch number `batch`: epochs in seeded order, none skipped."""
    picked = []
    for i in range(batch * config.batch_size, (batch + 1) * config.batch_size):
        epoch, offset = divmod(i, len(train_ids))
        seed = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
        picked.append(train_ids[torch.randperm(len(train_ids), generator=seed)[offset]])
    return picked

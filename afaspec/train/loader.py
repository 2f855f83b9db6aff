"""Which sequences a run trains on, and when: a function of seed and step alone.

So every arm sees the same batches, and a killed run goes on exactly where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from afaspec.store.read import FeatureStore
from afaspec.train.config import TrainConfig
from afaspec.train.objective import DraftObjective, collate
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
        picked.append(train_ids[epoch_order(len(train_ids), config.seed, epoch)[offset]])
    return picked


@lru_cache(maxsize=2)  # a batch may lie across the end of an epoch
def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """The order of an epoch's sequences, [count]."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator)


def load_tokens(store: FeatureStore, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Ids and masks [batch, n] of sequences, right-padded, without their hidden states."""
    pairs = [store.tokens_at(index) for index in indices]
    ids, masks = [ids for ids, _ in pairs], [mask for _, mask in pairs]
    return pad_sequence(ids, batch_first=True), pad_sequence(masks, batch_first=True)


@dataclass(frozen=True)
class Batches:
    """The micro-batches of each optimizer step, each divided among the processes."""

    config: TrainConfig
    store: FeatureStore
    train_ids: list[int]
    objective: DraftObjective
    accelerator: Accelerator

    def sequences(self, step: int) -> list[list[int]]:
        """The sequences of each micro-batch of the 0-based `step`, those of all processes."""
        micros = range(step * self.config.accumulation, (step + 1) * self.config.accumulation)
        return [draw(self.train_ids, self.config, micro) for micro in micros]

    def losses(self, step: int) -> list[Callable[[], Tensor]]:
        """This process's losses of the step, one for each micro-batch.

        With those of the other processes they add up to the mean loss over the tokens of the whole
        step: however it is divided, its gradient is that of one large batch.
        """
        own, processes = self.accelerator.process_index, self.accelerator.num_processes
        mine = [micro[own::processes] for micro in self.sequences(step)]
        ids, masks = load_tokens(self.store, [*chain.from_iterable(mine)])
        device = self.accelerator.device
        tokens = self.objective.tokens(ids.to(device), masks.to(device))
        tokens = self.accelerator.reduce(tokens, reduction="sum")
        return [partial(self._loss, micro, tokens) for micro in mine]

    def _loss(self, micro: list[int], tokens: Tensor) -> Tensor:
        batch = collate([self.store[index] for index in micro])
        loss: Tensor = self.objective(batch.to(self.accelerator.device), tokens)
        return loss

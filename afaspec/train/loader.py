"""Which sequences a run trains on, and when: a function of seed and step alone.

So every arm sees the same batches, and a killed run goes on exactly where it was. They are read
from disk while those before them are computed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache, partial
from itertools import chain
from typing import Any, Self

import torch
from accelerate import Accelerator
from torch import Tensor

from afaspec.store.division import Numbers, divide
from afaspec.store.read import FeatureStore
from afaspec.train.checks import check_features
from afaspec.train.config import TrainConfig
from afaspec.train.mix import Part
from afaspec.train.objective import Batch, DraftObjective, collate
from drafts.nn.packing import packs

Drawn = tuple[int, int]  # the number of a part, and of a sequence in its store
AHEAD = 2  # micro-batches that are in memory before they are needed


def split_sequences(store: FeatureStore, config: TrainConfig) -> tuple[Numbers, Numbers]:
    """Sequence numbers to train on and those to evaluate, the same for all arms and seeds."""
    division = divide(store, config.eval_fraction, limit=config.validation_limit)
    return division.train, division.held_out


def draw(parts: Sequence[Part], config: TrainConfig, batch: int) -> list[Drawn]:
    """The sequences of micro-batch number `batch`: epochs of each part in seeded order, none
    skipped."""
    picked = []
    shares = [part.share for part in parts[1:]]
    for i in range(batch * config.batch_size, (batch + 1) * config.batch_size):
        number, turn = turn_of(i, shares)
        ids = parts[number].train
        epoch, offset = divmod(turn, len(ids))
        place = int(epoch_order(len(ids), config.seed, epoch)[offset])
        picked.append((number, int(ids[place])))
    return picked


def turn_of(draw: int, shares: Sequence[Fraction]) -> tuple[int, int]:
    """Of the 0-based `draw`: whose turn it is, and how often it was its turn before.

    Number 1 and on have `shares` of all draws, spread evenly; the rest are the domain's, number 0,
    in the same order as without any others.
    """
    left = Fraction(1)
    for number, share in enumerate(shares, 1):
        before, after = (int(n * share / left) for n in (draw, draw + 1))
        if after > before:
            return number, before
        draw, left = draw - before, left - share
    return 0, draw


@lru_cache(maxsize=16)  # a batch may lie across the ends of epochs, of several parts
def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """The order of an epoch's sequences, [count]."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator, dtype=torch.int32)


@dataclass(frozen=True)
class Batches:
    """The micro-batches of each optimizer step, each divided among the processes."""

    config: TrainConfig
    parts: Sequence[Part]
    objective: DraftObjective
    accelerator: Accelerator

    def sequences(self, step: int) -> list[list[Drawn]]:
        """The sequences of each micro-batch of the 0-based `step`, those of all processes."""
        micros = range(step * self.config.accumulation, (step + 1) * self.config.accumulation)
        return [draw(self.parts, self.config, micro) for micro in micros]

    def check(self, step: int) -> None:
        """Raise `UserError` where hidden states of the 0-based `step` are not finite."""
        drawn = [*chain.from_iterable(self.sequences(step))]
        for number, part in enumerate(self.parts):
            check_features(part.store, [index for whose, index in drawn if whose == number])

    def losses(
        self, step: int, read: Callable[[list[Drawn]], Batch] | None = None
    ) -> list[Callable[[], Tensor]]:
        """This process's losses of the step, one for each micro-batch, which `read` gives.

        With those of the other processes they add up to the mean loss over the tokens of the whole
        step: however it is divided, its gradient is that of one large batch.
        """
        mine = self.mine(step)
        tokens = self.accelerator.reduce(self._tokens(mine), reduction="sum").cpu()
        return [partial(self._loss, micro, tokens, read or self.read) for micro in mine]

    def mine(self, step: int) -> list[list[Drawn]]:
        """This process's micro-batches of the step."""
        own, processes = self.accelerator.process_index, self.accelerator.num_processes
        divided = [micro[own::processes] for micro in self.sequences(step)]
        return [part for micro in divided for part in self.in_parts(micro)]

    def in_parts(self, micro: list[Drawn]) -> Iterator[list[Drawn]]:
        """A micro-batch in parts of `batch_tokens`; a sequence of more is one of its own."""
        lengths = [part.store.length for part in self.parts]
        return packs(micro, lambda drawn: lengths[drawn[0]](drawn[1]), self.config.batch_tokens)

    def read(self, micro: list[Drawn]) -> Batch:
        """A micro-batch from its stores, where a GPU can fetch it while it computes."""
        found = [
            iter([*part.store.read(index for whose, index in micro if whose == number)])
            for number, part in enumerate(self.parts)
        ]
        batch = collate([next(found[number]) for number, _ in micro])
        return batch.pinned() if self.accelerator.device.type == "cuda" else batch

    def _tokens(self, mine: Sequence[Sequence[Drawn]]) -> Tensor:
        """How many tokens each draft step's loss is taken over; no hidden states are read."""
        drawn = chain.from_iterable(mine)
        pairs = [self.parts[number].store.tokens_at(index) for number, index in drawn]
        device = self.accelerator.device
        ids, masks = (torch.cat(tensors).to(device) for tensors in zip(*pairs, strict=True))
        return self.objective.tokens(ids, masks, [len(ids) for ids, _ in pairs]).to(device)

    def _loss(
        self, micro: list[Drawn], tokens: Tensor, read: Callable[[list[Drawn]], Batch]
    ) -> Tensor:
        loss: Tensor = self.objective(read(micro).to(self.accelerator.device), tokens)
        return loss


class ReadAhead:
    """Gives this process's micro-batches of some steps, in order, `AHEAD` of them read before.

    A context manager: its thread ends with it.
    """

    def __init__(self, batches: Batches, steps: range):
        self._batches = batches
        self._left = chain.from_iterable(map(batches.mine, steps))
        self._coming: deque[tuple[list[Drawn], Future[Batch]]] = deque()
        self._thread = ThreadPoolExecutor(1, "read-ahead")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self._thread.shutdown(cancel_futures=True)

    def __call__(self, micro: list[Drawn]) -> Batch:
        """The next one, which is `micro`. What went wrong as it was read is raised here."""
        while len(self._coming) <= AHEAD and (more := next(self._left, None)) is not None:
            self._coming.append((more, self._thread.submit(self._batches.read, more)))
        expected, batch = self._coming.popleft()
        assert micro == expected, "micro-batches are taken in the order of the steps"
        return batch.result()

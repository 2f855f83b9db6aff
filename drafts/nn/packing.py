"""Sequences that lie one after another, without padding, and which of their rows draft."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")


def packs(
    items: Iterable[Item], length: Callable[[Item], int], tokens: int | None
) -> Iterator[list[Item]]:
    """As many items at a time, in order, as have `tokens` together; one that has more, alone."""
    pack: list[Item] = []
    held = 0
    for item in items:
        size = length(item)
        if pack and tokens is not None and held + size > tokens:
            yield pack
            pack, held = [], 0
        pack.append(item)
        held += size
    if pack:
        yield pack


@dataclass(frozen=True)
class Packing:
    """`starts` say where each sequence begins, and at last where the last one ends.

    `rows` int64 [m], ascending, are those that are drafted from; the others are context.
    """

    starts: tuple[int, ...]
    rows: Tensor

    @classmethod
    def of(cls, lengths: Iterable[int], rows: Tensor | None = None) -> Packing:
        """Sequences of `lengths`. Without `rows` all are drafted from."""
        starts = (0, *accumulate(lengths))
        return cls(starts, torch.arange(starts[-1]) if rows is None else rows)

    @classmethod
    def within(cls, lengths: Sequence[int], rows: Sequence[Tensor]) -> Packing:
        """Sequences of `lengths`, of each of which its own `rows` are drafted from."""
        starts = (0, *accumulate(lengths))
        return cls(
            starts, torch.cat([own + start for own, start in zip(rows, starts, strict=False)])
        )

    @classmethod
    def last_of(cls, features: Tensor) -> Packing:
        """One sequence, `features` [n, ..], that is drafted from at its end."""
        n = len(features)
        return cls((0, n), torch.tensor([n - 1], device=features.device))

    def __len__(self) -> int:
        return self.starts[-1]

    def to(self, device: torch.device) -> Packing:
        return Packing(self.starts, self.rows.to(device))

    @property
    def device(self) -> torch.device:
        return self.rows.device

    @property
    def lengths(self) -> list[int]:
        """Rows of each sequence."""
        return [end - start for start, end in pairwise(self.starts)]

    @cached_property
    def whole(self) -> Packing:
        """The same sequences, all rows drafted from."""
        return Packing(self.starts, torch.arange(len(self), device=self.device))

    @cached_property
    def positions(self) -> Tensor:
        """Each row's place in its sequence, int64 [n]."""
        starts = torch.tensor(self.starts, device=self.device)
        begins = starts[:-1].repeat_interleave(starts.diff(), output_size=len(self))
        return torch.arange(len(self), device=self.device) - begins

    @cached_property
    def begins(self) -> Tensor:
        """Where the sequence of each of `rows` begins, int64 [m]."""
        return self.rows - self.positions[self.rows]

    @cached_property
    def numbers(self) -> Sequence[int]:
        """`rows` as integers."""
        numbers: list[int] = self.rows.tolist()
        return numbers

    @cached_property
    def spans(self) -> list[tuple[int, slice]]:
        """Of each sequence that is drafted from: its start, and which of `rows` are its own."""
        bounds = torch.searchsorted(self.rows, torch.tensor(self.starts, device=self.device))
        ends = bounds.tolist()
        pairs = zip(self.starts, ends, ends[1:], strict=False)
        return [(start, slice(first, end)) for start, first, end in pairs if end > first]

    def drafted(self, x: Tensor) -> Tensor:
        """Of x [n, ..] the rows that are drafted from; x itself where it holds no others."""
        return x if len(x) == len(self.rows) else x[self.rows]

    def after(self, x: Tensor, rows: Tensor, count: int) -> Tensor:
        """Of x [n or more] what lies `count` after each of `rows`; at the end, without meaning."""
        return x[(rows + count).clamp(max=len(x) - 1)]

"""Attention of drafted rows in memory linear in their number: no score is kept.

Row r of a packed sequence drafts with one or several queries (slots). Each attends to the context
of its sequence, one entry a row, up to row r, and to entries that row r alone has: a chain's of its
later steps, or a block's slots. Scores are made for some rows of one sequence at a time and, in the
backward pass, made again from the log-sum-exp, as FlashAttention does (arXiv 2205.14135); the row's
own entries join the same softmax. Keys and values of grouped heads are not repeated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from drafts.nn.packing import Packing

# Made at a time, by all rows and heads: on a CPU as many as its cache holds, on a GPU as many as
# keep it busy.
SCORES = {"cpu": 1 << 20, "cuda": 1 << 27}
# Short sequences go through together, each blind to the others, up to so many scores: a GPU makes
# those that are not wanted sooner than it begins anew.
TOGETHER = {"cuda": 1 << 25}
FEWEST = 16  # rows at a time, however many scores they make


@dataclass(frozen=True)
class Sight:
    """Which entries a query sees.

    Queries are those of `packing.rows`. Slot s of row r is at position r + `offset` + s; entry c of
    the context, in r's sequence, is at position c and seen where c <= r and, with a `window` of W,
    c > position - W. `own` [slots, m] says which of the row's own entries each slot sees; None for
    all.
    """

    packing: Packing
    window: int | None = None
    offset: int = 0
    own: Tensor | None = None

    def context(self, rows: slice, columns: slice, slots: int) -> Tensor:
        """What of the columns is seen by some rows, bool [rows, slots, columns]."""
        row = self.packing.rows[rows].view(-1, 1, 1)
        column = torch.arange(columns.start, columns.stop, device=row.device)
        seen = (column <= row) & (column >= self.packing.begins[rows].view(-1, 1, 1))
        if self.window is not None:
            position = row + self.offset + torch.arange(slots, device=row.device).unsqueeze(1)
            seen = seen & (column > position - self.window)
        return seen.expand(-1, slots, -1)

    def parts(self, row_scores: int) -> Iterator[tuple[slice, slice]]:
        """Rows of one or several sequences, with the columns of the context that any of them sees.

        `row_scores` are those of a row with one column. A part has about `SCORES` in all.
        """
        numbers, most = self.packing.numbers, SCORES.get(self.packing.device.type, SCORES["cpu"])
        for start, rows in self._together(row_scores):
            reach = numbers[rows.stop - 1] + 1 - start
            if self.window is not None:
                reach = min(reach, self.window)
            size = max(FEWEST, most // (row_scores * reach))
            for begin in range(rows.start, rows.stop, size):
                part = slice(begin, min(begin + size, rows.stop))
                first, last = start, numbers[part.stop - 1] + 1
                if self.window is not None:
                    first = max(start, numbers[begin] + self.offset + 1 - self.window)
                yield part, slice(min(first, last - 1), last)

    def _together(self, row_scores: int) -> Iterator[tuple[int, slice]]:
        """The spans of the packing, where they are short several as one."""
        numbers, most = self.packing.numbers, TOGETHER.get(self.packing.device.type, 0)
        held: tuple[int, slice] | None = None
        for start, rows in self.packing.spans:
            if held is not None:
                first, own = held
                columns = numbers[rows.stop - 1] + 1 - first
                if (rows.stop - own.start) * columns * row_scores <= most:
                    held = first, slice(own.start, rows.stop)
                    continue
                yield held
            held = start, rows
        if held is not None:
            yield held


def attend(
    q: Tensor, keys: Tensor, values: Tensor, own_keys: Tensor, own_values: Tensor, sight: Sight
) -> Tensor:
    """The mix of values that each query sees: [heads, m, slots, size].

    q: [heads, m, slots, size], of the m rows of `sight.packing`. keys, values: [kv_heads, n, size],
    of all rows; own_keys, own_values: [kv_heads, m, own, size], own may be 0. Query head h uses key
    head h // (heads / kv_heads). Scores are scaled by size ** -0.5; softmax is in float32, or
    float64 for such inputs.
    """
    device = q.device.type
    if torch.is_autocast_enabled(device):
        to = torch.get_autocast_dtype(device)
        q, keys, values = q.to(to), keys.to(to), values.to(to)
        own_keys, own_values = own_keys.to(to), own_values.to(to)
    with torch.autocast(device, enabled=False):
        mixed = _RowAttention.apply(
            q.unflatten(0, (keys.shape[0], -1)), keys, values, own_keys, own_values, sight
        )
    return mixed.flatten(0, 1)


def attend_eager(
    q: Tensor, keys: Tensor, values: Tensor, own_keys: Tensor, own_values: Tensor, sight: Sight
) -> Tensor:
    """What `attend` computes, with all scores at once: its reference."""
    groups, slots = q.shape[0] // keys.shape[0], q.shape[2]
    keys, values, own_keys, own_values = (
        t.repeat_interleave(groups, dim=0) for t in (keys, values, own_keys, own_values)
    )
    begins = torch.arange(len(sight.packing), device=q.device) - sight.packing.positions
    alike = begins[sight.packing.rows].unsqueeze(1) == begins  # of the same sequence
    every = slice(0, q.shape[1]), slice(0, keys.shape[1])
    seen = sight.context(*every, slots) & alike.unsqueeze(1)
    known = torch.einsum("hrsd,hcd->hrsc", q, keys).masked_fill(~seen, float("-inf"))
    own = torch.einsum("hrsd,hrmd->hrsm", q, own_keys)
    if sight.own is not None:
        own = own.masked_fill(~sight.own, float("-inf"))
    scores = torch.cat([known, own], dim=-1) * q.shape[-1] ** -0.5
    weights = scores.softmax(-1, dtype=_precise(q)).to(values.dtype)
    mixed = torch.einsum("hrsc,hcd->hrsd", weights[..., : keys.shape[1]], values)
    return mixed + torch.einsum("hrsm,hrmd->hrsd", weights[..., keys.shape[1] :], own_values)


class _RowAttention(torch.autograd.Function):
    """`attend` on queries by group [kv_heads, g, rows, slots, d].

    Shapes of one part: q [kv, g * r * s, d], scores [kv, g, r, s, columns], and the own entries'
    [kv, g, r, s, m].
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        own_keys: Tensor,
        own_values: Tensor,
        sight: Sight,
    ) -> Tensor:
        mixed = torch.empty_like(q)
        total = q.new_empty(q.shape[:-1], dtype=_precise(q))  # log-sum-exp of each query's scores
        for rows, columns in sight.parts(_row_scores(q)):
            part = q[:, :, rows]
            known, own = _scores(part, keys, own_keys, rows, columns, sight)
            top = known.amax(-1)
            if own.shape[-1]:
                top = torch.maximum(top, own.amax(-1))
            known, own = known.sub_(top.unsqueeze(-1)).exp_(), own.sub_(top.unsqueeze(-1)).exp_()
            mass = known.sum(-1) + own.sum(-1)
            total[:, :, rows] = top + mass.log()
            known, own = known.to(values.dtype), own.to(values.dtype)
            out = _with_context(known, values[:, columns])
            out = out + _with_own(own, own_values[:, rows])
            mixed[:, :, rows] = out / mass.unsqueeze(-1)
        ctx.save_for_backward(q, keys, values, own_keys, own_values, mixed, total)
        ctx.sight = sight
        return mixed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, keys, values, own_keys, own_values, mixed, total = ctx.saved_tensors
        sight, scale = ctx.sight, q.shape[-1] ** -0.5
        grad_q = torch.empty_like(q)
        grad_keys, grad_values = (torch.zeros_like(t, dtype=_precise(t)) for t in (keys, values))
        grad_own_keys, grad_own_values = torch.empty_like(own_keys), torch.empty_like(own_values)
        for rows, columns in sight.parts(_row_scores(q)):
            part, upper = q[:, :, rows], grad[:, :, rows]
            known, own = _scores(part, keys, own_keys, rows, columns, sight)
            known = known.sub_(total[:, :, rows, :, None]).exp_()  # the weights, once more
            own = own.sub_(total[:, :, rows, :, None]).exp_()
            dot = (upper * mixed[:, :, rows]).sum(-1, keepdim=True, dtype=total.dtype)

            flat = upper.flatten(1, 3)
            grad_values[:, columns] += known.to(flat.dtype).flatten(1, 3).mT @ flat
            change = (flat @ values[:, columns].mT).view_as(known)
            change = known.mul_(change - dot).mul_(scale).to(q.dtype)
            grad_keys[:, columns] += change.flatten(1, 3).mT @ part.flatten(1, 3)
            step = _with_context(change, keys[:, columns])

            # The row's own entries: [kv, r, g * s, .] against [kv, r, m, .].
            by_row, upper_by_row = _by_row(part), _by_row(upper)
            weights = _by_row(own)
            grad_own_values[:, rows] = weights.to(upper.dtype).mT @ upper_by_row
            change = upper_by_row @ own_values[:, rows].mT
            change = (weights * (change - _by_row(dot)) * scale).to(q.dtype)
            grad_own_keys[:, rows] = change.mT @ by_row
            mine = change @ own_keys[:, rows]
            grad_q[:, :, rows] = step + _by_group(mine, part.shape)
        found = grad_keys.to(keys.dtype), grad_values.to(values.dtype)
        return grad_q, *found, grad_own_keys, grad_own_values, None


def _scores(
    q: Tensor, keys: Tensor, own_keys: Tensor, rows: slice, columns: slice, sight: Sight
) -> tuple[Tensor, Tensor]:
    """Scaled scores of some rows with the context and their own entries; -inf where unseen."""
    precise, scale = _precise(q), q.shape[-1] ** -0.5
    known = (q.flatten(1, 3) @ keys[:, columns].mT).unflatten(1, q.shape[1:4])
    known = known.to(precise).mul_(scale)
    known.masked_fill_(~sight.context(rows, columns, q.shape[3]), float("-inf"))
    own = _by_group(_by_row(q) @ own_keys[:, rows].mT, q.shape).to(precise).mul_(scale)
    if sight.own is not None:
        own.masked_fill_(~sight.own, float("-inf"))
    return known, own


def _with_context(weights: Tensor, entries: Tensor) -> Tensor:
    """weights [kv, g, r, s, columns] with entries [kv, columns, d]: [kv, g, r, s, d]."""
    return (weights.flatten(1, 3) @ entries).unflatten(1, weights.shape[1:4])


def _with_own(weights: Tensor, entries: Tensor) -> Tensor:
    """weights [kv, g, r, s, m] with entries [kv, r, m, d]: [kv, g, r, s, d]."""
    return _by_group(_by_row(weights) @ entries, weights.shape)


def _by_row(x: Tensor) -> Tensor:
    """[kv, g, r, s, .] as [kv, r, g * s, .]."""
    return x.transpose(1, 2).flatten(2, 3)


def _by_group(x: Tensor, shape: torch.Size) -> Tensor:
    """[kv, r, g * s, .] as [kv, g, r, s, .], the first four as in `shape`."""
    return x.unflatten(2, (shape[1], shape[3])).transpose(1, 2)


def _row_scores(q: Tensor) -> int:
    """Scores that a row makes with each column: [kv, g, ., s]."""
    return q.shape[0] * q.shape[1] * q.shape[3]


def _precise(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32

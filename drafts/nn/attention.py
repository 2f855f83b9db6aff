"""Attention of drafted rows in memory linear in their number: no score is kept.

Row r of a sequence drafts with one or several queries (slots). Each attends to the context, one
entry a row, up to row r, and to entries that row r alone has: a chain's of its later steps, or a
block's slots. Scores are made for some rows at a time and, in the backward pass, made again from
the log-sum-exp, as FlashAttention does (arXiv 2205.14135); the row's own entries join the same
softmax. Keys and values of grouped heads are not repeated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SCORES = 1 << 20  # made at a time, by all rows and heads; more no longer fit the cache


@dataclass(frozen=True)
class Sight:
    """Which entries a query sees.

    Rows begin at `first_row`. Slot s of row r is at position r + `offset` + s; entry c of the
    context is at position c and seen where c <= r and, with a `window` of W, c > position - W.
    `own` [slots, m] says which of the row's own entries each slot sees; None for all.
    """

    first_row: int = 0
    window: int | None = None
    offset: int = 0
    own: Tensor | None = None

    def context(self, rows: slice, columns: slice, slots: int, device: torch.device) -> Tensor:
        """What of the context is seen, bool [rows, slots, columns]."""
        row = torch.arange(rows.start, rows.stop, device=device).view(-1, 1, 1) + self.first_row
        column = torch.arange(columns.start, columns.stop, device=device)
        seen = column <= row
        if self.window is not None:
            position = row + self.offset + torch.arange(slots, device=device).unsqueeze(1)
            seen = seen & (column > position - self.window)
        return seen.expand(-1, slots, -1)

    def parts(self, rows: int, size: int) -> Iterator[tuple[slice, slice]]:
        """Rows, `size` at a time, with the columns of the context that any of them sees."""
        for start in range(0, rows, size):
            part = slice(start, min(start + size, rows))
            first = 0
            if self.window is not None:
                first = max(0, self.first_row + part.start + self.offset + 1 - self.window)
            last = self.first_row + part.stop
            yield part, slice(min(first, last - 1), last)


def attend(
    q: Tensor, keys: Tensor, values: Tensor, own_keys: Tensor, own_values: Tensor, sight: Sight
) -> Tensor:
    """The mix of values that each query sees: [batch, heads, rows, slots, size].

    q: [batch, heads, rows, slots, size], of the rows from `sight.first_row` on, which end at the
    context's last. keys, values: [batch, kv_heads, n, size]; own_keys, own_values:
    [batch, kv_heads, rows, m, size], m may be 0. Query head h uses key head h // (heads /
    kv_heads). Scores are scaled by size ** -0.5; softmax is in float32, or float64 for such inputs.
    """
    device = q.device.type
    if torch.is_autocast_enabled(device):
        to = torch.get_autocast_dtype(device)
        q, keys, values = q.to(to), keys.to(to), values.to(to)
        own_keys, own_values = own_keys.to(to), own_values.to(to)
    with torch.autocast(device, enabled=False):
        mixed = _RowAttention.apply(
            q.unflatten(1, (keys.shape[1], -1)), keys, values, own_keys, own_values, sight
        )
    return mixed.flatten(1, 2)


def attend_eager(
    q: Tensor, keys: Tensor, values: Tensor, own_keys: Tensor, own_values: Tensor, sight: Sight
) -> Tensor:
    """What `attend` computes, with all scores at once: its reference."""
    groups, (rows, slots) = q.shape[1] // keys.shape[1], q.shape[2:4]
    keys, values, own_keys, own_values = (
        t.repeat_interleave(groups, dim=1) for t in (keys, values, own_keys, own_values)
    )
    seen = sight.context(slice(0, rows), slice(0, keys.shape[2]), slots, q.device)
    known = torch.einsum("bhrsd,bhcd->bhrsc", q, keys).masked_fill(~seen, float("-inf"))
    own = torch.einsum("bhrsd,bhrmd->bhrsm", q, own_keys)
    if sight.own is not None:
        own = own.masked_fill(~sight.own, float("-inf"))
    scores = torch.cat([known, own], dim=-1) * q.shape[-1] ** -0.5
    weights = scores.softmax(-1, dtype=_precise(q)).to(values.dtype)
    mixed = torch.einsum("bhrsc,bhcd->bhrsd", weights[..., : keys.shape[2]], values)
    return mixed + torch.einsum("bhrsm,bhrmd->bhrsd", weights[..., keys.shape[2] :], own_values)


class _RowAttention(torch.autograd.Function):
    """`attend` on queries by group [b, kv_heads, g, rows, slots, d].

    Shapes of one part: q [b, kv, g * r * s, d], scores [b, kv, g, r, s, columns], and the own
    entries' [b, kv, g, r, s, m].
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
        for rows, columns in sight.parts(q.shape[3], _rows_at_once(q, keys)):
            part = q[:, :, :, rows]
            known, own = _scores(part, keys, own_keys, rows, columns, sight)
            top = known.amax(-1)
            if own.shape[-1]:
                top = torch.maximum(top, own.amax(-1))
            known, own = known.sub_(top.unsqueeze(-1)).exp_(), own.sub_(top.unsqueeze(-1)).exp_()
            mass = known.sum(-1) + own.sum(-1)
            total[:, :, :, rows] = top + mass.log()
            known, own = known.to(values.dtype), own.to(values.dtype)
            out = _with_context(known, values[:, :, columns])
            out = out + _with_own(own, own_values[:, :, rows])
            mixed[:, :, :, rows] = out / mass.unsqueeze(-1)
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
        for rows, columns in sight.parts(q.shape[3], _rows_at_once(q, keys)):
            part, upper = q[:, :, :, rows], grad[:, :, :, rows]
            known, own = _scores(part, keys, own_keys, rows, columns, sight)
            known = known.sub_(total[:, :, :, rows, :, None]).exp_()  # the weights, once more
            own = own.sub_(total[:, :, :, rows, :, None]).exp_()
            dot = (upper * mixed[:, :, :, rows]).sum(-1, keepdim=True, dtype=total.dtype)

            flat = upper.flatten(2, 4)
            grad_values[:, :, columns] += known.to(flat.dtype).flatten(2, 4).mT @ flat
            change = (flat @ values[:, :, columns].mT).view_as(known)
            change = known.mul_(change - dot).mul_(scale).to(q.dtype)
            grad_keys[:, :, columns] += change.flatten(2, 4).mT @ part.flatten(2, 4)
            step = _with_context(change, keys[:, :, columns])

            # The row's own entries: [b, kv, r, g * s, .] against [b, kv, r, m, .].
            by_row, upper_by_row = _by_row(part), _by_row(upper)
            weights = _by_row(own)
            grad_own_values[:, :, rows] = weights.to(upper.dtype).mT @ upper_by_row
            change = upper_by_row @ own_values[:, :, rows].mT
            change = (weights * (change - _by_row(dot)) * scale).to(q.dtype)
            grad_own_keys[:, :, rows] = change.mT @ by_row
            mine = change @ own_keys[:, :, rows]
            grad_q[:, :, :, rows] = step + _by_group(mine, part.shape)
        found = grad_keys.to(keys.dtype), grad_values.to(values.dtype)
        return grad_q, *found, grad_own_keys, grad_own_values, None


def _scores(
    q: Tensor, keys: Tensor, own_keys: Tensor, rows: slice, columns: slice, sight: Sight
) -> tuple[Tensor, Tensor]:
    """Scaled scores of some rows with the context and their own entries; -inf where unseen."""
    precise, scale = _precise(q), q.shape[-1] ** -0.5
    known = (q.flatten(2, 4) @ keys[:, :, columns].mT).unflatten(2, q.shape[2:5])
    known = known.to(precise).mul_(scale)
    known.masked_fill_(~sight.context(rows, columns, q.shape[4], q.device), float("-inf"))
    own = _by_group(_by_row(q) @ own_keys[:, :, rows].mT, q.shape).to(precise).mul_(scale)
    if sight.own is not None:
        own.masked_fill_(~sight.own, float("-inf"))
    return known, own


def _with_context(weights: Tensor, entries: Tensor) -> Tensor:
    """weights [b, kv, g, r, s, columns] with entries [b, kv, columns, d]: [b, kv, g, r, s, d]."""
    return (weights.flatten(2, 4) @ entries).unflatten(2, weights.shape[2:5])


def _with_own(weights: Tensor, entries: Tensor) -> Tensor:
    """weights [b, kv, g, r, s, m] with entries [b, kv, r, m, d]: [b, kv, g, r, s, d]."""
    return _by_group(_by_row(weights) @ entries, weights.shape)


def _by_row(x: Tensor) -> Tensor:
    """[b, kv, g, r, s, .] as [b, kv, r, g * s, .]."""
    return x.transpose(2, 3).flatten(3, 4)


def _by_group(x: Tensor, shape: torch.Size) -> Tensor:
    """[b, kv, r, g * s, .] as [b, kv, g, r, s, .], the first five as in `shape`."""
    return x.unflatten(3, (shape[2], shape[4])).transpose(2, 3)


def _rows_at_once(q: Tensor, keys: Tensor) -> int:
    per_row = q.shape[0] * q.shape[1] * q.shape[2] * q.shape[4] * keys.shape[2]
    return max(16, SCORES // max(per_row, 1))


def _precise(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32

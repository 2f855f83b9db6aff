"""Hidden states in eight bits: half of the disk for a rounding that drafts hardly notice.

Each `GROUP` values of a token have a scale of their own, since a few channels of a model's hidden
states are a hundred times as large as the rest (arXiv 2402.17762), and would take all of its steps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

GROUP = 32
STEPS = 127


def groups(width: int) -> int:
    """Scales of `width` values."""
    return -(-width // GROUP)


def to_int8(states: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 [n, width] and scales bf16 [n, groups] of states [n, width].

    Values that are not finite make their group's scale NaN, so that they are found as before.
    """
    import torch

    grouped = _grouped(states.float())
    scales = (grouped.abs().amax(-1) / STEPS).to(torch.bfloat16)
    scales[~grouped.isfinite().all(-1)] = torch.nan
    codes = grouped / scales.float().clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)
    codes = codes.nan_to_num().round().clamp(-STEPS, STEPS).to(torch.int8)
    return codes.flatten(1)[:, : states.shape[1]].contiguous(), scales


def from_int8(codes: Tensor, scales: Tensor) -> Tensor:
    """The states, bf16 [n, width]."""
    import torch

    states = _grouped(codes.float()) * scales.float().unsqueeze(-1)
    return states.flatten(1)[:, : codes.shape[1]].to(torch.bfloat16)


def _grouped(values: Tensor) -> Tensor:
    """[n, width] as [n, groups, GROUP], the last group filled up with zeros."""
    from torch.nn.functional import pad

    filled = pad(values, (0, groups(values.shape[1]) * GROUP - values.shape[1]))
    return filled.unflatten(1, (-1, GROUP))

"""Attention over step 0's rows and a row's own later steps, against one query at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from drafts.nn.layers import Attention, LayerConfig
from drafts.nn.packing import Packing

ROWS, SIZE = 7, 4
CONFIG = LayerConfig(
    hidden_size=8,
    intermediate_size=8,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=SIZE,
    max_positions=64,
)


def one_query(q: Tensor, entries: list[tuple[int, Tensor, Tensor]], window: int | None) -> Tensor:
    """The mix [heads, size] of a query that is at the position of the last entry."""
    position = entries[-1][0]
    seen = [e for e in entries if window is None or e[0] > position - window]
    keys = torch.stack([key for _, key, _ in seen], dim=1)
    values = torch.stack([value for _, _, value in seen], dim=1)
    weights = torch.einsum("hd,hnd->hn", q, keys).div(SIZE**0.5).softmax(-1)
    return torch.einsum("hn,hnd->hd", weights, values)


@pytest.mark.parametrize("window", [None, 1, 2, 3, 5, 7, 20])
@pytest.mark.parametrize("step", [0, 1, 4])
@pytest.mark.parametrize("first_row", [0, 3])
def test_all_rows_at_once_are_one_query_at_a_time(
    window: int | None, step: int, first_row: int
) -> None:
    torch.manual_seed(0)
    rows = ROWS - first_row
    steps = [
        (torch.randn(2, length, SIZE), torch.randn(2, length, SIZE))
        for length in (ROWS, *[rows] * step)
    ]
    q, packing = torch.randn(2, rows, SIZE), Packing.of([ROWS], torch.arange(first_row, ROWS))
    found = Attention(CONFIG, 8, window).attend(q, steps, packing)
    for i in range(rows):
        row = first_row + i
        entries = [(r, steps[0][0][:, r], steps[0][1][:, r]) for r in range(row + 1)]
        entries += [(row + j, steps[j][0][:, i], steps[j][1][:, i]) for j in range(1, step + 1)]
        expected = one_query(q[:, i], entries, window)
        torch.testing.assert_close(found[i].unflatten(0, (2, SIZE)), expected)

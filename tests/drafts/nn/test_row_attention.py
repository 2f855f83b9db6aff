"""Attention by parts of rows: values and gradients of all scores at once, in less memory."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from drafts.nn import attention
from drafts.nn.attention import Sight, attend, attend_eager
from drafts.nn.packing import Packing
from tests.largest import Largest

KV_HEADS, GROUPS, SIZE = 2, 3, 8
LENGTHS = (5, 13, 1, 9)
# From a sequence's first rows, from its last, from none of it, and from all.
SOME = torch.tensor([0, 1, 8, 9, 10, 11, 14, 16, 17, *range(19, 28)])
CASES = list(
    product((None, SOME), (None, 1, 3, 6, 50), ((1, 0, 0), (1, 2, 2), (3, 3, 1)), (False, True))
)


def inputs(packing: Packing, slots: int, own: int, dtype: torch.dtype) -> list[Tensor]:
    n, m = len(packing), len(packing.rows)
    shapes = [
        (KV_HEADS * GROUPS, m, slots, SIZE),
        *[(KV_HEADS, n, SIZE)] * 2,
        *[(KV_HEADS, m, own, SIZE)] * 2,
    ]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows at a time, so that sequences have several parts and an uneven last one."""
    monkeypatch.setitem(attention.SCORES, "cpu", 1)
    monkeypatch.setattr(attention, "FEWEST", 4)


@pytest.mark.parametrize("together", [0, 1000, 1 << 20])  # scores: one, two and all sequences
@pytest.mark.parametrize(("rows", "window", "shape", "masked"), CASES)
def test_values_and_gradients_are_those_of_all_scores_at_once(
    small_parts: None,
    monkeypatch: pytest.MonkeyPatch,
    rows: Tensor | None,
    window: int | None,
    shape: tuple[int, int, int],
    masked: bool,
    together: int,
) -> None:
    monkeypatch.setitem(attention.TOGETHER, "cpu", together)
    slots, own, offset = shape
    torch.manual_seed(0)
    seen = torch.ones(slots, own, dtype=torch.bool).tril() if masked and own == slots else None
    packing = Packing.of(LENGTHS, rows)
    sight = Sight(packing, window, offset, seen)
    given = inputs(packing, slots, own, torch.float64)
    found, expected = attend(*given, sight), attend_eager(*given, sight)
    torch.testing.assert_close(found, expected)
    upper = torch.randn_like(found)
    for mine, theirs in zip(
        torch.autograd.grad(found, given, upper),
        torch.autograd.grad(expected, given, upper),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_lower_precision_is_as_good_as_all_scores_at_once(
    small_parts: None, dtype: torch.dtype, close: float
) -> None:
    torch.manual_seed(0)
    packing = Packing.of(LENGTHS)
    exact = inputs(packing, 1, 2, torch.float64)
    sight, upper = Sight(packing, offset=2), torch.randn(KV_HEADS * GROUPS, len(packing), 1, SIZE)
    wanted = attend_eager(*exact, sight)
    gradients = torch.autograd.grad(wanted, exact, upper.double())
    given = [t.detach().to(dtype).requires_grad_() for t in exact]
    found = attend(*given, sight)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), wanted, rtol=close, atol=close)
    for mine, exactly in zip(torch.autograd.grad(found, given, upper), gradients, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.double(), exactly, rtol=4 * close, atol=4 * close)


def test_autocast_computes_in_its_own_type() -> None:
    packing = Packing.of(LENGTHS)
    given = inputs(packing, 1, 1, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = attend(*given, Sight(packing, offset=1))
    assert found.dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(found.float().sum(), given))


def test_short_sequences_go_together() -> None:
    sight = Sight(Packing.of(LENGTHS), offset=1)
    counts = {}
    for most in (0, 1000, 1 << 20):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(attention.TOGETHER, "cpu", most)
            parts = list(sight.parts(KV_HEADS * GROUPS))
        counts[most] = len(parts)
        covered = [row for rows, _ in parts for row in range(rows.start, rows.stop)]
        assert covered == list(range(sum(LENGTHS)))
    assert counts == {0: 4, 1000: 3, 1 << 20: 1}


def test_no_tensor_grows_with_the_square_of_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(attention.SCORES, "cpu", 4096)
    largest = {}
    for function, rows in product((attend, attend_eager), (256, 512)):
        q = torch.randn(2, rows, 1, SIZE, requires_grad=True)
        keys, values = (torch.randn(1, rows, SIZE, requires_grad=True) for _ in range(2))
        own = [torch.randn(1, rows, 1, SIZE, requires_grad=True) for _ in range(2)]
        with Largest() as seen:
            sight = Sight(Packing.of([rows]), offset=1)
            function(q, keys, values, *own, sight).sum().backward()
        largest[function, rows] = seen.elements
    assert largest[attend_eager, 512] > 3.9 * largest[attend_eager, 256] > 100_000
    assert largest[attend, 512] <= 2 * largest[attend, 256] < 20_000

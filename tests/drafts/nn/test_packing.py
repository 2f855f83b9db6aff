"""Sequences one after another: each is drafted as it is alone, and gets the gradients that it gets
alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from drafts.checkpoint.family import InitOptions
from drafts.nn.interface import Draft
from drafts.nn.packing import Packing, packs
from drafts.registry import FAMILIES
from tests.opened import init_draft
from tests.tiny.models import LAYER_IDS, VOCAB

LENGTHS, STEPS = (9, 17, 4, 12), 3
ROWS = [torch.arange(3, 8), torch.tensor([2, 3, 4, 10, 15]), torch.arange(0), torch.arange(11)]


def test_rows_and_places_of_several_sequences() -> None:
    packing = Packing.within(LENGTHS, ROWS)
    assert (len(packing), packing.lengths) == (42, list(LENGTHS))
    assert packing.positions.tolist() == [i for length in LENGTHS for i in range(length)]
    assert packing.spans == [(0, slice(0, 5)), (9, slice(5, 10)), (30, slice(10, 21))]
    assert packing.rows[5:10].tolist() == [11, 12, 13, 19, 24]
    assert len(packing.whole.rows) == 42


def test_packs_are_as_full_as_they_may_be() -> None:
    assert list(packs([3, 4, 9, 1, 1, 2, 5], int, 5)) == [[3], [4], [9], [1, 1, 2], [5]]
    assert list(packs([3, 4, 9], int, None)) == [[3, 4, 9]]
    assert list(packs([], int, 5)) == []


def random_draft(family: str, target: Path) -> Draft:
    """A draft with random weights, of two layers where it may have them."""
    several = family in ("eagle", "eagle3", "dflash")
    layers = {"num_layers": 2} if several else {}
    reads = {"layer_ids": LAYER_IDS} if family in ("eagle3", "peagle", "dflash") else {}
    made = init_draft(family, target, InitOptions(**layers, **reads))
    torch.manual_seed(0)
    for name, parameter in made.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return made.double().eval()  # sums in another order stay close


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_each_sequence_is_drafted_as_it_is_alone(
    family: str, target_of: Callable[[str], Path]
) -> None:
    draft = random_draft(family, target_of(family))
    packing = Packing.within(LENGTHS, ROWS)
    features, ids = torch.randn(42, draft.feature_size).double(), torch.randint(VOCAB, (42,))
    ends = torch.cat([torch.full_like(r, n) for r, n in zip(ROWS, LENGTHS, strict=True)])
    within = [packing.positions[packing.rows] + j + 1 < ends for j in range(STEPS)]
    upper = [torch.randn(len(packing.rows), 1) * inside.unsqueeze(1) for inside in within]

    together = draft(features, ids, STEPS, packing)
    sum((u * out.square()).sum() for u, out in zip(upper, together, strict=True)).backward()
    gradients = {name: p.grad for name, p in draft.named_parameters() if p.grad is not None}
    draft.zero_grad()

    first = done = 0
    for length, rows in zip(LENGTHS, ROWS, strict=True):
        own, place = slice(first, first + length), slice(done, done + len(rows))
        first, done = own.stop, place.stop
        alone = draft(features[own], ids[own], STEPS, Packing.of([length], rows))
        for j, (out, whole) in enumerate(zip(alone, together, strict=True)):
            inside = rows + j + 1 < length
            torch.testing.assert_close(out[inside], whole[place][inside], rtol=1e-4, atol=1e-4)
        if len(rows):
            weighed = zip(upper, alone, strict=True)
            sum((u[place] * out.square()).sum() for u, out in weighed).backward()
    assert gradients
    for name, parameter in draft.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-3)

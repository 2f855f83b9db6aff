"""Values that are made again in the backward pass: the same gradients, less kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from drafts.nn.interface import Draft
from drafts.nn.packing import Packing
from drafts.registry import FAMILIES
from tests.drafts.nn.test_packing import random_draft
from tests.tiny.models import VOCAB

LENGTHS, STEPS = (40, 24), 4


def kept_and_gradients(draft: Draft) -> tuple[int, dict[str, Tensor]]:
    """Bytes kept for the backward pass beside the weights, and what that gives."""
    packing, weights = Packing.of(LENGTHS), {p.data_ptr() for p in draft.parameters()}
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(len(packing), draft.feature_size, generator=generator).double()
    ids = torch.randint(VOCAB, (len(packing),), generator=generator)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = draft(features, ids, STEPS, packing)
    sum(output.square().sum() for output in outputs).backward()
    found = {name: p.grad for name, p in draft.named_parameters() if p.grad is not None}
    draft.zero_grad()
    return sum(kept.values()), found


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_gradients_are_the_same_and_less_is_kept(
    family: str, target_of: Callable[[str], Path]
) -> None:
    draft = random_draft(family, target_of(family))
    plainly, expected = kept_and_gradients(draft)
    draft.gradient_checkpointing = True
    less, found = kept_and_gradients(draft)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name])
    assert less < 0.6 * plainly

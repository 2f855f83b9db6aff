"""Adapters that begin where the loss falls fastest: A along the gradient of the frozen weights.

An update B A can only read what A reads, and a random A reads little of what matters. Full
fine-tuning would first move a weight W along its gradient G [out, in]; here the rows of A are G's
leading right singular vectors, the r directions that hold most of that move. B = 0 as ever, so the
draft says what it said before, and W stays as it was. Related: LoRA-GA (arXiv 2407.05000), which
sets B as well and takes B A off W; GaLore (arXiv 2403.03507), which projects gradients this way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

ITERATIONS = 4  # of the randomised SVD; it looks for twice the rank


@torch.no_grad()
def init_lora_a(A: Tensor, gradient: Tensor) -> None:
    """Set the rows of A [r, in] to the leading right singular vectors of `gradient` [out, in].

    Where there are fewer than r of them the other rows stay as they are.
    """
    sought = min(2 * len(A), *gradient.shape)
    _, _, V = torch.svd_lowrank(gradient.float(), q=sought, niter=ITERATIONS)
    found = V.T[: len(A)]
    A[: len(found)].copy_(found)


def weight_gradients(
    layers: dict[str, nn.Linear], losses: Iterable[Callable[[], Tensor]]
) -> dict[str, Tensor]:
    """The summed gradients of the layers' weights over the losses, which are called one by one.

    Layers that no loss reads have none.
    """
    before = {name: layer.weight.requires_grad for name, layer in layers.items()}
    for layer in layers.values():
        layer.weight.requires_grad_(True)
    for loss in losses:
        loss().backward()
    found = {}
    for name, layer in layers.items():
        if layer.weight.grad is not None:
            found[name] = layer.weight.grad.detach()
        layer.weight.grad = None
        layer.weight.requires_grad_(before[name])
    return found

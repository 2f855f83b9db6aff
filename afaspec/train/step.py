"""One optimizer step: the trainer's, the cost estimate's and that of the embedded target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer


def autocast(device: torch.device, *, bf16: bool) -> torch.autocast:
    """Within, matrix products are done in bf16; with `bf16` off nothing changes."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def training_step(
    accelerator: Accelerator,
    losses: Sequence[Callable[[], Tensor]],
    parameters: Sequence[nn.Parameter],
    optimizers: Sequence[Optimizer],
    *,
    clip: float,
    bf16: bool = True,
    weights: AbstractContextManager[None] = nullcontext(),
) -> tuple[float, float]:
    """Step once along the mean gradient of the micro-batches' `losses`, cut to the norm `clip`.

    Returns the mean loss and the gradient's norm before the cut. Forward and backward run within
    `weights`, which may stand in for the model's own; the optimizers then move its own.
    """
    mean = 0.0
    with weights:
        for loss in losses:
            with autocast(accelerator.device, bf16=bf16):
                share = loss() / len(losses)
            accelerator.backward(share)
            mean += float(share.detach())
    norm = accelerator.clip_grad_norm_(parameters, clip)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return mean, 0.0 if norm is None else float(norm)

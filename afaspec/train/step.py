"""One optimizer step: the trainer's, the cost estimate's and that of the embedded target."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from drafts.errors import NotFiniteError, UserError


def join_processes() -> Accelerator:
    """This process's device, and its place among those that `torchrun` started.

    Precision is ours: accelerate's is one for the whole process. Raises `UserError` where each
    process would train alone.
    """
    started = int(os.environ.get("WORLD_SIZE") or 1)
    if started > 1 and not distributed_device():
        accelerator = Accelerator(cpu=True)  # with gloo, which it takes when asked alone
    else:
        accelerator = Accelerator()
    if accelerator.num_processes != started:
        raise UserError(
            f"WORLD_SIZE says {started} processes, but {accelerator.num_processes} can train "
            f"together on {accelerator.device}",
            hint="start it with torchrun, or alone and without WORLD_SIZE",
        )
    return accelerator


def distributed_device() -> bool:
    """Is there a device here that several processes can train on together?"""
    if not torch.accelerator.is_available():
        return False
    device = torch.accelerator.current_accelerator()
    return device is not None and device.type != "mps"


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
    """Step once along the gradient of the sum of `losses`, cut to the norm `clip`.

    The sum is over the micro-batches of all processes: each loss is a share of the step's. Returns
    the loss and the gradient's norm before the cut. Forward and backward run within `weights`,
    which may stand in for the model's own; the optimizers then move its own. Raises
    `NotFiniteError` where loss or norm are not finite, before any weight has moved.
    """
    total = 0.0
    with weights:
        for share in losses:
            with autocast(accelerator.device, bf16=bf16):
                loss = share()
            accelerator.backward(loss)
            total += float(loss.detach())
    if accelerator.num_processes > 1:
        total = float(sum_over(accelerator, torch.tensor(total, dtype=torch.float64)))
        sum_gradients(accelerator, parameters)
    norm = float(accelerator.clip_grad_norm_(parameters, clip) or 0.0)
    for name, value in (("loss", total), ("gradient's norm", norm)):
        if not math.isfinite(value):
            raise NotFiniteError(f"the {name} is {value}", hint="lower the learning rate")
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return total, norm


def sum_over(accelerator: Accelerator, values: Tensor) -> Tensor:
    """The sum of each process's `values`, on the CPU; every process gets the same."""
    found: Tensor = accelerator.reduce(values.to(accelerator.device), reduction="sum")
    return found.cpu()


def sum_gradients(accelerator: Accelerator, parameters: Sequence[nn.Parameter]) -> None:
    """Add up each parameter's gradients of all processes. Where one has none, it counts as zero."""
    has = torch.tensor([float(p.grad is not None) for p in parameters])
    for parameter, count in zip(parameters, sum_over(accelerator, has).tolist(), strict=True):
        if count:
            own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = accelerator.reduce(own, reduction="sum")

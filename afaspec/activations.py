"""AFA's sigma: the non-linear end of the annealing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Activation = Callable[[Tensor], Tensor]


def _leaky(z: Tensor) -> Tensor:
    return F.leaky_relu(z, 0.1)


ACTIVATIONS: dict[str, Activation] = {
    "relu": F.relu,
    "leaky_relu": _leaky,
    "silu": F.silu,
    "gelu": F.gelu,
    "tanh": torch.tanh,
}

ACTIVATION_NAMES = tuple(ACTIVATIONS)

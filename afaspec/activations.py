"""AFA's sigma: the non-linear end of the annealing."""

from __future__ import annotations

import math
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


def activation(name: str) -> Activation:
    """The activation called `name`; `scaled_<name>` keeps the second moment of a standard normal.

    Scaling keeps the adapter's gain from drifting while beta falls: E[(c*f(z))^2] = E[z^2] = 1.
    Raises KeyError for an unknown name.
    """
    plain = ACTIVATIONS[name.removeprefix("scaled_")]
    if not name.startswith("scaled_"):
        return plain
    z = torch.linspace(-8, 8, 20001, dtype=torch.float64)
    density = torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    gain = float(torch.trapezoid(plain(z) ** 2 * density, z)) ** -0.5

    def scaled(x: Tensor) -> Tensor:
        return gain * plain(x)

    return scaled


ACTIVATION_NAMES = (*ACTIVATIONS, *(f"scaled_{name}" for name in ACTIVATIONS))

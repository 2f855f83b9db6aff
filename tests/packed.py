"""Packings of one sequence."""

from __future__ import annotations

import torch

from drafts.nn.packing import Packing


def alone(length: int, first: int = 0) -> Packing:
    """Drafted from row `first` on to the last that has a next token."""
    return Packing.of([length], torch.arange(first, length - 1))

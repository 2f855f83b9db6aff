"""Adapters that begin along the gradient."""

from __future__ import annotations

import torch
from torch import nn

from afaspec.adapters.gradient_init import init_lora_a, weight_gradients


def test_the_rows_are_the_directions_that_hold_most_of_the_gradient() -> None:
    torch.manual_seed(0)
    U = torch.linalg.qr(torch.randn(40, 6))[0]
    V = torch.linalg.qr(torch.randn(30, 6))[0]
    gradient = U @ torch.diag(torch.tensor([9.0, 7.0, 5.0, 1.0, 0.5, 0.2])) @ V.T
    A = torch.randn(3, 30)
    init_lora_a(A, gradient)
    assert torch.allclose(A @ A.T, torch.eye(3), atol=1e-5)
    assert torch.allclose((A @ V[:, :3]).abs(), torch.eye(3), atol=1e-3)


def test_rows_beyond_the_gradients_rank_stay() -> None:
    torch.manual_seed(0)
    A = torch.randn(6, 30)
    before = A.clone()
    init_lora_a(A, torch.randn(4, 30))
    assert torch.equal(A[4:], before[4:])
    assert torch.allclose(A[:4] @ A[:4].T, torch.eye(4), atol=1e-5)


def test_gradients_are_summed_and_nothing_stays_behind() -> None:
    layer = nn.Linear(3, 2, bias=False)
    layer.weight.requires_grad_(False)
    x = torch.tensor([[1.0, 2.0, 3.0]])
    found = weight_gradients({"only": layer}, [lambda: layer(x).sum(), lambda: layer(x).sum()])
    assert torch.equal(found["only"], 2 * x.expand(2, 3))
    assert layer.weight.grad is None
    assert not layer.weight.requires_grad

"""Losses: the fused, chunked ones equal their eager twins in value and gradient."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from afaspec.train.losses import LOSSES, chunked_loss, compiled_loss

ROWS, WIDTH, VOCAB = 37, 16, 50


@pytest.fixture
def case() -> tuple[nn.Linear, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, VOCAB, bias=False)
    normed = torch.randn(ROWS, WIDTH, requires_grad=True)
    return head, normed, 2 * torch.randn(ROWS, VOCAB), torch.rand(ROWS)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(("chunk", "compiled"), [(64, False), (10, False), (64, True), (10, True)])
def test_chunked_equals_eager(
    name: str, chunk: int, compiled: bool, case: tuple[nn.Linear, Tensor, Tensor, Tensor]
) -> None:
    head, normed, target, weights = case
    expected = (LOSSES[name](head(normed), target) * weights).sum()
    expected_gradients = torch.autograd.grad(expected, [normed, head.weight])
    found = chunked_loss(name, head, normed, target, weights, chunk=chunk, compiled=compiled)
    assert not compiled or compiled_loss(name).failure is None  # the plain one did not stand in
    found_gradients = torch.autograd.grad(found, [normed, head.weight])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for one, two in zip(found_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["kl", "reverse_kl", "jsd", "tv", "lk"])
def test_zero_for_equal_distributions_and_positive_else(name: str) -> None:
    torch.manual_seed(0)
    p, q = torch.randn(8, VOCAB), torch.randn(8, VOCAB)
    shifted = p + 3.0  # the same distribution
    assert float(LOSSES[name](shifted, p).abs().max()) < 1e-5
    assert float(LOSSES[name](q, p).min()) > 0.01


def test_known_values() -> None:
    p = torch.tensor([[math.log(0.5), math.log(0.5)]])
    q = torch.tensor([[math.log(0.75), math.log(0.25)]])
    assert float(LOSSES["tv"](q, p)) == pytest.approx(0.25, rel=1e-5)
    kl = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert float(LOSSES["kl"](q, p)) == pytest.approx(kl, rel=1e-5)
    reverse = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert float(LOSSES["reverse_kl"](q, p)) == pytest.approx(reverse, rel=1e-5)
    assert float(LOSSES["ce"](q, torch.tensor([[0.0, 1.0]]))) == pytest.approx(-math.log(0.25))


def test_jsd_is_bounded() -> None:
    far = torch.tensor([[50.0, 0.0]])
    assert float(LOSSES["jsd"](far, far.flip(-1))) == pytest.approx(math.log(2), rel=1e-4)


def test_weights_select_rows(case: tuple[nn.Linear, Tensor, Tensor, Tensor]) -> None:
    head, normed, target, _ = case
    weights = torch.zeros(ROWS)
    weights[5] = 2.0
    found = chunked_loss("kl", head, normed, target, weights, chunk=8, compiled=False)
    torch.testing.assert_close(found, 2 * LOSSES["kl"](head(normed), target)[5])


def test_without_a_compiler_the_plain_loss_stands_in(tmp_path: Path) -> None:
    """A process whose compiler is not there, and that has compiled nothing before."""
    script = """
import torch
from afaspec.train.losses import LOSSES, chunked_loss, compiled_loss
torch.manual_seed(0)
q, p, ones = torch.randn(9, 16, requires_grad=True), torch.randn(9, 16), torch.ones(9)
found = chunked_loss("kl", lambda x: x, q, p, ones, chunk=4, compiled=True)
found.backward()
assert torch.equal(found, sum(LOSSES["kl"](a, b).sum() for a, b in zip(q.split(4), p.split(4))))
print(compiled_loss("kl").failure)
"""
    env = os.environ | {"CXX": "/nowhere/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=env, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "No working C++ compiler found" in done.stdout

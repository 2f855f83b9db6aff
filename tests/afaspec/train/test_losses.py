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

from afaspec.train.losses import LOSSES, DraftedRows, compiled_loss, fused_loss
from tests.largest import Largest

ROWS, WIDTH, VOCAB = 37, 16, 50


Case = tuple[nn.Linear, nn.Linear, Tensor, list[DraftedRows]]


def make_case(dtype: torch.dtype = torch.float32, rows: int = ROWS, vocab: int = VOCAB) -> Case:
    """The draft's and the target's heads, the target's states, and two steps: all rows and some."""
    torch.manual_seed(0)
    head, target = (nn.Linear(WIDTH, vocab, bias=False, dtype=dtype) for _ in range(2))
    final = 4 * torch.randn(rows, WIDTH, dtype=dtype)
    some = torch.arange(rows)[torch.arange(rows) % 5 > 1]
    steps = [
        DraftedRows(
            torch.randn(len(own), WIDTH, dtype=dtype, requires_grad=True),
            own,
            lambda x, scale=scale: scale * head(x),  # type: ignore[misc]
            weight,
        )
        for own, scale, weight in ((torch.arange(rows), 1.0, 0.7), (some, 2.0, 0.2))
    ]
    return head, target, final, steps


def eager(name: str, case: Case) -> Tensor:
    """The same sum with all logits at once."""
    _, target, final, steps = case
    logits = target(final).detach()
    return sum(
        (s.weight * LOSSES[name](s.project(s.outputs), logits[s.rows]).sum() for s in steps),
        torch.zeros(()),
    )


def fused(name: str, case: Case, chunk: int, *, compiled: bool = False) -> Tensor:
    head, target, final, steps = case
    parameters = list(head.parameters())
    return fused_loss(name, target, final, steps, parameters, chunk=chunk, compiled=compiled)


def leaves(case: Case) -> list[Tensor]:
    return [case[0].weight, *(step.outputs for step in case[3])]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(("chunk", "compiled"), [(64, False), (10, False), (64, True), (10, True)])
def test_fused_equals_eager(name: str, chunk: int, compiled: bool) -> None:
    case = make_case()
    expected, found = eager(name, case), fused(name, case, chunk, compiled=compiled)
    assert not compiled or compiled_loss(name).failure is None  # the plain one did not stand in
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for one, two in zip(
        torch.autograd.grad(3 * found, leaves(case)),
        torch.autograd.grad(3 * expected, leaves(case)),
        strict=True,
    ):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_only_what_needs_a_gradient_gets_one() -> None:
    head, target, final, steps = case = make_case()
    with torch.no_grad():
        assert not fused("kl", case, 10).requires_grad
    head.requires_grad_(False)
    found = fused("kl", case, 10)
    expected = torch.autograd.grad(eager("kl", case), [steps[0].outputs])
    found.backward()
    assert head.weight.grad is None
    torch.testing.assert_close(steps[0].outputs.grad, expected[0], rtol=1e-4, atol=1e-5)
    assert target.weight.grad is None
    assert final.grad is None


def test_without_rows_the_loss_is_zero() -> None:
    head, target, final, _ = make_case()
    outputs = torch.zeros(0, WIDTH, requires_grad=True)
    none = DraftedRows(outputs, torch.zeros(0, dtype=torch.long), head, 1.0)
    found = fused_loss("kl", target, final[:0], [none], list(head.parameters()), chunk=4)
    assert float(found.detach()) == 0
    found.backward()
    assert outputs.grad is not None


def test_no_tensor_has_more_logits_than_a_chunk() -> None:
    largest = {}
    for rows in (60, 120):
        case = make_case(rows=rows, vocab=400)
        with Largest() as seen:
            fused("kl", case, 10).backward()
        largest[rows] = seen.elements
        with Largest() as seen:
            eager("kl", case).backward()
        assert seen.elements == 400 * rows
    assert largest[60] == largest[120] == 400 * WIDTH  # the weight's own gradient


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


def test_without_a_compiler_the_plain_loss_stands_in(tmp_path: Path) -> None:
    """A process whose compiler is not there, and that has compiled nothing before."""
    script = """
import torch
from afaspec.train.losses import LOSSES, DraftedRows, compiled_loss, fused_loss
torch.manual_seed(0)
q, p = torch.randn(9, 16, requires_grad=True), torch.randn(9, 16)
rows = DraftedRows(q, torch.arange(9), lambda x: x, 1.0)
found = fused_loss("kl", lambda x: x, p, [rows], [], chunk=4, compiled=True)
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

"""Losses between target and draft distributions, fused with the output layers, chunked over rows.

Each loss maps draft logits q and target logits p, both [rows, draft_vocab], to one float32 value
per row. `fused_loss` applies one to hidden states of both and never holds all logits: it takes the
gradients of a chunk before it makes the next (the idea is Liger Kernel's, arXiv 2410.10989). The
plain functions, compiled or not, are the reference.

KL and its kin are the field's standard; total variation and the blend follow LK losses
(arXiv 2602.23881): acceptance at temperature 1 is 1 - TV.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, get_args

import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn import functional as F

from afaspec.train.config import Loss
from drafts.errors import first_line

RowLoss = Callable[[Tensor, Tensor], Tensor]


def kl(q: Tensor, p: Tensor) -> Tensor:
    """KL(target || draft), in nats."""
    log_q, log_p = q.float().log_softmax(-1), p.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def reverse_kl(q: Tensor, p: Tensor) -> Tensor:
    """KL(draft || target), in nats."""
    return kl(p, q)


def jsd(q: Tensor, p: Tensor) -> Tensor:
    """Jensen-Shannon divergence, in nats: at most ln 2."""
    log_q, log_p = q.float().log_softmax(-1), p.float().log_softmax(-1)
    log_m = torch.logaddexp(log_q, log_p) - torch.log(torch.tensor(2.0, device=q.device))
    return 0.5 * (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(-1)


def tv(q: Tensor, p: Tensor) -> Tensor:
    """Total variation: 1 - the chance that speculative sampling accepts at temperature 1."""
    return 0.5 * (q.float().softmax(-1) - p.float().softmax(-1)).abs().sum(-1)


def lk(q: Tensor, p: Tensor) -> Tensor:
    """KL where the draft is far off, TV where it is close: weighted by the TV itself."""
    distance = tv(q, p)
    weight = distance.detach()
    return weight * kl(q, p) + (1 - weight) * distance


def ce(q: Tensor, p: Tensor) -> Tensor:
    """Cross-entropy with the target's most likely token, in nats."""
    return F.cross_entropy(q.float(), p.argmax(-1), reduction="none")


LOSSES: dict[str, RowLoss] = {name: globals()[name] for name in get_args(Loss)}


@dataclass(frozen=True)
class DraftedRows:
    """What a draft step says: `outputs` [m, d] for some of the rows, by their ascending numbers
    `rows` [m], and `project`, which makes logits of them. Each row's loss counts `weight` times."""

    outputs: Tensor
    rows: Tensor
    project: Callable[[Tensor], Tensor]
    weight: float


def fused_loss(
    name: str,
    teacher: Callable[[Tensor], Tensor],
    final: Tensor,
    steps: Sequence[DraftedRows],
    parameters: Sequence[Tensor],
    *,
    chunk: int,
    compiled: bool = True,
) -> Tensor:
    """Sum of the losses of all steps' rows, each against the target's logits `teacher(final[row])`.

    final [rows, d] carries no gradient; `parameters` are those of which a `project` may make use.
    Logits of `chunk` rows are held at a time, the target's once for all steps; their gradients are
    taken at once, so that only those of `outputs` and `parameters` are kept.
    """
    row_loss: RowLoss = compiled_loss(name) if compiled else LOSSES[name]
    wanted = [p for p in parameters if p.requires_grad]
    outputs = [step.outputs for step in steps]
    fused = _Fused(row_loss, teacher, final, steps, wanted, chunk)
    return _FusedLoss.apply(fused, *outputs, *wanted)


@dataclass(frozen=True)
class _Fused:
    row_loss: RowLoss
    teacher: Callable[[Tensor], Tensor]
    final: Tensor
    steps: Sequence[DraftedRows]
    parameters: Sequence[Tensor]
    chunk: int

    def parts(self) -> Iterator[tuple[DraftedRows, slice, Tensor]]:
        """Each step's rows, a chunk at a time, with the target's logits for them."""
        starts = torch.arange(0, len(self.final) + self.chunk, self.chunk)
        bounds = [
            torch.searchsorted(step.rows, starts.to(step.rows)).tolist() for step in self.steps
        ]
        for number, start in enumerate(starts[:-1].tolist()):
            with torch.no_grad():
                logits = self.teacher(self.final[start : start + self.chunk])
            for step, bound in zip(self.steps, bounds, strict=True):
                part = slice(bound[number], bound[number + 1])
                count = part.stop - part.start
                if count == len(logits):
                    yield step, part, logits
                elif count:
                    yield step, part, logits[step.rows[part] - start]


class _FusedLoss(torch.autograd.Function):
    """`fused_loss`: loss and gradients in one pass; the backward pass only scales them."""

    @staticmethod
    def forward(ctx: Any, fused: _Fused, *inputs: Tensor) -> Tensor:
        needed = any(ctx.needs_input_grad)
        total = fused.final.new_zeros((), dtype=torch.float32)
        gradients: list[Tensor | None] = [None] * len(inputs)
        if needed:
            for i, step in enumerate(fused.steps):
                gradients[i] = torch.zeros_like(step.outputs)
        places = {id(step): i for i, step in enumerate(fused.steps)}
        for step, part, logits in fused.parts():
            with torch.set_grad_enabled(needed):
                outputs = step.outputs[part].detach().requires_grad_(needed)
                loss = fused.row_loss(step.project(outputs), logits).sum() * step.weight
            total += loss.detach()
            if not needed:
                continue
            mine, *others = torch.autograd.grad(
                loss, [outputs, *fused.parameters], allow_unused=True
            )
            into = gradients[places[id(step)]]
            assert into is not None
            into[part] = mine
            for i, found in enumerate(others, start=len(fused.steps)):
                before = gradients[i]
                if found is not None:
                    gradients[i] = found if before is None else before.add_(found)
        ctx.gradients = gradients
        return total

    @staticmethod
    def backward(ctx: Any, upper: Tensor) -> tuple[Tensor | None, ...]:
        found = [None if g is None else g.mul_(upper.to(g.dtype)) for g in ctx.gradients]
        ctx.gradients = None  # scaled in place: there is no second time
        return None, *found


class CompiledLoss:
    """A loss as one fused kernel, compiled once for any number of rows.

    Where it cannot be compiled (no compiler, no headers, no room for a cache) the plain function
    takes its place, and `failure` says why.
    """

    def __init__(self, plain: RowLoss):
        self.plain, self.compiled = plain, torch.compile(plain, dynamic=True)
        self.failure: str | None = None

    def __call__(self, q: Tensor, p: Tensor) -> Tensor:
        if self.failure is None:
            try:
                return self.compiled(q, p)
            except BackendCompilerFailed as error:
                self.failure = first_line(error.inner_exception)
        return self.plain(q, p)


@cache
def compiled_loss(name: str) -> CompiledLoss:
    """The loss of that name, one for the whole process."""
    return CompiledLoss(LOSSES[name])

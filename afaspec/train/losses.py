"""Losses between target and draft distributions, fused over the vocabulary and chunked over rows.

Each loss maps draft logits q and target logits p, both [rows, draft_vocab], to one float32 value
per row. `chunked_loss` applies one to the draft's hidden states without ever holding all logits:
chunks are compiled, and recomputed in the backward pass. The plain functions are the reference.

KL and its kin are the field's standard; total variation and the blend follow LK losses
(arXiv 2602.23881): acceptance at temperature 1 is 1 - TV.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import get_args

import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

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


def chunked_loss(
    name: str,
    project: Callable[[Tensor], Tensor],
    normed: Tensor,
    target_logits: Tensor,
    weights: Tensor,
    *,
    chunk: int = 1024,
    compiled: bool = True,
) -> Tensor:
    """Sum over rows of weights * loss(project(normed), target_logits).

    normed [rows, d] are the draft's outputs and `project` its output layer; target_logits
    [rows, draft_vocab] carry no gradient; weights [rows]. With one chunk nothing is recomputed.
    """
    rows = normed.shape[0]
    row_loss: RowLoss = compiled_loss(name) if compiled else LOSSES[name]

    def one(normed: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        return (row_loss(project(normed), target) * weight).sum()

    if rows <= chunk:
        return one(normed, target_logits, weights)
    total = normed.new_zeros((), dtype=torch.float32)
    for part in range(0, rows, chunk):
        piece = slice(part, part + chunk)
        total = total + checkpoint(
            one, normed[piece], target_logits[piece], weights[piece], use_reentrant=False
        )
    return total


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

"""What every draft module offers, whatever its family: one interface for training and measuring.

With tokens x and target features f (f[t] belongs to x[t]), row t of step j stands for what the
server drafts as x[t+j+2] once x[0..t+1] are known and its drafts so far were right.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from drafts.nn.packing import Packing

Reads = Literal["layers", "final", "nothing"]
Made = TypeVar("Made")


class Draft(nn.Module, ABC):
    """A draft of any family. Logits are over the draft vocabulary, which `d2t` maps."""

    reads: ClassVar[Reads]  # the target's hidden states that it takes
    steps_alike: ClassVar[bool] = False  # does each step predict what step 0 of a later row does?

    gradient_checkpointing = False  # make values again in the backward pass, not keep them

    d2t: Tensor
    t2d: Tensor

    def __init__(self, vocab_size: int, draft_vocab_size: int):
        super().__init__()
        self.vocab_size = vocab_size
        self.register_buffer("d2t", torch.zeros(draft_vocab_size, dtype=torch.long))
        self.register_buffer("t2d", torch.empty(0, dtype=torch.long), persistent=False)
        self.set_vocabulary_map(self.d2t)

    def set_vocabulary_map(self, d2t: Tensor) -> None:
        """`d2t` [draft_vocab]: target id minus draft id. `t2d` is its inverse, -1 where absent."""
        ids = torch.arange(len(d2t), device=d2t.device) + d2t
        t2d = torch.full((self.vocab_size,), -1, dtype=torch.long, device=d2t.device)
        t2d[ids] = torch.arange(len(d2t), device=d2t.device)
        self.d2t, self.t2d = d2t, t2d

    def target_ids(self) -> Tensor:
        """The target id of each draft id, [draft_vocab]."""
        return torch.arange(len(self.d2t), device=self.d2t.device) + self.d2t

    def features(self, hidden: Tensor, final: Tensor) -> Tensor:
        """What this draft reads, of the states after layers [.., L*d] and the final one [.., d]."""
        if self.reads == "layers":
            return hidden
        return final if self.reads == "final" else final[..., :0]

    def step_of(self, function: Callable[..., Made], *given: Any) -> Made:
        """function(*given), of whose values only `given` are kept with `gradient_checkpointing`.

        It must change nothing that it is given.
        """
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return cast(Made, checkpoint(function, *given, use_reentrant=False))
        return function(*given)

    @property
    @abstractmethod
    def feature_size(self) -> int:
        """Width of the features that `forward` takes."""

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @abstractmethod
    def forward(
        self, features: Tensor, input_ids: Tensor, steps: int, packing: Packing
    ) -> list[Tensor]:
        """Draft `steps` tokens after each row, the target's own tokens fed in (teacher forcing).

        features: [n, feature_size]; input_ids: [n], of the sequences of `packing`.
        Returns for each step j the outputs [m, d] of the m rows of `packing`; that of row t
        predicts x[t+j+2]. Rows whose inputs lie beyond their sequence's end hold values without
        meaning. Rows that are not drafted from cost as little as the family allows.
        """

    @abstractmethod
    def logits(self, output: Tensor, step: int) -> Tensor:
        """Draft-vocabulary logits [..., draft_vocab] of outputs of `forward`'s step `step`."""

    @abstractmethod
    def propose(self, features: Tensor, input_ids: Tensor, k: int) -> list[int]:
        """The k tokens (target ids) that the server would draft greedily after `input_ids`.

        features: [n, feature_size] of x[0..n-1]; input_ids: [n+1], the last just sampled.
        """

    def best(self, output: Tensor, step: int) -> int:
        """The target id that one output [1, d] of step `step` makes likeliest."""
        drafted = self.logits(output, step).argmax(-1)
        return int(drafted + self.d2t[drafted])

"""How good a draft is on a run's held-out sequences, and what that number is.

On a store of greedy responses it is acceptance: a server walks the same path. On sampled or given
responses no server does, and drafts are held against the target's likeliest tokens instead: that is
teacher-forced agreement, good for choosing between drafts and no forecast of a server.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor

from afaspec.store.division import Numbers
from afaspec.store.read import FeatureStore
from afaspec.train.checks import LOOK, check_features
from afaspec.train.config import TrainConfig
from afaspec.train.step import sum_over
from bench.records.acceptance import Acceptance
from bench.stats.offline import offline_acceptance, offline_agreement
from drafts.errors import NotFiniteError, UserError
from drafts.nn.interface import Draft
from drafts.target.head import load_target_head
from drafts.target.info import TargetInfo

Measure = Literal["acceptance", "agreement"]
WORDS: dict[Measure, str] = {
    "acceptance": "held-out acceptance length",
    "agreement": "held-out teacher-forced agreement length",
}
ALMOST_NEVER = 0.1  # of first drafts right; trained drafts are right half the time on new traffic
ROWS = 256  # of the target's logits at once


@dataclass(frozen=True)
class HeldOut:
    """The held-out sequences of a run; each process measures its part of them.

    `name` is that of a store beside the run's own, and stands before what is measured on it.
    """

    config: TrainConfig
    store: FeatureStore
    target: TargetInfo
    indices: Numbers
    accelerator: Accelerator
    name: str = ""

    @property
    def measure(self) -> Measure:
        return measure_of(self.store)

    @property
    def key(self) -> str:
        """The name of the length in metrics: `acceptance_length` or `agreement_length`."""
        return self._named(f"{self.measure}_length")

    def _named(self, key: str) -> str:
        return f"{self.name}/{key}" if self.name else key

    def evaluate(self, draft: Draft) -> dict[str, Any]:
        """A metrics row's `acceptance_length` or `agreement_length`, and `per_position` [k].

        Raises `UserError` where no response is long enough for a block of drafts, and
        `NotFiniteError` for a draft without logits. All processes get the same.
        """
        k = self.config.draft_steps
        try:
            found = self._count(draft)
            own = [0, found.drafts_per_prompt.sum(), *found.accepted_per_prompt.sum(axis=0)]
        except NotFiniteError:
            own = [1] + [0] * (k + 1)
        broken, drafts, *accepted = sum_over(self.accelerator, torch.tensor(own)).tolist()
        if broken:
            check_features(self.store, self.indices.tolist())
            raise NotFiniteError(
                "the draft's logits on held-out sequences are NaN or infinite", hint=LOOK
            )
        if not drafts:
            raise UserError(
                f"holds no held-out response of {k + 1} tokens or more, so that nothing can be "
                f"measured at {k} draft steps",
                where=self.store.folder,
                hint="capture longer responses, or give fewer --draft-steps",
            )
        rates = [hits / drafts for hits in accepted]
        return {self.key: 1 + sum(accepted) / drafts, self._named("per_position"): rates}

    def _count(self, draft: Draft) -> Acceptance:
        k, amp = self.config.draft_steps, self.config.bf16
        held = self.store.read(self._own)
        if self.measure == "acceptance":
            return offline_acceptance(draft, held, k, amp=amp)
        return offline_agreement(draft, held, self._likeliest, k, amp=amp)

    @property
    def _own(self) -> list[int]:
        own = self.indices[self.accelerator.process_index :: self.accelerator.num_processes]
        return own.tolist()

    @cached_property
    def _likeliest(self) -> list[Tensor]:
        """What the target says at each place of each sequence: the same at every evaluation."""
        choose = target_choice(self.target, self.accelerator.device, bf16=self.config.bf16)
        found = []
        for sequence in self.store.read(self._own):
            ids = sequence.input_ids.clone()
            ids[1:] = choose(sequence.final[:-1])
            found.append(ids)
        return found


def measure_of(store: FeatureStore) -> Measure:
    """What walking the store's responses measures."""
    return "acceptance" if store.manifest.greedy else "agreement"


def target_choice(
    target: TargetInfo, device: torch.device, *, bf16: bool
) -> Callable[[Tensor], Tensor]:
    """From final states [n, d] to the target's likeliest tokens [n]."""
    head = load_target_head(target).to(device, torch.bfloat16 if bf16 else torch.float32)

    def choose(final: Tensor) -> Tensor:
        parts = final.to(device).split(ROWS)
        return torch.cat([head(rows).argmax(-1) for rows in parts]).cpu()

    return choose


def doubts(store: FeatureStore, per_position: list[float]) -> str | None:
    """What to look at where the base draft's first token is almost never right."""
    if per_position[0] >= ALMOST_NEVER:
        return None
    ids = ", ".join(map(str, store.manifest.layer_ids)) or "none"
    return (
        f"Warning: the base draft's first token is right in {per_position[0]:.1%} of its drafts. A "
        "draft that was never trained begins like this. One that was trained does where it reads "
        f"other hidden states than it was trained on (layer ids here: {ids}; some tools count the "
        "embedding as 0, others the first layer), where it belongs to another target, or where the "
        "prompts lack their chat template."
    )

"""Refusals before any model loads: does this store fit this draft and this target?"""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from afaspec.store.manifest import CAPTURE_AGAIN, Manifest
from afaspec.store.read import FeatureStore
from afaspec.train.step import sum_over
from drafts.checkpoint.info import DraftInfo
from drafts.errors import UserError
from drafts.registry import module_names, wanted_layer_ids
from drafts.target.info import TargetInfo

LOOK = "look for such values in the draft's weights and in the store's hidden states"


def check_fit(manifest: Manifest, store: Path, draft: DraftInfo, target: TargetInfo) -> None:
    """Raise `UserError` for the first way in which store, draft and target do not fit."""
    if draft.sha256 == target.sha256:
        raise UserError(
            "is the target itself", where=draft.folder, hint="give a draft, not the target"
        )
    captured_hash = manifest.target["sha256"]
    again = f"capture again: afaspec capture {target.folder} PROMPTS --draft {draft.folder}"
    if captured_hash != target.sha256:
        raise UserError(
            f"was captured from another target (hash {captured_hash[:12]}, "
            f"{target.folder} has {target.sha256[:12]})",
            where=store,
            hint=f"give the target it was captured from, or {again}",
        )
    if draft.vocab_size != target.vocab_size:
        raise UserError(
            f"is a draft of another target: its vocabulary has {draft.vocab_size} tokens, "
            f"the target's {target.vocab_size}",
            where=draft.folder,
            hint="use a draft that was trained for this target",
        )
    if draft.reads != "nothing" and draft.target_hidden_size != target.hidden_size:
        raise UserError(
            f"is a draft of another target: it expects hidden size {draft.target_hidden_size}, "
            f"the target has {target.hidden_size}",
            where=draft.folder,
            hint="use a draft that was trained for this target",
        )
    wanted = wanted_layer_ids(draft, target)
    if wanted and tuple(manifest.layer_ids) != wanted:
        raise UserError(
            f"holds layers {list(manifest.layer_ids)}, the draft reads {list(wanted)}",
            where=store,
            hint=again,
        )
    if "embed_tokens.weight" in draft.shared and draft.hidden_size != target.hidden_size:
        raise UserError(
            f"has no embedding of its own, and hidden size {draft.hidden_size} differs from "
            f"the target's {target.hidden_size}",
            where=draft.folder,
            hint="use a draft checkpoint that includes embed_tokens.weight",
        )


def check_steps(draft: DraftInfo, draft_steps: int) -> None:
    """Raise `UserError` for more draft steps than the draft has heads for."""
    if draft.max_k is not None and draft_steps > draft.max_k:
        raise UserError(
            f"draft_steps is {draft_steps}, but the draft drafts at most {draft.max_k} tokens",
            where=draft.folder,
            hint=f"give --draft-steps {draft.max_k} or less",
        )


def check_stored(draft: nn.Module, info: DraftInfo, *, lm_head: bool) -> None:
    """Raise `UserError` unless all that trains is stored by the draft, and once.

    `lm_head`: is the output layer meant to train?
    """
    parameters = list(draft.named_parameters())  # a tied one by its first name only
    trained = {_module(name) for name, parameter in parameters if parameter.requires_grad}
    first = {name for name, _ in parameters}
    every = {name for name, _ in draft.named_parameters(remove_duplicate=False)}
    tied = {_module(name) for name in every - first}
    wanted = trained | {name for name in tied if lm_head and name.endswith("lm_head")}
    if both := sorted(wanted & tied):
        raise UserError(
            f"ties {both[0]} to its embedding, so that it cannot be trained",
            where=info.folder,
            hint=f"leave {both[0]} out (no --lm-head)",
        )
    if foreign := sorted(trained & {_module(name) for name in info.shared}):
        raise UserError(
            f"shares {foreign[0]} with the target, so that it cannot be trained",
            where=info.folder,
            hint=f"leave {foreign[0]} out (no --lm-head)",
        )
    stored = {_module(name) for name in module_names(info).values()}
    if renamed := sorted(trained - stored):
        raise UserError(
            f"has no tensor of its own for {renamed[0]} (transformers joins or renames tensors on "
            "loading, such as the experts of a mixture), so that it cannot be trained",
            where=info.folder,
            hint="train an adapter, with --modules that leave it out",
        )


def check_features(store: FeatureStore, indices: list[int]) -> None:
    """Raise `UserError` for the first of these sequences whose hidden states are not finite."""
    for index, sequence in zip(indices, store.read(indices), strict=True):
        for name in ("hidden", "final"):
            if not getattr(sequence, name).isfinite().all():
                raise UserError(
                    f"sequence {index} (prompt {sequence.prompt_index}) has NaN or infinite hidden "
                    f"states ({name})",
                    where=store.folder,
                    hint=f"{CAPTURE_AGAIN}, with --dtype float32 if the target overflows",
                )


def check_processes(batch_size: int, processes: int) -> None:
    """Raise `UserError` where a micro-batch has no sequence for each process."""
    if batch_size < processes:
        raise UserError(
            f"batch_size is {batch_size}, but {processes} processes divide a batch among them",
            hint=f"give --batch-size {processes} or more, or start fewer processes",
        )


def check_same_step(accelerator: Accelerator, step: int, out: Path) -> None:
    """Raise `UserError` where processes found different checkpoints."""
    steps = int(sum_over(accelerator, torch.tensor(step)))
    if steps != step * accelerator.num_processes:
        raise UserError(
            "is not the same folder to all processes",
            where=out,
            hint="give an --out on a file system that all of them share",
        )


def _module(parameter: str) -> str:
    """The name of a weight's module, whether an adapter is on it or not; biases keep theirs."""
    return parameter.split(".lora_")[0].removesuffix(".weight").removesuffix(".base_layer")

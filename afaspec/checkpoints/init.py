"""A draft from scratch on disk: random, sized after its target, ready to be trained."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from drafts.checkpoint.family import InitOptions
from drafts.checkpoint.info import DraftInfo
from drafts.errors import UserError
from drafts.files import atomic_folder, require_empty
from drafts.registry import init_draft, read_draft, save_draft
from drafts.target import TargetInfo, read_target
from drafts.tokenizer_files import copy_tokenizer
from serving.compatibility import FLOATS, require_compatible

if TYPE_CHECKING:
    from torch import Tensor

    from afaspec.store.read import FeatureStore


PROMPTS, STORE, RUN = "PROMPTS", "runs/store", "runs/base"
DISTINCT = "give distinct layer ids in ascending order, such as --layer-ids 2,6,9"


@dataclass(frozen=True)
class StartConfig:
    """What `afaspec init` takes. None means the family's usual, or the target's own."""

    family: str
    target: Path
    out: Path
    layers: int | None = None
    layer_ids: str | None = None
    vocab: int | None = None
    store: Path | None = None
    heads: int | None = None
    dtype: str | None = None
    seed: int = 0


def start_draft(config: StartConfig, note: Callable[[str], None] = print) -> DraftInfo:
    """Write the draft to the new folder `config.out`. Raises `UserError` for unfit settings."""
    import torch

    require_empty(config.out)
    target = read_target(config.target)
    store = open_store(config, target)
    kept = None if config.vocab is None else frequent_tokens(config, target, store, note)
    layer_ids = read_layer_ids(config.layer_ids)
    if layer_ids is None and store is not None:
        layer_ids = tuple(store.manifest.layer_ids) or None
    options = InitOptions(config.layers, layer_ids, kept, seed=config.seed)
    if config.heads is not None:
        options = replace(options, max_k=config.heads)
    draft = init_draft(config.family, target, options)
    if config.layer_ids is not None and draft.reads != "layers":
        raise UserError(
            f"a draft of the family {config.family} reads no hidden states of inner layers",
            hint="leave --layer-ids out",
        )
    with atomic_folder(config.out) as folder:
        save_draft(draft, config.family, folder, dtype=getattr(torch, choose_dtype(config, target)))
        if draft.reads == "nothing":  # a model of its own, which vLLM wants whole
            copy_tokenizer(config.target, folder)
        written = read_draft(folder)
        require_compatible(target, written)
        if config.heads is not None and written.max_k is None:
            raise UserError(
                f"a draft of the family {config.family} drafts any number of tokens",
                hint="leave --heads out",
            )
    return read_draft(config.out)


def read_layer_ids(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() for part in parts):
        raise UserError(f"--layer-ids is {text!r}", hint=DISTINCT)
    ids = tuple(map(int, parts))
    if list(ids) != sorted(set(ids)):
        raise UserError(f"--layer-ids is {text!r}", hint=DISTINCT)
    return ids


def choose_dtype(config: StartConfig, target: TargetInfo) -> str:
    """The one asked for, else the target's; bfloat16 for a target that is not stored in floats."""
    dtype = config.dtype or (target.dtype if target.dtype in FLOATS else "bfloat16")
    if dtype not in FLOATS:
        raise UserError(f"--dtype is {dtype!r}", hint=f"give one of {', '.join(FLOATS)}")
    return dtype


def open_store(config: StartConfig, target: TargetInfo) -> FeatureStore | None:
    """The store that was given, which has to be the target's."""
    from afaspec.store.read import FeatureStore

    if config.store is None:
        return None
    store = FeatureStore.open(config.store)
    if store.manifest.target["sha256"] != target.sha256:
        raise UserError(
            f"was captured from another target than {config.target}",
            where=config.store,
            hint="give a store of this target",
        )
    return store


def frequent_tokens(
    config: StartConfig,
    target: TargetInfo,
    store: FeatureStore | None,
    note: Callable[[str], None],
) -> Tensor:
    """The `vocab` tokens most frequent in the store's responses, ascending ids [vocab].

    Where fewer are found, the lowest of the other ids fill up.
    """
    import torch

    assert config.vocab is not None
    if store is None:
        raise UserError(
            "--vocab needs a feature store to count tokens in", hint="give --store DIR as well"
        )
    if not 0 < config.vocab < target.vocab_size:
        raise UserError(
            f"--vocab is {config.vocab}, the target has {target.vocab_size} tokens",
            hint="give fewer, or leave --vocab out for the full vocabulary",
        )
    counts = torch.zeros(target.vocab_size, dtype=torch.long)
    for i in range(len(store)):
        sequence = store[i]
        counts += sequence.input_ids[sequence.loss_mask].bincount(minlength=target.vocab_size)
    kept = counts.argsort(descending=True, stable=True)[: config.vocab].sort().values
    seen, all_seen = int((counts[kept] > 0).sum()), int((counts > 0).sum())
    covered = counts[kept].sum() / counts.sum()
    note(
        f"{config.vocab:,} of {target.vocab_size:,} tokens kept, {covered:.2%} of the "
        f"{int(counts.sum()):,} response tokens in {config.store}."
    )
    if seen < config.vocab:
        note(f"The responses have only {all_seen:,} different tokens; capture more of them.")
    return kept


def next_commands(config: StartConfig, info: DraftInfo, target: str) -> list[str]:
    """The commands that make a base draft of this start; `target` as the user calls it."""
    target, out = shlex.quote(target), shlex.quote(str(config.out))
    store = STORE if config.store is None else shlex.quote(str(config.store))
    flags = "--arm full" if "lm_head.weight" in info.shared else "--arm full --lm-head"
    flags += f" --draft-steps {info.max_k}" if info.max_k else ""  # all heads, the whole block
    capture = f"afaspec capture {target} {PROMPTS} --draft {out} --split train --out {store}"
    return [
        *([] if config.store else [capture]),
        f"afaspec train --store {store} --draft {out} --out {RUN} {flags} --steps 2000",
        f"afaspec merge {RUN} --out {RUN}-merged",
    ]

"""A draft from scratch on disk: random, sized after its target, ready to be trained."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING

from afaspec.checkpoints.config import InitConfig
from afaspec.store.read import FeatureStore
from drafts.checkpoint.family import InitOptions
from drafts.checkpoint.info import DraftInfo
from drafts.checkpoint.layer_ids import parse_layer_ids
from drafts.errors import UserError
from drafts.files import atomic_folder, require_empty
from drafts.registry import FAMILIES, init_draft, read_draft, save_draft
from drafts.target.info import TargetInfo
from drafts.target.layers import UnfitLayersError
from drafts.tensors import FLOATS
from drafts.tokenizer_files import copy_tokenizer
from serving.compatibility import require_compatible

if TYPE_CHECKING:
    from torch import Tensor

    from drafts.nn.interface import Draft


PROMPTS, STORE, RUN = "PROMPTS", "runs/store", "runs/base"


def init_checkpoint(
    config: InitConfig,
    target: TargetInfo,
    stores: Sequence[FeatureStore] = (),
    note: Callable[[str], None] = print,
) -> DraftInfo:
    """Write the draft to the new folder `config.out`; `stores` are those of `config.store`.

    Raises `UserError` for unfit settings.
    """
    import torch

    from drafts.target.head import not_drafted

    require_empty(config.out)
    check_stores(stores, target)
    kept = None if config.vocab is None else frequent_tokens(config, target, stores, note)
    layer_ids = choose_layer_ids(config, stores)
    options = InitOptions(
        config.layers,
        layer_ids,
        kept,
        intermediate_size=config.intermediate_size,
        seed=config.seed,
    )
    if config.heads is not None:
        options = replace(options, max_k=config.heads)
    draft = fresh_draft(config, target, options, note)
    if config.intermediate_size is not None and config.family == "medusa":
        raise UserError(
            "a draft of the family medusa has no MLP", hint="leave --intermediate-size out"
        )
    if config.layer_ids is not None and draft.reads != "layers":
        raise UserError(
            f"a draft of the family {config.family} reads no hidden states of inner layers",
            hint="leave --layer-ids out",
        )
    dtype = config.dtype or (target.dtype if target.dtype in FLOATS else "bfloat16")
    with atomic_folder(config.out) as folder:
        save_draft(draft, config.family, folder, dtype=getattr(torch, dtype))
        if draft.reads == "nothing":  # a model of its own, which vLLM wants whole
            copy_tokenizer(target.folder, folder)
        written = read_draft(folder)
        require_compatible(target, written)
        if config.heads is not None and written.max_k is None:
            raise UserError(
                f"a draft of the family {config.family} drafts any number of tokens",
                hint="leave --heads out",
            )
    for text in not_drafted(target):
        note(f"The target {text}, which the draft does not: training has to make up for it.")
    return read_draft(config.out)


def fresh_draft(
    config: InitConfig, target: TargetInfo, options: InitOptions, note: Callable[[str], None]
) -> Draft:
    """The module, its layers the target's last where that is asked for or can be had."""
    family = FAMILIES.get(config.family)
    able = family is not None and family.starts_from_target
    if config.start == "target" and family is not None and not able:
        raise UserError(
            f"a draft of the family {config.family} does not begin as the target's layers",
            hint="leave --start out",
        )
    if able and config.start != "random":
        try:
            return init_draft(config.family, target, replace(options, from_target=True))
        except UnfitLayersError as error:
            if config.start == "target":
                hint = "leave --start out, or give --start random"
                raise UserError(error.problem, where=error.where, hint=hint) from None
            note(f"The layers begin at random; the target's cannot be taken: {error.problem}")
    return init_draft(config.family, target, options)


def choose_layer_ids(config: InitConfig, stores: Sequence[FeatureStore]) -> tuple[int, ...] | None:
    """Those given, ascending, else the stores'; None for the family's usual."""
    if config.layer_ids is None:
        return tuple(stores[0].manifest.layer_ids) or None if stores else None
    try:
        ids = parse_layer_ids(config.layer_ids)
        if list(ids) != sorted(ids):
            raise ValueError
    except ValueError:
        raise UserError(
            f"--layer-ids is {config.layer_ids!r}",
            hint="give distinct layer ids in ascending order, such as --layer-ids 2,6,9",
        ) from None
    return ids


def check_stores(stores: Sequence[FeatureStore], target: TargetInfo) -> None:
    """Raise `UserError` for a store of another target's answers, or of other layers."""
    for store in stores:
        if store.manifest.target["sha256"] != target.sha256:
            raise UserError(
                f"was captured from another target than {target.folder}",
                where=store.folder,
                hint="give a store of this target",
            )
        first, found = stores[0].manifest.layer_ids, store.manifest.layer_ids
        if found != first:
            raise UserError(
                f"has the layers {list(found)}, {stores[0].folder} has {list(first)}",
                where=store.folder,
                hint="give stores that one draft can be trained on: capture both with the same "
                "--layer-ids",
            )


def frequent_tokens(
    config: InitConfig,
    target: TargetInfo,
    stores: Sequence[FeatureStore],
    note: Callable[[str], None],
) -> Tensor:
    """The `vocab` tokens most frequent in the stores' responses, ascending ids [vocab].

    Where fewer are found, the lowest of the other ids fill up.
    """
    import torch

    assert config.vocab is not None
    if not stores:
        raise UserError(
            "--vocab needs a feature store to count tokens in", hint="give --store DIR as well"
        )
    if not 0 < config.vocab < target.vocab_size:
        raise UserError(
            f"--vocab is {config.vocab}, the target has {target.vocab_size} tokens",
            hint="give fewer, or leave --vocab out for the full vocabulary",
        )
    counts = torch.zeros(target.vocab_size, dtype=torch.long)
    for sequence in chain.from_iterable(stores):
        counts += sequence.input_ids[sequence.loss_mask].bincount(minlength=target.vocab_size)
    kept = counts.argsort(descending=True, stable=True)[: config.vocab].sort().values
    seen, all_seen = int((counts[kept] > 0).sum()), int((counts > 0).sum())
    covered = counts[kept].sum() / counts.sum()
    counted = ", ".join(str(store.folder) for store in stores)
    note(
        f"{config.vocab:,} of {target.vocab_size:,} tokens kept, {covered:.2%} of the "
        f"{int(counts.sum()):,} response tokens in {counted}."
    )
    if seen < config.vocab:
        note(f"The responses have only {all_seen:,} different tokens; capture more of them.")
    return kept


def next_commands(
    config: InitConfig, info: DraftInfo, target: str, stores: Sequence[FeatureStore] = ()
) -> list[str]:
    """The commands that make a base draft of this one, or adapt it where it is one already;
    `target` as the user calls it.

    Of several stores each is mixed in by its share of the sequences, so that all are seen alike.
    """
    target, out = shlex.quote(target), shlex.quote(str(config.out))
    store = shlex.quote(str(stores[0].folder)) if stores else STORE
    total = sum(len(one) for one in stores)
    mixed = [f" --mix {shlex.quote(f'{one.folder}={len(one) / total:.3g}')}" for one in stores[1:]]
    if FAMILIES[info.family].born_trained:
        flags, steps = "", ""
    else:
        flags = " --arm full" if "lm_head.weight" in info.shared else " --arm full --lm-head"
        steps = " --steps 2000"
    flags += f" --draft-steps {info.max_k}" if info.max_k else ""  # all heads, the whole block
    capture = f"afaspec capture {target} {PROMPTS} --draft {out} --split train --out {store}"
    return [
        *([] if stores else [capture]),
        f"afaspec train --store {store}{''.join(mixed)} --draft {out} --out {RUN}{flags}{steps}",
        f"afaspec merge {RUN} --out {RUN}-merged",
    ]

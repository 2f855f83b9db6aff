"""The stores of a run: the one that is learned, and those that are replayed or watched beside it.

Learning one kind of traffic costs a draft some of what it knew of others. Replaying sequences of
them keeps it, and holding some of them out shows how much was kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from afaspec.store.division import Few, Numbers, divide, repeats
from afaspec.store.read import FeatureStore
from afaspec.train.checks import check_fit
from afaspec.train.config import TrainConfig
from drafts.checkpoint.info import DraftInfo
from drafts.errors import UserError
from drafts.target.info import TargetInfo

# Sequences to train on, and held out.
Split = tuple[Sequence[int] | Numbers, Sequence[int] | Numbers]
NO_ROOTS: NDArray[np.int64] = np.empty(0, np.int64)


@dataclass(frozen=True)
class Part:
    """A store's part in a run: its sequences to train on and held out, by number.

    `share` is that of each step's sequences which come from here; a store of share 0 is watched.
    """

    name: str
    store: FeatureStore
    train: Numbers
    held_out: Numbers
    share: Fraction = Fraction(1)

    def roots(self, numbers: Numbers) -> NDArray[np.int64]:
        """Where these sequences' prompts begin, each once; nothing where the store does not say."""
        roots = self.store.roots
        return NO_ROOTS if roots is None else np.unique(roots[numbers])


def parts_of(
    config: TrainConfig,
    store: FeatureStore,
    split: Split,
    draft: DraftInfo,
    target: TargetInfo,
    note: Callable[[str], object] = lambda text: None,
) -> list[Part]:
    """The domain's part of `store`, divided as `split`, then that of each store of `config.mix`.

    The domain's is what it would be alone. What another store has of its prompts is left out of
    that one, so that nothing is trained on that is held out. Raises `UserError` for a store that
    cannot be read, does not fit, or has nothing of its own.
    """
    own = 1 - sum((share for _, share in config.mixed), Fraction(0))
    train, held_out = (np.asarray(side, np.int32) for side in split)
    parts = [Part("", store, train, held_out, own)]
    for path, share in config.mixed:
        other = FeatureStore.open(path)
        check_fit(other.manifest, other.folder, draft, target)
        check_alike(other, store)
        if any(one.store.manifest.content_sha256 == other.manifest.content_sha256 for one in parts):
            raise UserError(
                "is mixed with itself: this run has a store of the same content already",
                where=other.folder,
                hint="give --mix a store of other prompts than --store, and each one once",
            )
        name = other.folder.resolve().name
        if name in {one.name for one in parts}:
            name = f"{name}-{len(parts)}"
        parts.append(beside(parts, name, other, share, config, note))
    return parts


def check_alike(store: FeatureStore, other: FeatureStore) -> None:
    """Raise `UserError` where two stores of one target hold other kinds of hidden states."""
    for what, flag, found, wanted in (
        ("layers", "--layer-ids", list(store.manifest.layer_ids), list(other.manifest.layer_ids)),
        ("states computed in", "--dtype", store.manifest.dtype, other.manifest.dtype),
    ):
        if found != wanted:
            raise UserError(
                f"holds {what} {found}, {other.folder} {what} {wanted}",
                where=store.folder,
                hint=f"capture one of them again as the other was captured ({flag})",
            )


def beside(
    parts: Sequence[Part],
    name: str,
    store: FeatureStore,
    share: Fraction,
    config: TrainConfig,
    note: Callable[[str], object],
) -> Part:
    """The part of `store`, without the prompts that `parts` have."""
    seen = np.concatenate(
        [one.store.prompt_hashes[side] for one in parts for side in (one.train, one.held_out)]
    )
    doubled = int(repeats(store, seen).sum())
    train = held_out = np.empty(0, np.int32)
    if doubled < len(store):
        division = divide(store, config.eval_fraction, limit=config.validation_limit, seen=seen)
        train, held_out = division.train, division.held_out
    if (roots := store.roots) is not None:
        learned = np.concatenate([one.roots(one.train) for one in parts])
        shown = np.concatenate([one.roots(one.held_out) for one in parts])
        train = train[~Few(shown).has(roots[train])]
        held_out = held_out[~Few(learned).has(roots[held_out])]
    if not len(held_out) or (share and not len(train)):
        missing = "hold out" if len(train) else "train on"
        raise UserError(
            f"has no prompts of its own to {missing}: {doubled} of its {len(store)} sequences "
            f"repeat prompts of {parts[0].store.folder}, and others begin as those do",
            where=store.folder,
            hint="give --mix a store of other prompts",
        )
    if doubled:
        note(
            f"{store.folder}: {doubled} of {len(store)} sequences are left out, whose prompts "
            "the run has already"
        )
    return Part(name, store, train, held_out, share)

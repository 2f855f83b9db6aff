"""Which sequences of a store are trained on, and which are held out to be evaluated."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from afaspec.store.read import FeatureStore
from bench.prompts.rows import ROOTS
from bench.prompts.select import first_trained, side_of
from drafts.errors import UserError

Numbers = NDArray[np.int32]  # of sequences in their store
NONE: NDArray[np.int64] = np.empty(0, np.int64)


@dataclass(frozen=True)
class Division:
    """Sequence numbers, shuffled alike every time, so that the first few are a sample.

    `dropped` counts those that are neither trained on nor held out.
    """

    train: Numbers
    held_out: Numbers
    dropped: int


def divide(
    store: FeatureStore,
    fraction: float,
    *,
    limit: int | None = None,
    seen: NDArray[np.int64] = NONE,
) -> Division:
    """Hold out the first `fraction` of the store's side, by where each prompt begins.

    All sequences that begin alike are on one side. Held out are as many beginnings as give `limit`
    sequences, and one at least; what they leave is trained on, but for prompts that repeat, token
    for token, one that is held out or one of `seen` (`FeatureStore.prompt_hashes`). A store that
    does not say where its prompts begin is divided by number. Raises `UserError` where a side has
    none.
    """
    usable = np.ones(len(store), bool)
    if len(seen):
        usable = ~repeats(store, seen)
    held = _held_out(store, usable, fraction, limit)
    hashes = [values[held[where]] for where, values in store.each("prompt_hash")]
    train = usable & ~held & ~repeats(store, np.concatenate(hashes or [NONE]))
    if not train.any() or not held.any():
        raise UserError(
            f"holds {len(store)} sequences; their prompts begin too much alike, or are too few, to "
            "train on some and hold out others",
            where=store.folder,
            hint="capture more prompts, and more varied ones",
        )
    order = shuffled(store)
    side = train.view(np.int8) + 2 * held.view(np.int8)
    side = side[order]
    trained, held_out = order[side == 1], order[side == 2][:limit]
    return Division(trained, held_out, len(store) - len(trained) - len(held_out))


def shuffled(store: FeatureStore) -> Numbers:
    """The numbers of all sequences in the one order of every division."""
    generator = torch.Generator().manual_seed(0)
    order: Numbers = torch.randperm(len(store), generator=generator, dtype=torch.int32).numpy()
    return order


def repeats(store: FeatureStore, hashes: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which sequences have a prompt of one of these `FeatureStore.prompt_hashes`."""
    found = np.empty(len(store), bool)
    few = Few(hashes)
    for where, values in store.each("prompt_hash"):
        found[where] = few.has(values)
    return found


class Few:
    """A set of numbers, to be asked for many at once.

    Almost all that are not in it are known by their last bits; numpy's own `isin` sorts all that it
    is asked for.
    """

    def __init__(self, numbers: NDArray[np.int64]):
        self._numbers = np.unique(numbers)
        bits = min(24, max(16, len(self._numbers).bit_length() + 4))
        self._mask = (1 << bits) - 1
        self._last_bits = np.zeros(1 << bits, bool)
        self._last_bits[self._numbers & self._mask] = True

    def has(self, values: NDArray[np.int64]) -> NDArray[np.bool_]:
        found: NDArray[np.bool_] = self._last_bits[values & self._mask]
        (likely,) = found.nonzero()
        places = np.searchsorted(self._numbers, values[likely])
        at_most = np.minimum(places, len(self._numbers) - 1)
        found[likely] = self._numbers[at_most] == values[likely]
        return found


def _held_out(
    store: FeatureStore, usable: NDArray[np.bool_], fraction: float, limit: int | None
) -> NDArray[np.bool_]:
    """Which sequences are held out: those that begin as the first of the usable ones do."""
    if not store.has_roots:
        return _first_in_order(store, usable, fraction, limit)
    end = first_trained(fraction, _side(store))
    inside, least = [], ROOTS - 1
    for where, roots in store.each("root"):
        roots = roots[usable[where]]
        inside.append(roots[roots <= end - 1])
        least = min(least, int(roots.min(initial=ROOTS - 1)))
    below = np.concatenate(inside or [NONE])
    count = len(below) if limit is None else min(limit, len(below))
    last = int(np.partition(below, count - 1)[count - 1]) if count else least
    held = usable.copy()
    for where, roots in store.each("root"):
        held[where] &= roots <= last
    return held


def _first_in_order(
    store: FeatureStore, usable: NDArray[np.bool_], fraction: float, limit: int | None
) -> NDArray[np.bool_]:
    """Of a store that does not say where its prompts begin: as if that were spread evenly."""
    order, end = shuffled(store), first_trained(fraction)
    (ranks,) = usable[order].nonzero()
    inside = sum((2 * rank + 1) * ROOTS // (2 * len(store)) < end for rank in ranks.tolist())
    held = np.zeros(len(store), bool)
    held[order[ranks[: max(1, inside if limit is None else min(limit, inside))]]] = True
    return held


def _side(store: FeatureStore) -> tuple[float, float]:
    """The part of all roots that the store was captured from."""
    settings = store.manifest.settings
    return side_of(settings.get("split"), float(settings.get("eval_fraction") or 0.0))

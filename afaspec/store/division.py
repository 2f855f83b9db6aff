"""Which sequences of a store are trained on, and which are held out to be evaluated."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

import torch

from afaspec.store.read import FeatureStore
from bench.prompts.rows import ROOTS
from bench.prompts.select import is_held_out, side_of
from drafts.errors import UserError


@dataclass(frozen=True)
class Division:
    """Sequence numbers, shuffled alike every time, so that the first few are a sample.

    `dropped` counts those that are neither trained on nor held out.
    """

    train: list[int]
    held_out: list[int]
    dropped: int


def divide(
    store: FeatureStore,
    fraction: float,
    *,
    limit: int | None = None,
    seen: Set[tuple[int, ...]] = frozenset(),
) -> Division:
    """Hold out the first `fraction` of the store's side, by where each prompt begins.

    All sequences that begin alike are on one side. Held out are as many beginnings as give `limit`
    sequences, and one at least; what they leave is trained on, but for prompts that repeat, token
    for token, one that is held out or one of `seen`. A store that does not say where its prompts
    begin is divided by number. Raises `UserError` where a side has none.
    """
    shuffled = torch.randperm(len(store), generator=torch.Generator().manual_seed(0)).tolist()
    roots, side = store.roots, _side(store)
    if roots is None:
        roots, side = [0] * len(store), (0.0, 1.0)
        for rank, number in enumerate(shuffled):
            roots[number] = (2 * rank + 1) * ROOTS // (2 * len(store))
    usable = [i for i in shuffled if store.prompt_ids(i) not in seen] if seen else shuffled
    held_roots: set[int] = set()
    for count, root in enumerate(sorted(roots[i] for i in usable)):
        inside = is_held_out(root, fraction, side) and (limit is None or count < limit)
        if root not in held_roots and held_roots and not inside:
            break
        held_roots.add(root)
    held_out = [i for i in usable if roots[i] in held_roots]
    repeated = {store.prompt_ids(i) for i in held_out}
    train = [
        i for i in usable if roots[i] not in held_roots and store.prompt_ids(i) not in repeated
    ]
    if not train or not held_out:
        raise UserError(
            f"holds {len(store)} sequences; their prompts begin too much alike, or are too few, to "
            "train on some and hold out others",
            where=store.folder,
            hint="capture more prompts, and more varied ones",
        )
    held_out = held_out[:limit]
    return Division(train, held_out, len(store) - len(train) - len(held_out))


def _side(store: FeatureStore) -> tuple[float, float]:
    """The part of all roots that the store was captured from."""
    settings = store.manifest.settings
    return side_of(settings.get("split"), float(settings.get("eval_fraction") or 0.0))

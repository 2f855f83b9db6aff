"""Which prompts are taken: sides, samples and hashes, all decided by content and not by place."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from math import ceil
from typing import Any

from bench.prompts.rows import ROOTS, Prompt
from bench.records.settings import Split
from drafts.errors import UserError


def one_side(
    prompts: list[Prompt], split: Split | None, eval_fraction: float, where: str
) -> list[Prompt]:
    """One side of a fixed division, in which near-copies are together; all without `split`."""
    if split is None:
        return prompts
    side = [p for p in prompts if is_held_out(p.root, eval_fraction) == (split == "eval")]
    if not side:
        raise UserError(
            f"none of its {len(prompts)} prompts falls on the {split} side "
            f"(eval_fraction {eval_fraction})",
            where=where,
            hint="give more prompts or another eval_fraction",
        )
    return side


def is_held_out(root: int, fraction: float, side: tuple[float, float] = (0.0, 1.0)) -> bool:
    """Whether a root is among the first `fraction` of a side, which is a part of all roots.

    The first of all are the eval side; the first of the train side are held out of training. So one
    division by content serves capture, training, studies and measuring.
    """
    return root < first_trained(fraction, side)


def first_trained(fraction: float, side: tuple[float, float] = (0.0, 1.0)) -> int:
    """The least root that is not held out."""
    start, end = side
    return ceil((start + fraction * (end - start)) * ROOTS)


def side_of(split: str | None, eval_fraction: float) -> tuple[float, float]:
    """The part of all roots, as its two ends in [0, 1], that a side has; all without `split`."""
    sides = {"eval": (0.0, eval_fraction), "train": (eval_fraction, 1.0)}
    return sides.get(split or "", (0.0, 1.0))


def drawn(prompts: list[Prompt], limit: int | None, seed: int) -> list[Prompt]:
    """A sample of at most `limit` by `seed`, in the order it had."""
    if limit is None or limit >= len(prompts):
        return prompts

    def key(prompt: Prompt) -> str:
        name = prompt.id.rsplit("/", 1)[-1]  # not the folder: the sample must not depend on it
        said = prompt.split_key if prompt.text is None else prompt.text
        return f"{seed}:{name}:{said if prompt.ids is None else prompt.ids}"

    return _first(prompts, limit, key)


def equal_shares(prompts: list[Prompt], share: int) -> list[Prompt]:
    """`share` prompts of each category (or all it has), chosen by content, in their order."""
    of_category: dict[str | None, list[Prompt]] = defaultdict(list)
    for prompt in prompts:
        of_category[prompt.category].append(prompt)
    kept = {id(prompt) for group in of_category.values() for prompt in _first(group, share, _said)}
    return [prompt for prompt in prompts if id(prompt) in kept]


def content_sha256(prompts: Sequence[Prompt]) -> str:
    """SHA-256 over all that is asked, in order; not over where it came from."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(_digest(_said(prompt)).encode())
    return digest.hexdigest()


def _first(prompts: list[Prompt], count: int, key: Callable[[Prompt], str]) -> list[Prompt]:
    """The `count` whose keys hash lowest, in their order."""
    chosen = sorted(prompts, key=lambda prompt: _digest(key(prompt)))[:count]
    kept = {id(prompt) for prompt in chosen}
    return [prompt for prompt in prompts if id(prompt) in kept]


def _said(prompt: Prompt) -> str:
    said: list[Any] = [prompt.messages, prompt.text, prompt.turns, prompt.head_tokens]
    if prompt.tools or prompt.template_kwargs:
        said += [prompt.tools, prompt.template_kwargs]
    if prompt.ids is not None:
        said.append(prompt.ids)
    return json.dumps(said, ensure_ascii=False)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

"""What every draft family offers: reading, filling, writing and starting its drafts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drafts.checkpoint.info import DraftInfo
from drafts.checkpoint.source import Source

if TYPE_CHECKING:
    from torch import Tensor

    from drafts.nn.interface import Draft


@dataclass(frozen=True)
class InitOptions:
    """What a user may choose of a fresh draft; None takes the target's own or the family's usual.

    kept: the target ids that the draft can say, ascending (None: all); max_k: the tokens that a
    Medusa or parallel draft is made for.
    """

    num_layers: int | None = None
    layer_ids: tuple[int, ...] | None = None
    kept: Tensor | None = None
    max_k: int = 4
    seed: int = 0


@dataclass(frozen=True)
class Layout:
    """A checkpoint in another layout: its config.json, and a tensor's name there from its old."""

    config: dict[str, Any]
    rename: Callable[[str], str]


@dataclass(frozen=True)
class Family:
    """One draft family. The functions raise `UserError` for damaged checkpoints.

    matches: is this checkpoint one of the family? (asked in the registry's order)
    describe: the checkpoint's shape, checked against its tensors.
    module_name: the module's parameter name for a stored tensor name.
    load: the module in float32, given the target's folder where it shares tensors or layer ids.
    dump: config.json and tensors of a module in the layout `formats[0]`, given the dtype.
    fresh: a random module for the target in a folder.
    to_layout: a checkpoint of this config.json in another of `formats`, where there is another.
    """

    name: str
    title: str
    formats: tuple[str, ...]
    matches: Callable[[Source], bool]
    describe: Callable[[Source], DraftInfo]
    module_name: Callable[[str], str]
    load: Callable[[DraftInfo, Path | None], Draft]
    dump: Callable[[Any, Any], tuple[dict[str, Any], dict[str, Tensor]]]
    fresh: Callable[[Path, InitOptions], Draft]
    to_layout: Callable[[DraftInfo, dict[str, Any], str], Layout] | None = None

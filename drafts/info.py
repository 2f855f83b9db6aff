"""What a draft checkpoint is, read from its config and tensor headers; and what a family offers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from drafts.draft import Draft, Reads
    from drafts.fresh import FreshOptions
    from drafts.tensors import Header


@dataclass(frozen=True)
class DraftInfo:
    """A draft's shape and identity.

    `format` is the layout on disk. `layer_ids` are the target's hidden states that it reads: ()
    for none but the final one, None where the config does not name them. `shared` are the tensors
    that it takes from the target. `max_k` is the most tokens that it drafts in a step, None for any
    number. `speculation` are further settings that vLLM needs. `config` is the checkpoint's, flat.
    """

    folder: Path
    family: str
    format: str
    method: str
    hidden_size: int
    target_hidden_size: int
    vocab_size: int
    draft_vocab_size: int
    layer_ids: tuple[int, ...] | None
    max_positions: int | None
    rope: dict[str, Any] | None
    dtype: str
    shared: tuple[str, ...]
    config: dict[str, Any]
    sha256: str
    reads: Reads = "layers"
    max_k: int | None = None
    speculation: dict[str, Any] | None = None


@dataclass(frozen=True)
class Source:
    """An opened checkpoint: its raw config, and its tensors' headers by stored name."""

    folder: Path
    raw: dict[str, Any]
    headers: dict[str, Header]

    @property
    def config_path(self) -> Path:
        return self.folder / "config.json"


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
    fresh: Callable[[Path, FreshOptions], Draft]
    to_layout: Callable[[DraftInfo, dict[str, Any], str], Layout] | None = None

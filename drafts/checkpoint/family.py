"""What every draft family offers: reading, filling, writing and starting its drafts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from drafts.checkpoint.info import DraftInfo
from drafts.checkpoint.source import Source
from drafts.quantization import without_quantization
from drafts.target.info import TargetInfo

if TYPE_CHECKING:
    from torch import Tensor

    from drafts.nn.interface import Draft


@dataclass(frozen=True)
class InitOptions:
    """What a user may choose of a fresh draft; None takes the target's own or the family's usual.

    kept: the target ids that the draft can say, ascending (None: all); max_k: the tokens that a
    Medusa or parallel draft is made for; from_target: its layers begin as the target's last, in
    families that can (`starts_from_target`).
    """

    num_layers: int | None = None
    layer_ids: tuple[int, ...] | None = None
    kept: Tensor | None = None
    max_k: int = 4
    intermediate_size: int | None = None
    seed: int = 0
    from_target: bool = False

    def draft_vocab_size(self, target: TargetInfo) -> int:
        """How many tokens the draft can say."""
        return target.vocab_size if self.kept is None else len(self.kept)


@dataclass(frozen=True)
class Layout:
    """A checkpoint in another layout: its config.json, and a tensor's name there from its old.

    `shapes` are of tensors, by their new names, that have another one there. `replaced` are the
    tensors that a reader takes from the target instead, where the config names one. `hindrances`
    say what of the draft cannot be expressed there.
    """

    config: dict[str, Any]
    rename: Callable[[str], str]
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    replaced: tuple[str, ...] = ()
    hindrances: tuple[str, ...] = ()


class Family(ABC):
    """One draft family: how its checkpoints are told, read, filled into a module, and written.

    `name` is what a user calls it, `title` what a reader does; `formats` are its layouts on disk,
    the first one the layout that is written; `starts_from_target` says whether fresh layers can be
    copies of the target's, `born_trained` that a fresh draft drafts already. Methods raise
    `UserError` for damaged checkpoints.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    formats: ClassVar[tuple[str, ...]]
    starts_from_target: ClassVar[bool] = False
    born_trained: ClassVar[bool] = False

    @abstractmethod
    def matches(self, source: Source) -> bool:
        """Is this checkpoint one of the family? Asked in the registry's order."""

    @abstractmethod
    def describe(self, source: Source) -> DraftInfo:
        """The checkpoint's shape, checked against its tensors."""

    @abstractmethod
    def module_name(self, stored: str) -> str:
        """The module's parameter name for a stored tensor name."""

    @abstractmethod
    def load(self, info: DraftInfo, target: TargetInfo | None) -> Draft:
        """The module in float32; `target` where it shares tensors or layer ids."""

    @abstractmethod
    def dump(self, draft: Any, dtype: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """config.json and tensors of a module in the layout `formats[0]`."""

    @abstractmethod
    def init(self, target: TargetInfo, options: InitOptions) -> Draft:
        """A fresh module for the target: random but for what `options` has from it."""

    def written_config(self, info: DraftInfo, raw: dict[str, Any]) -> dict[str, Any]:
        """The config.json of a changed copy: `raw`, but for what no longer holds or serves."""
        return without_quantization(raw)

    def to_layout(self, info: DraftInfo, raw: dict[str, Any], layout: str) -> Layout:
        """A checkpoint of the config.json `raw` in another of `formats`, where there is another."""
        raise NotImplementedError(f"{self.title} has one layout")

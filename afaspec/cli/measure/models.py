"""The models of `afaspec bench` and `afaspec sweep`: their flags, and how drafts are opened."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from afaspec.config import TargetAdapter
from bench.records.settings import Settings

if TYPE_CHECKING:
    from bench.records.arms import Arm


class ModelNames(Settings):
    """What the target is served with, and what drafts for it, by name or folder."""

    GROUP: ClassVar[str] = "Models"

    target_adapter: TargetAdapter = None
    draft: list[str] = Field(
        [],
        description="NAME=FOLDER of a draft; for FOLDER a hub id, smollm2-draft or embedded-draft; "
        "repeatable",
    )
    ngram: bool = Field(False, description="also measure prompt lookup")

    def open_arms(self, *, none: bool) -> tuple[Arm, ...]:
        """The arms of a run; `none` adds the one without a draft."""
        from bench.records.arms import choose_arms

        return choose_arms(self.open_drafts(), none=none, ngram=self.ngram)

    def open_drafts(self) -> list[str]:
        """NAME=FOLDER of every draft, with the folder in place of a shipped one or a hub id.

        A hub id alone is named after its repository.
        """
        from afaspec.pairs.names import NAMES, resolve_model
        from drafts.hub import is_hub_id

        opened = []
        for text in self.draft:
            name, _, folder = text.partition("=") if "=" in text else ("", "", text)
            if folder in NAMES or is_hub_id(folder):
                name = name or folder.partition("@")[0].rpartition("/")[2]
                text = f"{name}={resolve_model(folder)}"
            opened.append(text)
        return opened

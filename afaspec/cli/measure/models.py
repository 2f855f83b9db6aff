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
        [], description="NAME=FOLDER of a draft (or NAME=embedded-draft); repeatable"
    )
    ngram: bool = Field(False, description="also measure prompt lookup")

    def open_arms(self, *, none: bool) -> tuple[Arm, ...]:
        """The arms of a run; `none` adds the one without a draft."""
        from bench.records.arms import choose_arms

        return choose_arms(self.open_drafts(), none=none, ngram=self.ngram)

    def open_drafts(self) -> list[str]:
        """NAME=FOLDER of every draft, with the shipped one's folder in place of its name."""
        from afaspec.embedded.names import resolve_model

        parts = [text.partition("=") for text in self.draft]
        return [
            f"{name}={resolve_model(folder)}" if folder == "embedded-draft" else text
            for text, (name, _, folder) in zip(self.draft, parts, strict=True)
        ]

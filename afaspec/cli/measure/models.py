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
        description="NAME=FOLDER of a draft; for FOLDER a hub id, smollm2-draft, embedded-draft, "
        "ngram, suffix or mtp; behind it ,k=5 or another ,FIELD=VALUE of vLLM's "
        "--speculative-config; repeatable",
    )
    ngram: bool = Field(False, description="also measure prompt lookup")
    suffix: bool = Field(
        False, description="also measure suffix decoding (needs the package arctic-inference)"
    )
    mtp: bool = Field(
        False, description="also measure the layers that the target itself brings for drafting"
    )

    def open_arms(self, *, none: bool) -> tuple[Arm, ...]:
        """The arms of a run; `none` adds the one without a draft."""
        from bench.records.arms import choose_arms
        from serving.speculation import WITHOUT_FOLDER

        return choose_arms(
            self.open_drafts(),
            none=none,
            without_folder=[one for one in WITHOUT_FOLDER if getattr(self, one)],
        )

    def open_drafts(self) -> list[str]:
        """Every draft as given, with a folder in place of a shipped one's name or a hub id.

        A hub id alone is named after its repository.
        """
        from afaspec.pairs.names import NAMES, resolve_model
        from bench.records.arms import FIELD
        from drafts.hub import is_hub_id

        opened = []
        for text in self.draft:
            source, *fields = FIELD.split(text)
            name, _, folder = source.partition("=") if "=" in source else ("", "", source)
            if folder in NAMES or is_hub_id(folder):
                name = name or folder.partition("@")[0].rpartition("/")[2]
                text = ",".join([f"{name}={resolve_model(folder)}", *fields])
            opened.append(text)
        return opened

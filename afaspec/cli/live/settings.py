"""What `serve` and `collect` both ask about the traffic that is kept."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from bench.records.settings import Settings
from serving.traffic.recorder import CollectSettings


class Kept(Settings):
    """How much is kept, and in which form."""

    GROUP: ClassVar[str] = "Traffic"

    sample_rate: float = Field(0.1, gt=0, le=1, description="share of requests kept")
    keep_mib: float = Field(1024.0, gt=0, description="MiB on disk at most; the oldest rows go")
    keep_days: float = Field(30.0, gt=0, description="how long rows are kept at most")
    redact: list[str] = Field(
        [], description="regular expression of what is never kept (repeat it)"
    )
    redact_function: str | None = Field(
        None, description="module:name of a function of a text that gives the text to keep"
    )
    keep_ids: bool = Field(False, description="keep token ids in place of texts")

    def into(self, folder: Path) -> CollectSettings:
        """The settings of a recorder that writes there."""
        return CollectSettings(
            str(folder.absolute()),
            self.sample_rate,
            self.keep_mib,
            self.keep_days,
            tuple(self.redact),
            self.redact_function,
            self.keep_ids,
        )

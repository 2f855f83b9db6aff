"""One engine for several drafts of one build: whichever is asked is put in first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from drafts.checkpoint.info import DraftInfo
from serving.engine.engine import EngineProcess, Generation


@dataclass(frozen=True)
class DraftOf:
    """A draft in an engine that others use too. Asked as an engine of its own would be.

    Putting it in takes its own time, which is in no generation's.
    """

    engine: EngineProcess
    draft: DraftInfo

    @property
    def description(self) -> dict[str, Any]:
        """As the engine's."""
        return self.engine.description

    def generate(
        self, prompt_token_ids: list[list[int]], max_tokens: int, **options: Any
    ) -> Generation:
        """As `EngineProcess.generate`."""
        self._put_in()
        return self.engine.generate(prompt_token_ids, max_tokens, **options)

    def score(
        self, prompt_token_ids: list[int], output_ids: list[int], top: int
    ) -> list[list[tuple[int, float]]]:
        """As `EngineProcess.score`."""
        self._put_in()
        return self.engine.score(prompt_token_ids, output_ids, top)

    def threads(self) -> int:
        """As `EngineProcess.threads`."""
        return self.engine.threads()

    def wait_ready(self) -> None:
        """As `EngineProcess.wait_ready`."""
        self.engine.wait_ready()

    def _put_in(self) -> None:
        if self.engine.settings.draft != self.draft:
            self.engine.replace_draft(self.draft)


Engine = EngineProcess | DraftOf

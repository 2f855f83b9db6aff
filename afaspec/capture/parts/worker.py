"""What one worker of a capture does: part after part, with the target loaded once where it can."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from afaspec.capture.config import CaptureConfig
from afaspec.capture.parts.part import part_of
from afaspec.capture.run import CaptureProgress, capture_planned
from afaspec.store.write import LockedError
from drafts.checkpoint.info import DraftInfo

Report = Callable[[int, str, float, int], object]
EVERY = 1.0  # seconds between reports
PATIENCE = 60.0  # seconds


class Worker:
    """`report` is told a part's number, its stage, how many of its prompts are done, and tokens."""

    def __init__(self, config: dict[str, Any], size: int, report: Report):
        from afaspec.capture.adapted_target import open_target
        from afaspec.capture.plan import plan_capture, settle
        from afaspec.capture.writers.choose import open_writer
        from afaspec.pairs.names import open_draft

        self.config = CaptureConfig.model_validate(config)
        assert self.config.batch_size
        target = open_target(self.config.target, self.config.target_adapter)
        draft: DraftInfo | None = open_draft(self.config.draft) if self.config.draft else None
        setup = settle(self.config, target, draft)
        self.plan = plan_capture(setup, lambda _: None)
        self.writer = open_writer(setup)
        self.size, self.report = size, report  # of the part that is captured

    def capture(self, number: int) -> int:
        """Capture a part, or what is left of it; its number.

        One that another worker holds may be that of a dead one, whose end the system has not seen.
        """
        assert self.config.batch_size
        part = part_of(self.plan, number, self.size, self.config.batch_size)
        give_up = time.monotonic() + PATIENCE
        while True:
            try:
                capture_planned(part, self.writer, self._reports(number), lambda _: None)
                return number
            except LockedError:
                if time.monotonic() > give_up:
                    raise
                time.sleep(EVERY)

    def _reports(self, number: int) -> Callable[[CaptureProgress], None]:
        last = 0.0

        def report(now: CaptureProgress) -> None:
            nonlocal last
            if time.monotonic() - last >= EVERY or now.done == now.total:
                last = time.monotonic()
                self.report(number, now.stage, now.done, now.tokens)

        return report


class RemoteWorker(Worker):
    """One that reports to an actor of `Board`."""

    def __init__(self, config: dict[str, Any], size: int):
        super().__init__(config, size, lambda *_: None)

    def capture_for(self, board: Any, number: int) -> int:
        """As `capture`, told to `board`."""
        self.report = lambda *told: board.write.remote(*told)
        return self.capture(number)


class Board:
    """How far each part is, as its worker said last."""

    def __init__(self) -> None:
        self._parts: dict[int, tuple[str, float, int]] = {}

    def write(self, number: int, stage: str, done: float, tokens: int) -> None:
        self._parts[number] = stage, done, tokens

    def copy(self) -> Board:
        return self

    @property
    def prompts(self) -> float:
        """Those that are captured, of the parts that were reported."""
        return sum(done for stage, done, _ in self._parts.values() if stage == "capture")

    @property
    def tokens(self) -> int:
        return sum(tokens for _, _, tokens in self._parts.values())

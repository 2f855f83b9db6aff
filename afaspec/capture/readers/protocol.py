"""What every reader offers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from afaspec.capture.features import States


class Reader(Protocol):
    """What reads finished texts."""

    def read(self, sequences: Sequence[Sequence[int]]) -> Iterator[States]:
        """Yield the states of each sequence, in order."""

    def close(self) -> None:
        """Free what it holds."""

"""How progress is told, and what else a user should know."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]  # stage, done, total
Note = Callable[[str], None]

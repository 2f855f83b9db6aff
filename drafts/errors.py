"""The one exception that users see: what is wrong, where, and how to mend it."""

from __future__ import annotations

from pathlib import Path


class UserError(Exception):
    """A mistake in what the user handed over. The command line prints it without a traceback.

    `where` names the file (and line), `mend` says what to do about it.
    """

    exit_code = 2

    def __init__(self, problem: str, *, where: str | Path | None = None, mend: str | None = None):
        self.problem, self.where, self.mend = problem, where, mend
        parts = [f"{where}: {problem}" if where is not None else problem]
        if mend:
            parts.append(f"To mend it: {mend}")
        super().__init__("\n".join(parts))

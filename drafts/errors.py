"""The one exception that users see: what is wrong, where, and how to mend it."""

from __future__ import annotations

from pathlib import Path


class UserError(Exception):
    """A mistake in what the user handed over. The command line prints it without a traceback.

    `where` names the file (and line), `hint` says what to do about it.
    """

    exit_code = 2

    def __init__(self, problem: str, *, where: str | Path | None = None, hint: str | None = None):
        self.problem, self.where, self.hint = problem, where, hint
        parts = [f"{where}: {problem}" if where is not None else problem]
        if hint:
            parts.append(f"To mend it: {hint}")
        super().__init__("\n".join(parts))


class NotFiniteError(UserError):
    """A loss, a gradient, a weight or a logit is NaN or infinite where it must not be."""


def first_line(error: Exception) -> str:
    """What a library's error says, cut to one line."""
    return (str(error).strip().splitlines() or [""])[0][:300]

"""Run the real `afaspec` entry point in this process."""

from __future__ import annotations

import contextlib
import io
import sys


def run_command(*arguments: object) -> tuple[int, str]:
    """Exit code and standard error of `afaspec ARGUMENTS`."""
    from afaspec.cli import main

    error, before = io.StringIO(), sys.argv
    sys.argv = ["afaspec", *map(str, arguments)]
    try:
        with contextlib.redirect_stderr(error):
            main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        sys.argv = before
    return code, error.getvalue()

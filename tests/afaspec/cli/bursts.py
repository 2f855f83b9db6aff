"""A child of test_console: work in bursts, one for each line of stdin, and nothing in between."""

from __future__ import annotations

import sys

from afaspec.cli import console
from bench.report.console import stage_bars


def main() -> None:
    console.PLAIN_SECONDS = 0.02
    with console.progress() as bars:
        report = stage_bars(bars)
        for line in sys.stdin:
            stage, done, total = line.split(",")
            report(stage, int(done), int(total))


if __name__ == "__main__":
    main()

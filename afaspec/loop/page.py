"""A loop's history for people: a table in the terminal, a page with pictures."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afaspec.loop.history import Entry, History
from afaspec.loop.spans import Span, acceptance, read_spans
from bench.report.html import PageTable, render, write_page
from bench.report.plots.style import COLOURS, INK, Plot, as_svgs, write_pngs
from drafts.errors import UserError
from drafts.files import read_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE, SETTINGS = "report.html", "loop.json"
COLUMNS = ("Cycle", "Began", "Why", "Trial", "Gate", "Version", "Outcome")
POINTS = 60  # in a picture
MARKS = {"probation": "-", "collect": "--", "restore": ":"}


def cycles_of(history: History) -> list[list[str]]:
    """A row of `COLUMNS` for each cycle, the first one first."""
    rows = []
    for number, entries in groupby(history.entries, lambda entry: entry.cycle):
        if number:
            rows.append(_row(number, list(entries)))
    return rows


def _row(number: int, entries: list[Entry]) -> list[str]:
    data: dict[str, Any] = {}
    for entry in entries:
        data |= entry.data
    last = entries[-1]
    tried = f"{data['base']:.2f} to {data['length']:.2f}" if "length" in data else "-"
    gate = data.get("gate")
    judged = f"{gate['old']:.2f} to {gate['new']:.2f}, {gate['kept']:.1%} kept" if gate else "-"
    ended = f"{last.outcome}: {last.words}" if last.outcome else f"{last.state} since {last.when}"
    version = str(data.get("version", "-"))
    return [str(number), entries[0].when, entries[0].words, tried, judged, version, ended]


def write_report(folder: Path) -> Path:
    """Write the page of a loop's folder, and its pictures beside it; returns the page.

    Raises `UserError` for a folder without a loop.
    """
    history, spans = read_loop(folder), list(read_spans(folder))
    plots = list(loop_plots(history, spans)) if spans else []
    write_pngs(plots, folder)
    last = history.last
    page = render(
        "loop.html",
        headline=f"{last.state}: {last.words}",
        settings=f"Since {last.when}; {len(cycles_of(history))} cycles.",
        plots=as_svgs(plots),
        cycles=PageTable(COLUMNS, cycles_of(history)),
        entries=PageTable(
            ("Time", "Cycle", "State", "Why"),
            [[e.when, str(e.cycle), e.state, e.words] for e in history.entries],
        ),
        settings_given=read_json(folder / SETTINGS),
        folder=folder.name,
    )
    return write_page(page, folder / PAGE)


def read_loop(folder: Path) -> History:
    """The history of a loop's folder. Raises `UserError` where there is none."""
    if not (folder / SETTINGS).is_file():
        raise UserError("no loop has run here", where=folder, hint="give the --out of a loop")
    return History(folder, read_only=True)


def loop_plots(history: History, spans: list[Span]) -> Iterator[Plot]:
    """Acceptance length, and tokens per second, over time, with what the loop did marked."""
    points = list(_points(spans))
    said = "over time, with drafts put in and drops marked"
    lengths = [(at, length) for at, length, _ in points if length is not None]
    yield (
        "acceptance",
        f"Acceptance length {said}",
        lambda: _over_time(history, spans, lengths, "Acceptance length", COLOURS["base"]),
    )
    speeds = [(at, speed) for at, _, speed in points]
    yield (
        "speed",
        f"Tokens per second {said}",
        lambda: _over_time(history, spans, speeds, "Tokens per second", COLOURS["full"]),
    )


def _points(spans: list[Span]) -> Iterator[tuple[float, float | None, float]]:
    """Middle of some looks (hours since the first), acceptance length, tokens per second. Looks of
    two versions of the draft are never in one point."""
    size = max(1, len(spans) // POINTS)
    for _, one in groupby(spans, lambda span: span.version):
        of_version = list(one)
        for start in range(0, len(of_version), size):
            some = of_version[start : start + size]
            seconds = sum(span.seconds for span in some)
            middle = (some[0].at + some[-1].at) / 2 - spans[0].at
            speed = sum(span.tokens for span in some) / seconds if seconds else 0.0
            yield middle / 3600, acceptance(some), speed


def _over_time(
    history: History, spans: list[Span], points: list[tuple[float, float]], what: str, colour: str
) -> Figure:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8.0, 3.3))
    hours = (spans[-1].at - spans[0].at) / 3600
    unit, scale = ("hours", 1.0) if hours > 2 else ("minutes", 60.0)
    axes.plot(*zip(*((scale * at, value) for at, value in points), strict=True), "o-",
              color=colour, markersize=3.5, linewidth=1.4)  # fmt: skip
    for entry in history.entries:
        if entry.state in MARKS and entry.at >= spans[0].at and "tries" not in entry.data:
            at = scale * (entry.at - spans[0].at) / 3600
            axes.axvline(at, color=INK, linestyle=MARKS[entry.state], linewidth=1.1)
            if entry.state == "probation":
                axes.annotate(
                    f"version {entry.data.get('version')}", (at, 1.0),
                    xycoords=("data", "axes fraction"), xytext=(4, -2),
                    textcoords="offset points", va="top", fontsize=9,
                )  # fmt: skip
    axes.set_title(what)
    axes.set_xlabel(unit)
    axes.set_ylim(bottom=1.0 if "length" in what else 0.0)
    axes.grid(axis="y")
    return figure

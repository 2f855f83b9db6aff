"""Pieces of HTML that every page of results is made of. What callers hand over is text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from bench.report.words import Cell

BEST = " class='best'"
MARKS = {"higher": "▲", "lower": "▼"}
LONG = 24  # characters from which a cell's text may break anywhere, such as a path


def page(title: str, headline: str, settings: str, body: str, foot: str) -> str:
    """A whole page that needs no other file and no network. `body` is HTML, the rest is text."""
    template = Template((files("bench.report") / "page.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(title),
        headline=escape(headline),
        settings=escape(settings),
        body=body,
        foot=escape(foot),
    )


def section(heading: str, *parts: str) -> str:
    """A section of the page from HTML parts; nothing where all parts are empty."""
    body = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{escape(heading)}</h2>\n{body}\n</section>\n" if body else ""


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of text; `kind` is a class of the page's style, for example `note`."""
    return f"<p class='{kind}'>{escape(text)}</p>" if kind else f"<p>{escape(text)}</p>"


def verdict_list(said: Sequence[tuple[str, str]]) -> str:
    """Sentences with a mark before each, from (verdict, sentence); nothing where there is none."""
    items = "".join(
        f"<li class='{verdict if verdict in MARKS else 'no'}'>"
        f"<span aria-hidden='true'>{MARKS.get(verdict, '=')}</span>{escape(words)}</li>\n"
        for verdict, words in said
    )
    return f"<ul class='verdicts'>\n{items}</ul>" if items else ""


def warning_list(said: Iterable[str]) -> str:
    """Sentences that a reader should not miss; nothing where there is none."""
    items = "".join(f"<li>{escape(text)}</li>" for text in said)
    return f"<ul class='warnings'>{items}</ul>" if items else ""


def plot_grid(svgs: Sequence[str]) -> str:
    """Plots side by side, as many as fit."""
    if not svgs:
        return ""
    return "<div class='plots'>\n" + "\n".join(f"<figure>{svg}</figure>" for svg in svgs) + "</div>"


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    *,
    caption: str = "",
    swatches: Sequence[str] | None = None,
) -> str:
    """A table whose rows become cards on a phone. The first cell of a row is its header.

    `swatches` are colours shown before the rows' names, those of the plots.
    """
    head = "".join(f"<th scope='col'>{escape(column)}</th>" for column in columns)
    body = ""
    for index, (first, *rest) in enumerate(rows):
        swatch = f"<i style='background:{swatches[index]}'></i>" if swatches else ""
        cells = "".join(_cell(cell, column) for cell, column in zip(rest, columns[1:], strict=True))
        body += f"<tr><th scope='row'>{swatch}{escape(first.text)}</th>{cells}</tr>\n"
    said = f"<caption>{escape(caption)}</caption>" if caption else ""
    return (
        f"<div class='scroll'><table class='result'>{said}<thead><tr>{head}</tr></thead>"
        f"<tbody>\n{body}</tbody></table></div>"
    )


def plain_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of text that scrolls sideways where it is too wide."""
    head = "".join(f"<th scope='col'>{escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(map(_plain_cell, row)) + "</tr>\n" for row in rows)
    return (
        f"<div class='scroll'><table class='plain'><thead><tr>{head}</tr></thead>"
        f"<tbody>\n{body}</tbody></table></div>"
    )


def definitions(values: Mapping[str, Any]) -> str:
    """Names and values one below the other, as settings are listed."""
    rows = "".join(
        f"<dt>{escape(key.replace('_', ' '))}</dt><dd>{escape(plain(value))}</dd>"
        for key, value in values.items()
    )
    return f"<dl>{rows}</dl>"


def plain(value: Any) -> str:
    """A setting's value as a reader writes it."""
    if value is None or value == []:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{key.replace('_', ' ')} {plain(part)}" for key, part in value.items())
    if isinstance(value, list):
        return ", ".join(plain(part) for part in value)
    return value if isinstance(value, str) else json.dumps(value)


def _plain_cell(text: str) -> str:
    wide = " class='long'" if len(text) > LONG else ""
    return f"<td{wide}>{escape(text)}</td>"


def _cell(cell: Cell, column: str) -> str:
    value = f"<b{BEST if cell.best else ''}>{escape(cell.text)}</b>"
    detail = f"<small>{escape(cell.detail)}</small>" if cell.detail else ""
    return f"<td data-column='{escape(column)}'><span>{value}{detail}</span></td>"

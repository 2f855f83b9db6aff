"""HTML pages from the templates beside this file; each needs no other file and no network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from bench.report.words import MARKS, TableCell, setting_words
from drafts.files import atomic_file

TEMPLATES = Environment(
    loader=PackageLoader("bench.report"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.globals["MARKS"] = MARKS
TEMPLATES.filters["setting_words"] = setting_words


@dataclass(frozen=True)
class PageTable:
    """What the templates' `table` (of cells) and `plain_table` (of texts) lay out.

    `swatches` are colours shown before the rows' names, those of the plots.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[TableCell]] | Sequence[Sequence[str]]
    swatches: Sequence[str] = ()
    caption: str = ""


def render(template: str, **values: Any) -> str:
    """The page of a template, for example `report.html`. What `values` hold is shown as text."""
    return TEMPLATES.get_template(template).render(values)


def write_page(page: str, path: Path) -> Path:
    """Write the page atomically; returns `path`."""
    with atomic_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path

"""`afaspec swap`: another draft for a running server."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from afaspec.cli.flags import configured
from bench.records.settings import Settings
from drafts.errors import UserError


class SwapConfig(Settings):
    """Which server, and what it is to draft with."""

    url: str = Field(description="address of the server, or of where its draft is changed")
    draft: str | None = Field(None, description="the new draft's folder or hub id")
    back: bool = Field(False, description="put the draft in again that served before this one")
    how: Literal["auto", "in-place", "rolling", "drained"] = Field(
        "auto",
        description="in place where only values differ; else another server takes over: rolling "
        "beside the old one, drained after it",
    )


@configured(SwapConfig, arguments=("url", "draft"))
def swap(config: SwapConfig) -> None:
    """Change the draft of the server at URL, which `afaspec serve --swappable` started.

    Requests under way keep their answers: the target checks every token. Without DRAFT it says what
    serves and what has served. On another machine, URL is the address where the draft is changed,
    and AFASPEC_ADMIN_TOKEN holds the token that the server was started with.

    [bold]Examples[/]

      afaspec swap http://127.0.0.1:8000 runs/merged

      afaspec swap http://127.0.0.1:8000 --back

      afaspec swap http://127.0.0.1:8000
    """
    from afaspec.cli.console import console
    from afaspec.pairs.names import open_draft
    from serving.server.ask import ask_for_change, ask_for_versions

    if config.back and config.draft:
        raise UserError("--back names the draft that served before", hint="leave DRAFT out")
    if not config.back and not config.draft:
        console.print(_table(ask_for_versions(config.url)))
        return
    folder = open_draft(config.draft).folder.absolute() if config.draft else None

    def report(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    done = ask_for_change(config.url, folder, config.how, report)
    took = f"{done['how']}, {done['seconds']:.2f} s"
    report(f"Version {done['number']} serves: {done['folder']} ({took})")


def _table(versions: list[dict[str, object]]) -> object:
    from rich.table import Table

    table = Table("version", "draft", "hash", "how", "since")
    for version in versions:
        table.add_row(
            str(version["number"]),
            str(version["folder"]),
            str(version["sha256"])[:12],
            str(version["how"]),
            str(version["since"]),
        )
    return table

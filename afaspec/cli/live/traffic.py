"""`afaspec traffic`: what was collected, and taking out of it what must go."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path
from typing import Any

from pydantic import AwareDatetime, Field

from afaspec.cli.flags import configured
from bench.records.settings import Settings
from drafts.errors import UserError


class TrafficConfig(Settings):
    """A folder, and which of its rows."""

    folder: Path = Field(description="folder that `serve --collect` or `collect` wrote")
    tag: str | None = Field(None, description="rows of this tag alone")
    since: AwareDatetime | None = Field(None, description="rows from this time on (ISO 8601)")
    before: AwareDatetime | None = Field(None, description="rows before this time")
    id: list[str] = Field([], description="row of this answer's id (repeat it)")
    export: Path | None = Field(None, description="write them as JSONL, decrypted, for capture")
    purge: bool = Field(False, description="remove them for good")


@configured(TrafficConfig, arguments=("folder",))
def traffic(config: TrafficConfig) -> None:
    """Say what a folder of traffic holds, write rows out for capture, or remove rows for good.

    [bold]Examples[/]

      afaspec traffic traffic

      afaspec traffic traffic --since 2026-11-01T00:00Z --export recent.jsonl

      afaspec traffic traffic --id chatcmpl-8f1d --purge
    """
    from afaspec.cli.console import console, note
    from drafts.files import atomic_file
    from serving.traffic.shards import KEY, Traffic

    if not config.folder.is_dir():
        raise UserError("is no folder", where=config.folder, hint="give one that was collected")
    chosen = any((config.tag, config.since, config.before, config.id))
    if config.purge and not chosen:
        raise UserError(
            "--purge says not which rows", hint="give --id, --tag, --since or --before with it"
        )
    store = Traffic(config.folder, key=os.environ.get(KEY))
    if config.export:
        import json

        count = 0
        with atomic_file(config.export) as temporary:
            temporary.touch(mode=0o600)
            with temporary.open("w", encoding="utf-8") as file:
                for row in filter(config_takes(config), store.rows()):
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                    count += 1
        note(f"{config.export}: {count:,} rows")
    if config.purge:
        note(f"{store.purge(config_takes(config)):,} rows removed")
    if not config.export and not config.purge:
        console.print(_table(store.rows(), config_takes(config)))
        note(f"{store.size() / 2**20:.2f} MiB in {len(store.shards())} files")


def config_takes(config: TrafficConfig) -> Any:
    """Whether a row is one that the configuration names."""
    from datetime import datetime

    def takes(row: dict[str, Any]) -> bool:
        time = datetime.fromisoformat(row["time"])
        return (
            (config.tag is None or row.get("tag") == config.tag)
            and (config.since is None or time >= config.since)
            and (config.before is None or time < config.before)
            and (not config.id or row["id"] in config.id)
        )

    return takes


def _table(rows: Any, takes: Any) -> Any:
    """Rows, tokens and acceptance by tag and version of the draft."""
    from rich.table import Table

    found: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in filter(takes, rows):
        kept = {name: row.get(name) for name in ("time", "usage", "acceptance")}
        found[row.get("tag", ""), str(row.get("draft_version", ""))].append(kept)
    table = Table("tag", "draft", "rows", "answer tokens", "acceptance length", "first", "last")
    for (tag, version), some in sorted(found.items()):
        tokens = sum((row["usage"] or {}).get("completion_tokens", 0) for row in some)
        counted = [row["acceptance"] for row in some if row["acceptance"]]
        drafts = sum(one["drafts"] for one in counted)
        accepted = sum(i * n for one in counted for i, n in enumerate(one["histogram"]))
        length = f"{1 + accepted / drafts:.2f}" if drafts else ""
        times = sorted(row["time"][:19] for row in some)  # UTC, to the second
        table.add_row(tag, version, f"{len(some):,}", f"{tokens:,}", length, times[0], times[-1])
    return table

"""A saved run, ours or another tool's, by what the file holds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.interchange import aiperf, guidellm, vllm_bench
from bench.interchange.foreign import ForeignRun, as_report
from bench.runs.saved import SavedRun, named_apart, read_run
from drafts.errors import UserError

WHOLE = (vllm_bench, guidellm)  # one JSON object a file


def read_any(path: Path) -> SavedRun:
    """A run of `afaspec bench`, `vllm bench serve`, guidellm or AIPerf; of ours or AIPerf's also by
    its folder. Raises `UserError` for anything else."""
    records = path / aiperf.RECORDS if path.is_dir() else path
    if records.name == aiperf.SUMMARY:
        records = path.with_name(aiperf.RECORDS)  # whose means these are
    foreign = read_foreign(records) if records.is_file() else None
    if foreign is None:
        return read_run(path)
    name = path.name if path.is_dir() else path.stem
    return SavedRun(name, records, as_report(foreign))


def read_any_runs(paths: Sequence[Path]) -> list[SavedRun]:
    """Several runs; those of one name are called by their paths."""
    return named_apart([read_any(path) for path in paths])


def read_foreign(path: Path) -> ForeignRun | None:
    """The run of another tool; None where the file is none of theirs."""
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        if path.suffix == ".jsonl":
            lines = [json.loads(line) for line in text.splitlines() if line.strip()]
            return aiperf.read(lines, path) if lines and all(map(aiperf.is_one, lines)) else None
        content: Any = json.loads(text)
        tool = next((tool for tool in WHOLE if tool.is_one(content)), None)
        return tool.read(content, path) if tool else None
    except json.JSONDecodeError:
        return None  # whose reader says so better
    except (KeyError, TypeError, ValueError, IndexError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"looks like another tool's run, and lacks what that has ({error!r})",
            where=path,
            hint="give a file as the tool wrote it",
        ) from None

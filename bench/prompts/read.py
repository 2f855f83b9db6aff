"""Prompts for capturing and measuring, from files, folders, the hub or suites."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from pathlib import Path

from bench.prompts.formats.collect import parse_rows
from bench.prompts.formats.files import ROW_SUFFIXES, holds_rows, read_rows
from bench.prompts.hub import HUB_ID, dataset_rows, is_dataset_folder
from bench.prompts.rows import Prompt
from bench.prompts.select import drawn, one_side
from bench.prompts.source_files import SUFFIXES, source_paths, source_prompts
from bench.prompts.suites import is_suite, read_suite
from bench.records.settings import PromptSettings
from drafts.errors import UserError

TABLES = (".csv", ".tsv", ".xls", ".xlsx")


def read_prompts(
    source: str | Path,
    settings: PromptSettings | None = None,
    *,
    seed: int = 0,
    suffixes: tuple[str, ...] | None = None,
    note: Callable[[str], None] | None = None,
) -> list[Prompt]:
    """The prompts of a file of rows, a folder of source files, a dataset, or a suite.

    A suite is written `suite:NAME`; see `bench.prompts.suites` for the rest, and
    `bench.prompts.formats` for the files and rows.

    Of the settings, `split` keeps one side of a fixed division by content: all that begins alike is
    in "train" or all of it in "eval". `limit` keeps a sample drawn by `seed`, in the order of the
    source. Plain texts and source files give passages whose first `prompt_tokens` tokens are the
    prompt. `note` is told what was passed over. Raises `UserError` with file and line.
    """
    chosen = settings or PromptSettings()
    if is_suite(str(source)):
        prompts = list(read_suite(str(source), chosen, note=note).prompts)
    else:
        found = _all_prompts(str(source), chosen, seed, suffixes, note or (lambda text: None))
        prompts = one_side(found, chosen.split, chosen.eval_fraction, str(source))
    return drawn(prompts, chosen.limit, seed)


def _all_prompts(
    source: str,
    settings: PromptSettings,
    seed: int,
    suffixes: tuple[str, ...] | None,
    note: Callable[[str], None],
) -> list[Prompt]:
    path = Path(source)
    if path.suffix.lower() in TABLES:
        raise UserError(
            f"is a table ({path.suffix}); expected JSON lines, a JSON array or parquet",
            where=path,
            hint="save it in one of these",
        )
    if (path.exists() and path.suffix == ".parquet") or is_dataset_folder(path):
        rows = dataset_rows(source)
    elif path.is_file() and holds_rows(path):
        rows = read_rows(path)
    elif path.is_dir() and (files := _files_of_rows(path, suffixes, note)):
        rows = chain.from_iterable(map(read_rows, files))
    elif path.exists():
        return list(source_prompts(path, settings.prompt_tokens, seed, suffixes, note))
    elif HUB_ID.match(source) and not source.endswith((*ROW_SUFFIXES, *SUFFIXES, ".parquet")):
        rows = dataset_rows(source)
    else:
        raise UserError(
            "no such file or folder; expected a JSONL file, a folder of source files, a hub "
            "dataset id or suite:NAME",
            where=path,
            hint="check the path",
        )
    prompts = parse_rows(rows, source, settings, seed, note)
    if not prompts:
        raise UserError(
            "holds no prompts", where=source, hint="give a file with one JSON object on each line"
        )
    return prompts


def _files_of_rows(
    folder: Path, suffixes: tuple[str, ...] | None, note: Callable[[str], None]
) -> list[Path]:
    """The folder's own files of rows, none if it has source files: then it is a folder of those."""
    packed = ("", ".gz", ".zst", ".zstd")
    ends = tuple(kind + how for kind in (".jsonl", ".ndjson") for how in packed)
    files = sorted(path for path in folder.iterdir() if path.name.endswith(ends))
    if files and source_paths(folder, suffixes or SUFFIXES):
        note(f"{folder}: {len(files)} files of rows passed over; give them themselves to read them")
        return []
    return files

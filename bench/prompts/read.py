"""Prompts for capturing and measuring, from files, folders, the hub or suites."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench.prompts.hub import HUB_ID, dataset_rows, is_dataset_folder
from bench.prompts.rows import Prompt, parse_row, read_jsonl
from bench.prompts.select import drawn, one_side
from bench.prompts.source_files import SUFFIXES, source_prompts
from bench.prompts.suites import is_suite, read_suite
from bench.records.settings import Split
from drafts.errors import UserError

ROW_SUFFIXES = (".jsonl", ".json", ".ndjson", ".gz")


def read_prompts(
    source: str | Path,
    *,
    limit: int | None = None,
    seed: int = 0,
    split: Split | None = None,
    eval_fraction: float = 0.1,
    prompt_tokens: int = 128,
    suffixes: tuple[str, ...] | None = None,
    suite_folder: Path | None = None,
    note: Callable[[str], None] | None = None,
) -> list[Prompt]:
    """The prompts of a JSONL(.gz) file, a folder of source files, a dataset, or a suite.

    A suite is written `suite:NAME`; see `bench.prompts.suites` for the rest.

    `split` keeps one side of a fixed division by content: a text and its near-copies are all in
    "train" or all in "eval". `limit` keeps a sample drawn by `seed`, in the order of the source.
    Plain texts and source files give passages whose first `prompt_tokens` tokens are the prompt.
    `note` is told what was passed over. Raises `UserError` with file and line.
    """
    if is_suite(str(source)):
        suite = read_suite(
            str(source),
            split=split,
            eval_fraction=eval_fraction,
            prompt_tokens=prompt_tokens,
            folder=suite_folder,
        )
        return drawn(list(suite.prompts), limit, seed)
    prompts = list(_all_prompts(str(source), seed, prompt_tokens, suffixes, note))
    if not prompts:
        raise UserError(
            "holds no prompts", where=source, hint="give a file with one JSON object on each line"
        )
    return drawn(one_side(prompts, split, eval_fraction, str(source)), limit, seed)


def _all_prompts(
    source: str,
    seed: int,
    prompt_tokens: int,
    suffixes: tuple[str, ...] | None,
    note: Callable[[str], None] | None,
) -> Iterator[Prompt]:
    path = Path(source)
    if path.is_file() and path.name.endswith(ROW_SUFFIXES):
        yield from _from_rows(read_jsonl(path), prompt_tokens, seed)
    elif (path.exists() and path.suffix == ".parquet") or is_dataset_folder(path):
        yield from _from_rows(dataset_rows(source), prompt_tokens, seed)
    elif path.exists():
        yield from source_prompts(path, prompt_tokens, seed, suffixes, note)
    elif HUB_ID.match(source) and not source.endswith((*ROW_SUFFIXES, *SUFFIXES, ".parquet")):
        yield from _from_rows(dataset_rows(source), prompt_tokens, seed)
    else:
        raise UserError(
            "no such file or folder; expected a JSONL file, a folder of source files, a hub "
            "dataset id or suite:NAME",
            where=path,
            hint="check the path",
        )


def _from_rows(rows: Iterator[tuple[str, Any]], prompt_tokens: int, seed: int) -> Iterator[Prompt]:
    for where, row in rows:
        yield from parse_row(row, where, prompt_tokens=prompt_tokens, seed=seed)

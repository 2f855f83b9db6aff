"""Prompts for capturing and measuring: read from files, folders or the hub, then tokenised."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from bench.encoding import EncodedPrompt, encode_prompts
from bench.hub_rows import HUB_ID, dataset_rows, is_dataset_folder
from bench.prompt_rows import (
    CHARS_PER_TOKEN,
    Prompt,
    parse_row,
    passages,
    read_jsonl,
    split_key,
)
from bench.source_files import SUFFIXES, source_texts
from drafts.errors import UserError

__all__ = ["EncodedPrompt", "Prompt", "Split", "encode_prompts", "read_prompts"]

Split = Literal["train", "eval"]
ROW_SUFFIXES = (".jsonl", ".json", ".ndjson", ".gz")
NEAR_COPIES = 4  # files that begin alike, such as generated ones, would crowd out the rest


def read_prompts(
    source: str | Path,
    *,
    limit: int | None = None,
    seed: int = 0,
    split: Split | None = None,
    eval_fraction: float = 0.1,
    prompt_tokens: int = 128,
    suffixes: tuple[str, ...] | None = None,
    note: Callable[[str], None] | None = None,
) -> list[Prompt]:
    """The prompts of a JSONL(.gz) file, a folder of source files, or a dataset.

    `split` keeps one side of a fixed division by content: a text and its near-copies are all in
    "train" or all in "eval". `limit` keeps a sample drawn by `seed`, in the order of the source.
    Plain texts and source files give passages whose first `prompt_tokens` tokens are the prompt.
    `note` is told what was passed over. Raises `UserError` with file and line.
    """
    prompts = list(_all_prompts(str(source), seed, prompt_tokens, suffixes, note))
    if not prompts:
        raise UserError(
            "holds no prompts", where=source, mend="give a file with one JSON object on each line"
        )
    if split is not None:
        side = [p for p in prompts if _in_eval(p, eval_fraction) == (split == "eval")]
        if not side:
            raise UserError(
                f"none of its {len(prompts)} prompts falls on the {split} side "
                f"(eval_fraction {eval_fraction})",
                where=source,
                mend="give more prompts or another eval_fraction",
            )
        prompts = side
    if limit is not None and limit < len(prompts):
        drawn = sorted(prompts, key=lambda p: _digest(f"{seed}:{_name(p)}:{_content(p)}"))[:limit]
        kept = {id(prompt) for prompt in drawn}
        prompts = [prompt for prompt in prompts if id(prompt) in kept]
    return prompts


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
    elif path.suffix == ".parquet" or (path.is_dir() and is_dataset_folder(path)):
        _must_exist(path)
        yield from _from_rows(dataset_rows(source), prompt_tokens, seed)
    elif path.exists():
        yield from _from_sources(path, prompt_tokens, seed, suffixes, note)
    elif HUB_ID.match(source) and not source.endswith((*ROW_SUFFIXES, *SUFFIXES)):
        yield from _from_rows(dataset_rows(source), prompt_tokens, seed)
    else:
        _must_exist(path)


def _must_exist(path: Path) -> None:
    if not path.exists():
        raise UserError(
            "no such file or folder; expected a JSONL file, a folder of source files or a hub "
            "dataset id",
            where=path,
            mend="check the path",
        )


def _from_rows(rows: Iterator[tuple[str, Any]], prompt_tokens: int, seed: int) -> Iterator[Prompt]:
    for where, row in rows:
        yield from parse_row(row, where, prompt_tokens=prompt_tokens, seed=seed)


def _from_sources(
    root: Path,
    prompt_tokens: int,
    seed: int,
    suffixes: tuple[str, ...] | None,
    note: Callable[[str], None] | None,
) -> Iterator[Prompt]:
    skipped: Counter[str] = Counter()
    alike: Counter[str] = Counter()
    count = 0
    shortest = CHARS_PER_TOKEN * prompt_tokens if root.is_dir() else 1
    for path, text in source_texts(root, suffixes or SUFFIXES, shortest, skipped):
        alike[key := split_key(text)] += 1
        if alike[key] > NEAR_COPIES:
            skipped["near-copies"] += 1
            continue
        count += 1
        yield from passages(text, str(path), prompt_tokens=prompt_tokens, seed=seed)
    passed = ", ".join(f"{n} {why}" for why, n in sorted(skipped.items()))
    if note and passed:
        note(f"{root}: {count} files read, passed over: {passed}")
    if count == 0:
        ends = " ".join(suffixes) if suffixes else "the usual source suffixes"
        raise UserError(
            f"holds no usable text file; expected names ending in {ends}"
            + (f" (passed over: {passed})" if passed else ""),
            where=root,
            mend="name others with --suffix, or lower --prompt-tokens if they are too short",
        )


def _in_eval(prompt: Prompt, fraction: float) -> bool:
    key = " ".join(prompt.split_key.split())
    return int(_digest(key)[:13], 16) < fraction * 16**13


def _name(prompt: Prompt) -> str:
    """Its place without the folder, so that a sample does not depend on where the file lies."""
    return prompt.id.rsplit("/", 1)[-1]


def _content(prompt: Prompt) -> str:
    return prompt.text if prompt.text is not None else prompt.split_key


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

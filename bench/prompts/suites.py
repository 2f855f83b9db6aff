"""Suites: prompts that everyone can name, in two sizes, with a hash that says which they were.

A suite is written `suite:NAME`, `suite:NAME/CATEGORY` or `suite:NAME/CATEGORY@SIZE` wherever
prompts are given. `quick`, the default size, takes an equal share of every category, chosen by
content; `full` takes all.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from bench.prompts.code_suite import CATEGORIES as CODE_CATEGORIES
from bench.prompts.code_suite import code_prompts
from bench.prompts.formats.collect import parse_rows
from bench.prompts.formats.files import read_rows
from bench.prompts.hub import HUB_ID, dataset_rows, url_rows
from bench.prompts.rows import Prompt
from bench.prompts.select import content_sha256, equal_shares, one_side
from bench.records.settings import PromptSettings
from drafts.errors import UserError

FOLDER_VARIABLE = "AFASPEC_DATA"
PREFIX = "suite:"
SIZES = ("quick", "full")
WRITTEN = re.compile(r"^suite:(?P<name>[^/@]+)(/(?P<category>[^@]+))?(@(?P<size>.*))?$")
BUILT_IN = Path(__file__).parent / "builtin_suite.jsonl"
MT_BENCH = (
    "writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities",
)  # fmt: skip


@dataclass(frozen=True)
class Suite:
    """A suite by name: its `file` below a folder of suites, and its `origin` where that lacks it.

    `origin` is a hub id or the address of a JSONL file, none where nobody publishes one file; a
    suite with neither is made of what every machine with afaspec has. `quick` (and `full`, where it
    is bounded) count prompts of a category.
    """

    name: str
    about: str
    quick: int
    file: str = ""
    origin: str = ""
    categories: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    full: int | None = None


@dataclass(frozen=True)
class SuitePrompts:
    """The prompts of a suite, and what identifies them. `where` is the file or hub id read."""

    name: str
    size: str
    split: str | None
    prompts: tuple[Prompt, ...]
    sha256: str
    where: str

    def record(self) -> dict[str, str | None]:
        """What a result says of them."""
        return {name: getattr(self, name) for name in ("name", "size", "split", "sha256")}


_ALL = (
    Suite(
        "spec-bench",
        "six tasks, as in the Spec-Bench paper; MT-bench is one of them",
        quick=8,
        file="spec_bench/question.jsonl",
        origin="https://raw.githubusercontent.com/hemingkx/Spec-Bench/main/data/spec_bench/"
        "question.jsonl",
        categories=(
            "mt_bench", "translation", "summarization", "qa", "math_reasoning", "rag",
        ),
        renamed=dict.fromkeys(MT_BENCH, "mt_bench"),
    ),
    Suite(
        "mt-bench",
        "80 conversations of two turns",
        quick=4,
        file="mt_bench/question.jsonl",
        origin="philschmid/mt-bench@train",
        categories=MT_BENCH,
    ),
    Suite(
        "humaneval",
        "Python functions to complete",
        quick=40,
        file="humaneval/HumanEval.jsonl.gz",
        origin="openai/openai_humaneval@test",
    ),
    Suite(
        "gsm8k",
        "grade-school word problems",
        quick=40,
        file="gsm8k/test.jsonl",
        origin="openai/gsm8k:main@test",
    ),
    Suite(
        "rust-rfcs",
        "passages of design documents: technical English in Markdown",
        quick=48,
        full=512,
        file="rust_rfcs.jsonl.gz",
    ),
    Suite(
        "code",
        "passages of source code that this Python environment holds",
        quick=16,
        full=256,
        categories=CODE_CATEGORIES,
    ),
    Suite("builtin", "short conversations that ship with afaspec, some of several turns", quick=2),
)  # fmt: skip
SUITES: dict[str, Suite] = {suite.name: suite for suite in _ALL}


def is_suite(source: str) -> bool:
    """Whether `source` is written as a suite."""
    return source.startswith(PREFIX)


def prompt_source(prompts: str | None, suite: str | None, size: str | None) -> str:
    """The one source that --prompts or --suite and --size name. `UserError` for both or neither."""
    if (prompts is None) == (suite is None):
        raise UserError(
            "give --prompts or --suite" + (", not both" if suite else ""),
            hint="--suite builtin needs no file; `afaspec suites` lists the others",
        )
    if suite is None:
        if size is not None:
            raise UserError("--size is for suites", hint="use --limit with --prompts")
        return str(prompts)
    source = f"{PREFIX}{suite}" + (f"@{size}" if size else "")
    _parse(source)
    return source


def read_suite(
    source: str,
    settings: PromptSettings | None = None,
    *,
    note: Callable[[str], None] | None = None,
) -> SuitePrompts:
    """The prompts of `suite:NAME[/CATEGORY][@SIZE]`, cut down to one side before they are sampled.

    Files come from `suite_folder` of the settings, else from the folder in AFASPEC_DATA, else from
    where the suite is published. `prompt_tokens` is the prompt length in source code. `note` is
    told of rows as `parse_rows` does. Raises `UserError`.
    """
    chosen = settings or PromptSettings()
    suite, category, size = _parse(source)
    where, prompts = _read(suite, chosen, note)
    found = list(dict.fromkeys(prompt.category for prompt in prompts))
    if category is not None:
        prompts = [prompt for prompt in prompts if prompt.category == category]
        if not prompts:
            names = ", ".join(name for name in found if name) or "none"
            raise UserError(
                f"the suite has no category {category!r}; it has {names}",
                where=source,
                hint=f"give one of them, or all with {PREFIX}{suite.name}",
            )
    prompts = one_side(prompts, chosen.split, chosen.eval_fraction, source)
    share = suite.quick if size == "quick" else suite.full
    if share is not None:
        prompts = equal_shares(prompts, share)
    return SuitePrompts(
        name=suite.name if category is None else f"{suite.name}/{category}",
        size=size,
        split=chosen.split,
        prompts=tuple(prompts),
        sha256=content_sha256(prompts),
        where=where,
    )


def local_file(suite: Suite, folder: Path | None = None) -> Path | None:
    """The suite's file on this machine, None where there is none. `UserError` for no folder."""
    given = folder or (Path(text) if (text := os.environ.get(FOLDER_VARIABLE)) else None)
    if suite.name == "builtin":
        return BUILT_IN
    if given is None or not suite.file:
        return None
    if not given.is_dir():
        raise UserError(
            "no such folder of suites",
            where=given,
            hint=f"give another --suite-folder or {FOLDER_VARIABLE}; it holds {suite.file}",
        )
    return given / suite.file if (given / suite.file).is_file() else None


def is_here(suite: Suite, folder: Path | None = None) -> bool:
    """Whether the suite can be read without a network."""
    return not (suite.file or suite.origin) or local_file(suite, folder) is not None


def _parse(source: str) -> tuple[Suite, str | None, str]:
    match = WRITTEN.match(source)
    name = match["name"] if match else source.removeprefix(PREFIX)
    if match is None or name not in SUITES:
        raise UserError(
            f"no such suite: {name!r}; there are {', '.join(SUITES)}",
            hint="`afaspec suites` lists them; a file or folder goes to --prompts",
        )
    size = match["size"] or SIZES[0]
    if size not in SIZES:
        raise UserError(f"no such size: {size!r}", hint=f"give {' or '.join(SIZES)}")
    suite, category = SUITES[name], match["category"]
    if category is not None and suite.categories and category not in suite.categories:
        raise UserError(
            f"the suite {name} has no category {category!r}; it has {', '.join(suite.categories)}",
            hint=f"give one of them, or all with --suite {name}",
        )
    return suite, category, size


def _read(
    suite: Suite, settings: PromptSettings, note: Callable[[str], None] | None
) -> tuple[str, list[Prompt]]:
    """Where the suite was read from, and all of it."""
    if suite.name == "code":
        return "this Python environment", list(code_prompts(settings.prompt_tokens))
    folder = settings.suite_folder
    file = local_file(suite, folder)
    where = str(file) if file else suite.origin
    rows = read_rows(file) if file else _published(suite, folder)
    prompts = []
    for prompt in parse_rows(rows, where, settings, note=note):
        category = suite.renamed.get(prompt.category or "", prompt.category)
        line = prompt.id.removeprefix(where)  # and a passage's own line
        prompts.append(replace(prompt, id=suite.name + line, category=category))
    if not prompts:
        raise UserError("holds no prompts", where=where, hint="fetch the file again")
    return where, prompts


@lru_cache(maxsize=4)  # a run asks again for the record
def _fetched(origin: str) -> tuple[tuple[str, Any], ...]:
    return tuple(dataset_rows(origin) if HUB_ID.match(origin) else url_rows(origin))


def _published(suite: Suite, folder: Path | None) -> Iterable[tuple[str, Any]]:
    """The rows from the hub or the suite's own address."""
    place = folder or os.environ.get(FOLDER_VARIABLE) or "FOLDER"
    if not suite.origin:
        raise UserError(
            f"the suite {suite.name} is not in a folder of suites, and nobody publishes its file",
            hint=f'write {place}/{suite.file}, with {{"text": "..."}} on each line, and give '
            f"--suite-folder {place} or set {FOLDER_VARIABLE}; --suite builtin needs no file",
        )
    try:
        return _fetched(suite.origin)
    except UserError as error:
        raise UserError(
            f"the suite {suite.name} is neither in a folder of suites nor to be had from "
            f"{suite.origin} ({error.problem})",
            hint=f"put its file at {place}/{suite.file}, and give --suite-folder {place} or set "
            f"{FOLDER_VARIABLE}; --suite builtin needs no file",
        ) from error

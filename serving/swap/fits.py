"""May a draft take another's place in a running vLLM? Answered from files, before it is asked."""

from __future__ import annotations

from typing import Any

from drafts.checkpoint.info import DraftInfo
from drafts.checkpoint.source import Source, load_tensor, open_source

MAP = "d2t"  # which token each entry of a reduced vocabulary is
# Fields of a config.json that say where a draft comes from, not what it computes.
ABOUT = {
    "_name_or_path",
    "dtype",
    "speculators_version",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}


def differences(running: DraftInfo, new: DraftInfo) -> list[str]:
    """What keeps `new` from the place of `running`, in words; none where only values differ.

    In place go drafts of one family and layout whose tensors have the same names and shapes, whose
    configs compute the same, and that draft from the same vocabulary.
    """
    if (running.family, running.format) != (new.family, new.format):
        return [f"is {new.family} ({new.format}), not {running.family} ({running.format})"]
    old, source = open_source(running.folder), open_source(new.folder)
    return [*_fields(old.raw, source.raw), *_tensors(old, source), *_vocabulary(old, source)]


def _fields(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    names = sorted((old.keys() | new.keys()) - ABOUT)
    return [
        f"{name} is {new.get(name)!r}, not {old.get(name)!r}"
        for name in names
        if old.get(name) != new.get(name)
    ]


def _tensors(old: Source, new: Source) -> list[str]:
    shapes = [{name: list(header.shape) for name, header in s.headers.items()} for s in (old, new)]
    return [
        f"{name} is {shapes[1].get(name, 'missing')}, not {shapes[0].get(name, 'missing')}"
        for name in sorted(shapes[0].keys() | shapes[1].keys())
        if shapes[0].get(name) != shapes[1].get(name)
    ]


def _vocabulary(old: Source, new: Source) -> list[str]:
    if MAP not in old.headers or MAP not in new.headers:
        return []
    maps = [load_tensor(source, MAP) for source in (old, new)]
    same = maps[0].shape == maps[1].shape and bool((maps[0] == maps[1]).all())
    return [] if same else ["drafts from another vocabulary (d2t)"]

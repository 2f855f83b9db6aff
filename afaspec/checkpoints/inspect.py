"""What a draft is: its family and sizes, what it takes from the target, and how vLLM serves it."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from drafts.checkpoint.info import DraftInfo
from drafts.checkpoint.source import open_source
from drafts.files import read_json, weight_files
from drafts.registry import FAMILIES, module_names, wanted_layer_ids
from drafts.target.info import TargetInfo
from serving.compatibility import Check, compare
from serving.speculation import speculative_config, usual_k

MAPS = ("d2t", "t2d")


@dataclass(frozen=True)
class Inspection:
    """All that `afaspec inspect` says of one draft.

    `vocabulary_map` is None for a full vocabulary, else `one to one`, which every reader of drafts
    checks. `hidden_states` are the target's that it reads, in words; `parameters` leave out maps
    and `bytes` is the size of the weights' files. `largest_k` is None where any k serves. `made`
    is the record of `afaspec merge`, `checks` the rows against a target.
    """

    folder: str
    family: str
    title: str
    layout: str
    method: str
    layers: int
    hidden_size: int
    target_hidden_size: int
    vocab_size: int
    draft_vocab_size: int
    vocabulary_map: str | None
    layer_ids: list[int] | None
    hidden_states: str
    shared: list[str]
    positions: int | None
    dtype: str
    parameters: int
    bytes: int
    largest_k: int | None
    speculative_config: dict[str, Any]
    sha256: str
    made: dict[str, Any] | None
    warnings: list[str]
    checks: list[Check] | None

    @property
    def fits(self) -> bool:
        """Each row of `checks` is ok. A draft that is damaged in itself is not even read."""
        return all(check.ok for check in self.checks or [])


def inspect_draft(info: DraftInfo, target: TargetInfo | None = None) -> Inspection:
    """Describe the draft, and compare it to `target`."""
    names = module_names(info)
    config = speculative_config(info, usual_k(info))
    assert config is not None
    made = info.folder / "afaspec.json"
    return Inspection(
        folder=str(info.folder),
        family=info.family,
        title=FAMILIES[info.family].title,
        layout=info.format,
        method=info.method,
        layers=info.config.get("num_hidden_layers", 1),
        hidden_size=info.hidden_size,
        target_hidden_size=info.target_hidden_size,
        vocab_size=info.vocab_size,
        draft_vocab_size=info.draft_vocab_size,
        vocabulary_map=None if info.draft_vocab_size == info.vocab_size else "one to one",
        layer_ids=None if info.layer_ids is None else list(info.layer_ids),
        hidden_states=hidden_states(info, target),
        shared=list(info.shared),
        positions=info.max_positions,
        dtype=info.dtype,
        parameters=sum(
            prod(header.shape)
            for name, header in open_source(info.folder).headers.items()
            if names[name] not in MAPS
        ),
        bytes=sum(path.stat().st_size for path in weight_files(info.folder)),
        largest_k=info.max_k,
        speculative_config=config,
        sha256=info.sha256,
        made=read_json(made) if made.exists() else None,
        warnings=list(info.warnings),
        checks=None if target is None else compare(target, info),
    )


def hidden_states(info: DraftInfo, target: TargetInfo | None) -> str:
    """Which of the target's hidden states the draft reads."""
    if info.reads == "nothing":
        return "none: it is a model of its own"
    if info.reads == "final":
        return "the last, after the final norm"
    if info.layer_ids is not None:
        return f"after layers {', '.join(map(str, info.layer_ids))}"
    if target is None:
        return "not named: vLLM takes those after layers 2, L/2 and L-3 of a target of L layers"
    ids = wanted_layer_ids(info, target)
    return f"not named: vLLM takes those after layers {', '.join(map(str, ids))}"

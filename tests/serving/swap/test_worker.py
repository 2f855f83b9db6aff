"""A swap in real vLLM: after it, every proposal is that of an engine that began with the draft."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from drafts.registry import read_draft, save_draft, wanted_layer_ids
from drafts.target.info import read_target
from tests.drafts.families.test_vllm_parity import CASES, NEW_TOKENS, PROMPTS, Reference, fit
from tests.opened import load_draft
from tests.vllm_client import VllmWorker

K = 3
SWAPPED = (
    "eagle3",
    "eagle3, narrower than its target",
    "peagle",
    "dflash, two layers",
    "eagle",
    "medusa",
    "draft_model",
    "pard",
)
COMPILED = ("eagle3", "dflash, two layers")


@pytest.fixture(scope="module")
def reference(tiny_target: Path) -> Reference:
    return Reference(tiny_target)


def fitted(base: Path, folder: Path, target: Path, reference: Reference) -> Path:
    """A copy of the draft that has learned some of what the target says."""
    info = read_draft(base)
    draft = load_draft(base, target)
    fit(draft, reference, wanted_layer_ids(info, read_target(target)), K)
    folder.mkdir()
    save_draft(draft, info.family, folder, dtype=torch.float32)
    return folder


@pytest.mark.parametrize(
    ("name", "compiled"),
    [*((name, False) for name in SWAPPED), *((name, True) for name in COMPILED)],
)
def test_a_swapped_draft_proposes_as_a_served_one(
    name: str,
    compiled: bool,
    tmp_path: Path,
    tiny_target: Path,
    reference: Reference,
    vllm_worker: VllmWorker,
) -> None:
    base = CASES[name][0](tmp_path / "base", tiny_target)
    new = fitted(base, tmp_path / "new", tiny_target, reference)
    asked = (K, PROMPTS, NEW_TOKENS)
    runs = vllm_worker.swap(tiny_target, base, new, *asked, compiled=compiled)
    assert runs["swapped"] == vllm_worker.serve(tiny_target, new, *asked)["runs"]
    assert runs["first"] != runs["swapped"], "the two drafts propose the same"
    assert runs["back"] == runs["first"]

"""vLLM's engine options for a pair: which caches the layers of target and draft need."""

from __future__ import annotations

from pathlib import Path

import pytest

from drafts.registry import read_draft
from serving.speculation import usual_k
from tests.drafts.families.test_lm import write_lm
from tests.opened import engine_options
from tests.tiny.architectures import write_architecture
from tests.tiny.runs import write_fresh

ONE_GROUP = {"disable_hybrid_kv_cache_manager": True}


@pytest.mark.parametrize("architecture", ["Qwen3-Next", "Granite hybrid"])
def test_recurrent_layers_need_the_manager(architecture: str, tmp_path: Path) -> None:
    """vLLM does not start such a target without it, whatever the draft has."""
    target = write_architecture(tmp_path / "target", architecture)
    draft = write_fresh("eagle3", tmp_path / "two", target, num_layers=2, layer_ids=(1, 2, 3))
    assert engine_options(target, draft) == {}
    assert engine_options(target, write_lm(tmp_path / "lm", "gemma2, softcap")) == {}


@pytest.mark.parametrize(
    ("architecture", "wanted"), [("Gemma 2", ONE_GROUP), ("Cohere 2", ONE_GROUP), ("Granite", {})]
)
def test_full_and_sliding_attention_share_one_group(
    architecture: str, wanted: dict[str, bool], tmp_path: Path
) -> None:
    target = write_architecture(tmp_path / "target", architecture)
    draft = write_fresh("eagle3", tmp_path / "two", target, num_layers=2, layer_ids=(1, 2, 3))
    assert engine_options(target, draft) == wanted


@pytest.mark.parametrize(
    ("family", "max_k", "wanted"),
    [("eagle3", 5, 3), ("medusa", 2, 2), ("medusa", 5, 3), ("dflash", 5, 5), ("dspark", 4, 4)],
)
def test_who_says_no_k_gets_a_block_drafters_whole_block(
    family: str, max_k: int, wanted: int, tiny_target: Path, tmp_path: Path
) -> None:
    made = write_fresh(family, tmp_path / "draft", tiny_target, layer_ids=(1, 2, 3), max_k=max_k)
    assert usual_k(read_draft(made)) == wanted
    assert usual_k("ngram") == usual_k(None) == 3

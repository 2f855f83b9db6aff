"""vLLM's engine options for a pair: which caches the layers of target and draft need."""

from __future__ import annotations

from pathlib import Path

import pytest

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

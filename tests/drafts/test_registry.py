"""Checkpoint formats: what is read back is what was stored, and what is written keeps its bytes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from drafts.errors import UserError
from drafts.registry import read_draft, save_draft
from tests.opened import load_draft, write_like
from tests.tiny.models import LAYER_IDS, draft_config, draft_tensors, write_draft


def speculators_draft(folder: Path) -> Path:
    """The tiny draft in speculators' layout: nested config, `layers.0.`, its own embedding."""
    flat = draft_config()
    inner = {k: v for k, v in flat.items() if k not in ("architectures", "draft_vocab_size")}
    inner.pop("eagle_aux_hidden_state_layer_ids")
    config = {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 3}],
            "verifier": {"architectures": ["LlamaForCausalLM"], "name_or_path": "target"},
        },
        "draft_vocab_size": flat["draft_vocab_size"],
        "eagle_aux_hidden_state_layer_ids": list(LAYER_IDS),
        "norm_before_residual": False,
        "target_hidden_size": None,
        "transformer_layer_config": inner,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {k.replace("midlayer.", "layers.0."): v for k, v in draft_tensors().items()}
    tensors["embed_tokens.weight"] = torch.randn(512, 128).to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_both_layouts_are_the_same_draft(
    tmp_path: Path, tiny_draft: Path, tiny_target: Path
) -> None:
    other = speculators_draft(tmp_path / "speculators")
    assert read_draft(tiny_draft).format == "eagle"
    assert read_draft(other).format == "speculators"
    one, two = load_draft(tiny_draft, tiny_target), load_draft(other)
    assert one.config == two.config
    for name, parameter in one.named_parameters():
        if name != "embed_tokens.weight":
            assert torch.equal(parameter, two.get_parameter(name)), name


@pytest.mark.parametrize("layout", ["eagle", "speculators"])
def test_write_like_changes_only_what_is_named(
    tmp_path: Path, tiny_draft: Path, layout: str
) -> None:
    base = tiny_draft if layout == "eagle" else speculators_draft(tmp_path / "base")
    out = tmp_path / "out"
    out.mkdir()
    new = torch.randn(128, 384)
    write_like(base, out, {"fc.weight": new})
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    assert list(before) == list(after)
    assert torch.equal(after["fc.weight"], new.to(torch.bfloat16))
    for name in before.keys() - {"fc.weight"}:
        assert before[name].dtype == after[name].dtype
        assert torch.equal(before[name], after[name])
    assert (base / "config.json").read_bytes() == (out / "config.json").read_bytes()


def test_writing_nothing_new_copies_the_file(tmp_path: Path, tiny_draft: Path) -> None:
    write_like(tiny_draft, tmp_path, {})
    name = "model.safetensors"
    assert (tiny_draft / name).read_bytes() == (tmp_path / name).read_bytes()


def test_saved_draft_loads_again(tmp_path: Path, tiny_draft: Path, tiny_target: Path) -> None:
    draft = load_draft(tiny_draft, tiny_target)
    save_draft(draft, "eagle3", tmp_path, dtype=torch.float32)
    again = load_draft(tmp_path, tiny_target)
    assert again.config == draft.config
    for name, value in draft.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_missing_layer_ids_take_the_target_default(
    tmp_path: Path, tiny_draft: Path, tiny_target: Path
) -> None:
    folder = tmp_path / "draft"
    shutil.copytree(tiny_draft, folder)
    config = draft_config()
    del config["eagle_aux_hidden_state_layer_ids"]
    (folder / "config.json").write_text(json.dumps(config))
    assert read_draft(folder).layer_ids is None
    with pytest.raises(UserError, match="eagle_aux_hidden_state_layer_ids"):
        load_draft(folder)
    # four layers give (2, 2, 1): not three distinct ones, which the reader must not hide
    assert load_draft(folder, tiny_target).config.layer_ids == (2, 2, 1)


def test_switches_count_where_vllm_reads_them(tmp_path: Path, tiny_target: Path) -> None:
    """Of those in `eagle_config` vLLM reads norm_before_fc; the others it takes from the top."""
    nested = {"norm_before_fc": False, "norm_output": True, "norm_before_residual": True}
    draft = write_draft(
        tmp_path / "draft", eagle_config=nested, norm_before_fc=True, norm_before_residual=False
    )
    config: Any = load_draft(draft, tiny_target).config
    read = (config.norm_before_fc, config.norm_output, config.norm_before_residual)
    assert not any(read)


def test_embedding_shared_with_a_target_of_another_width_is_refused(
    tmp_path: Path, tiny_target: Path
) -> None:
    draft = write_draft(tmp_path / "draft", vocab_size=600, draft_vocab_size=320)
    tensors = load_file(draft / "model.safetensors")
    del tensors["t2d"]  # it is of 512 tokens
    save_file(tensors, draft / "model.safetensors")
    with pytest.raises(UserError, match="shares the target's embedding"):
        load_draft(draft, tiny_target)

"""Drafts published as pickles: converted to safetensors, and nothing but tensors is read."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from drafts.convert import convert_pickles
from drafts.errors import UserError
from drafts.files import read_json
from drafts.pickles import find_pickles
from drafts.registry import read_draft
from drafts.target.info import read_target
from tests.command import run_command
from tests.opened import load_draft
from tests.tiny.models import DRAFT_VOCAB, HIDDEN, VOCAB, draft_config, draft_tensors


def pickled(folder: Path, state: Any, config: Any = None, name: str = "pytorch_model.bin") -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config or draft_config()))
    torch.save(state, folder / name)
    return folder


def same(folder: Path, state: dict[str, Tensor]) -> None:
    written = load_file(folder / "model.safetensors")
    assert written.keys() == state.keys()
    for name, tensor in state.items():
        assert written[name].dtype == tensor.dtype
        assert torch.equal(written[name], tensor), name


def test_a_pickled_draft_becomes_the_same_in_safetensors(tmp_path: Path, tiny_target: Path) -> None:
    state = draft_tensors()
    state["norm.weight"] = torch.nn.Parameter(state["norm.weight"])
    base = pickled(tmp_path / "base", state)
    (base / "README.md").write_text("a draft\n")
    torch.save({"lr": 1.0}, base / "training_args.bin")
    made = convert_pickles(base, None, tmp_path / "out")
    assert made.folder == tmp_path / "out"
    assert (made.family, made.format) == ("eagle3", "eagle")
    same(made.folder, draft_tensors())
    assert (made.folder / "README.md").read_text() == "a draft\n"
    assert sorted(path.name for path in made.folder.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    load_draft(made.folder, tiny_target)


def test_tied_tensors_and_views_are_written_each_for_itself(tmp_path: Path) -> None:
    state = draft_tensors()
    whole = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(3)).bfloat16()
    state["embed_tokens.weight"] = whole
    state["lm_head.weight"] = whole[:DRAFT_VOCAB]
    state["midlayer.mlp.down_proj.weight"] = state["midlayer.mlp.up_proj.weight"].T
    base = pickled(tmp_path / "base", state)
    same(convert_pickles(base, None, tmp_path / "out").folder, state)


def test_heads_of_medusa_as_they_are_published(tmp_path: Path) -> None:
    """FasterDecoding's `medusa_lm_head.pt`, whose config names neither class nor sizes."""
    size, vocab = 64, 96
    state = {"0.0.linear.weight": torch.randn(size, size), "0.0.linear.bias": torch.randn(size)}
    state |= {"0.1.weight": torch.randn(vocab, size)}
    state |= {name.replace("0.", "1.", 1): torch.randn_like(t) for name, t in state.items()}
    config = {"medusa_num_heads": 2, "medusa_num_layers": 1, "base_model_name_or_path": "a/b"}
    config |= {"hidden_size": size, "vocab_size": vocab, "medusa_fc_bias": True}
    base = pickled(tmp_path / "base", state, config, "medusa_lm_head.pt")
    made = convert_pickles(base, "medusa", tmp_path / "out")
    assert (made.family, made.format, made.max_k) == ("medusa", "medusa", 2)
    stored = load_file(made.folder / "model.safetensors")
    assert torch.equal(stored["blocks.1.layers.0.weight"], state["1.0.linear.weight"])
    assert torch.equal(stored["lm_heads.1.weight"], state["1.1.weight"])


def sharded(folder: Path) -> Path:
    state = draft_tensors()
    names = list(state)
    pickled(folder, {name: state[name] for name in names[:7]}, name="pytorch_model-1.bin")
    torch.save({name: state[name] for name in names[7:]}, folder / "pytorch_model-2.bin")
    places = {n: f"pytorch_model-{1 + (i >= 7)}.bin" for i, n in enumerate(names)}
    index = json.dumps({"metadata": {}, "weight_map": places})
    (folder / "pytorch_model.bin.index.json").write_text(index)
    return folder


def test_shards_are_read_as_their_index_says(tmp_path: Path) -> None:
    made = convert_pickles(sharded(tmp_path / "base"), None, tmp_path / "out")
    places = read_json(made.folder / "model.safetensors.index.json")["weight_map"]
    for name, tensor in draft_tensors().items():
        assert torch.equal(load_file(made.folder / places[name])[name], tensor)
    (tmp_path / "base" / "pytorch_model-2.bin").unlink()
    with pytest.raises(UserError, match=r"names pytorch_model-2\.bin, which is not there"):
        convert_pickles(tmp_path / "base", None, tmp_path / "again")


class Runs:
    """What a pickle of this asks its reader to do."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.trace),)


def test_a_pickle_that_runs_something_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    base = pickled(tmp_path / "base", draft_tensors() | {"more": Runs(trace)})
    code, error = run_command("convert", base, "--out", tmp_path / "out")
    assert code == 2
    assert "cannot be read as a pickle of tensors alone" in error
    assert "weights_only" not in error  # torch advises to switch the check off
    (base / "pytorch_model.bin").write_bytes(pickle.dumps(Runs(trace)))
    with pytest.raises(UserError, match="nothing of it was run"):
        convert_pickles(base, None, tmp_path / "out")
    assert not trace.exists()
    assert not (tmp_path / "out").exists()
    pickle.loads((base / "pytorch_model.bin").read_bytes())
    assert trace.is_dir()  # it does run where pickles are


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ([torch.ones(2)], "holds list, expected tensors by name"),
        ({}, "holds dict, expected tensors by name"),
        ({"state_dict": draft_tensors()}, "holds dict under 'state_dict'"),
        ({"a": torch.eye(3).to_sparse()}, "holds Tensor under 'a', expected plain tensors"),
        ({"a": torch.ones(2), "step": 7}, "holds int under 'step'"),
        ({0: torch.ones(2)}, "holds Tensor under 0"),
    ],
)
def test_what_is_no_state_dict_is_refused(state: Any, said: str, tmp_path: Path) -> None:
    base = pickled(tmp_path / "base", state)
    with pytest.raises(UserError, match=said):
        convert_pickles(base, None, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_other_wrong_folders_are_refused(tmp_path: Path) -> None:
    base = pickled(tmp_path / "base", draft_tensors())
    whole = (base / "pytorch_model.bin").read_bytes()
    (base / "pytorch_model.bin").write_bytes(whole[:-200])
    with pytest.raises(UserError, match="cannot be read as a pickle of tensors alone"):
        convert_pickles(base, None, tmp_path / "out")
    (base / "pytorch_model.bin").rename(base / "one.pt")
    (base / "two.pth").write_bytes(whole)
    with pytest.raises(UserError, match=r"holds several pickles \(one.pt, two.pth\)"):
        convert_pickles(base, None, tmp_path / "out")
    lacking = draft_tensors()
    del lacking["fc.weight"]
    short = pickled(tmp_path / "short", lacking)
    with pytest.raises(UserError, match=r"fc\.weight") as caught:
        convert_pickles(short, None, tmp_path / "out")
    assert str(caught.value).startswith(str(short))


def test_a_mask_embedding_is_never_lost(tmp_path: Path) -> None:
    """DFlash drafts with one are refused, pickled or not."""
    config = draft_config(
        architectures=["DFlashDraftModel"],
        dflash_config={"mask_token_id": 1, "target_layer_ids": [0, 1, 2]},
    )
    base = pickled(tmp_path / "base", draft_tensors(), config)
    torch.save(torch.ones(HIDDEN), base / "mask_embedding.pt")
    assert find_pickles(base) == [base / "pytorch_model.bin"]
    with pytest.raises(UserError, match="mask_embedding"):
        convert_pickles(base, None, tmp_path / "out")


def test_the_command(tmp_path: Path, tiny_target: Path) -> None:
    base = pickled(tmp_path / "base", draft_tensors(), name="model.pt")
    with pytest.raises(UserError, match=r"only model\.pt, a pickle") as caught:
        read_draft(base)
    assert f"afaspec convert {base} --out" in str(caught.value)
    code, error = run_command("inspect", base)
    assert (code, "afaspec convert" in error) == (2, True)
    assert run_command("convert", base, "--out", tmp_path / "plain")[0] == 0
    same(tmp_path / "plain", draft_tensors())
    other = ["--to", "speculators", "--target", tiny_target, "--out", tmp_path / "other"]
    assert run_command("convert", base, *other)[0] == 0
    assert read_draft(tmp_path / "other").format == "speculators"
    code, error = run_command("convert", tmp_path / "plain", "--out", tmp_path / "again")
    assert code == 2
    assert "is stored as safetensors already" in error


def test_a_pickled_target_is_refused_with_the_same_hint(tmp_path: Path, tiny_target: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    for path in tiny_target.iterdir():
        if path.suffix != ".safetensors":
            (target / path.name).write_bytes(path.read_bytes())
    torch.save(load_file(tiny_target / "model.safetensors"), target / "pytorch_model.bin")
    with pytest.raises(UserError, match="afaspec convert"):
        read_target(target)
    assert run_command("convert", target, "--out", tmp_path / "plain")[0] == 0
    assert read_target(tmp_path / "plain").num_layers == read_target(tiny_target).num_layers

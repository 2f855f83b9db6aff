"""P-EAGLE: rows at once are what the server computes; checkpoint formats; training and merging."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from afaspec.train.config import TrainConfig
from drafts.checkpoint.family import InitOptions
from drafts.errors import UserError
from drafts.families.peagle.module import PEagleConfig, PEagleDraft
from drafts.nn.layers import rotation
from drafts.nn.packing import Packing
from drafts.registry import read_draft, save_draft
from tests.drafts.test_registry import speculators_draft
from tests.opened import (
    init_draft,
    load_draft,
    merge,
    require_compatible,
    speculative_config,
    train,
    write_like,
)
from tests.packed import alone
from tests.tiny.models import DRAFT_VOCAB, HIDDEN, LAYER_IDS, VOCAB, write_draft
from tests.tiny.store import write_store

FUSED = 3 * 32


def make_draft(**changes: Any) -> PEagleDraft:
    config: dict[str, Any] = {
        "hidden_size": 32,
        "target_hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 60,
        "draft_vocab_size": 40,
        "max_positions": 128,
        "layer_ids": (1, 2, 3),
        "mask_token_id": 59,
    }
    torch.manual_seed(0)
    draft = PEagleDraft(PEagleConfig(**(config | changes))).eval()
    kept = torch.randperm(60)[:40].sort().values
    draft.set_vocabulary_map(kept - torch.arange(40))
    for parameter in draft.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return draft


def as_the_server(draft: PEagleDraft, features: Tensor, ids: Tensor, k: int) -> Tensor:
    """The k outputs [k, d] after `ids`: one plain causal pass over the tokens and masked slots."""
    rows = len(features)
    fused = torch.cat([features, draft.mask_hidden.expand(k - 1, -1)])
    tokens = torch.cat([ids[1:], torch.full((k - 1,), draft.mask_token_id)])
    hidden, embeds, packing = (
        draft.start(fused),
        draft.embed_tokens(tokens),
        Packing.of([len(fused)]),
    )
    at = rotation(draft.rotary, hidden, packing.positions)
    output, _, _ = draft.decode(hidden, embeds, at, [[] for _ in draft.layers], packing)
    return output[rows - 1 :]


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize(
    "changes",
    [{}, {"num_layers": 3}, {"norm_before_fc": True, "norm_before_residual": True}],
    ids=["plain", "three layers", "norms"],
)
@pytest.mark.parametrize("first_row", [0, 6])
def test_rows_at_once_are_what_the_server_computes(
    k: int, changes: dict[str, Any], first_row: int
) -> None:
    draft = make_draft(**changes)
    features, ids = torch.randn(14, FUSED), torch.randint(60, (14,))
    with torch.no_grad():
        outputs = draft(features, ids, k, alone(14, first_row))
        assert all(output.shape == (13 - first_row, 32) for output in outputs)
        for row in range(first_row, 13):
            expected = as_the_server(draft, features[: row + 1], ids[: row + 2], k)
            at_once = torch.stack([output[row - first_row] for output in outputs])
            torch.testing.assert_close(at_once, expected, rtol=1e-4, atol=1e-5)
            said = draft.logits(expected, 0).argmax(-1)
            drafted = draft.propose(features[: row + 1], ids[: row + 2], k)
            assert drafted == draft.target_ids()[said].tolist()


def test_later_steps_do_not_read_the_path() -> None:
    draft = make_draft()
    features, ids = torch.randn(9, FUSED), torch.randint(60, (9,))
    changed = ids.clone()
    changed[5:] = (changed[5:] + 1) % 60
    before, after = (draft(features, given, 3, alone(9)) for given in (ids, changed))
    for one, two in zip(before, after, strict=True):
        assert torch.equal(one[:4], two[:4])  # row 3 knows x[4], and nothing after it
        assert not torch.equal(one[4], two[4])


def write_peagle(folder: Path, shape: tuple[int, ...] = (1, 3 * HIDDEN), **changes: Any) -> Path:
    """The tiny EAGLE-3 draft with a mask hidden state and a mask token."""
    write_draft(folder, **({"pard_token": 511} | changes))
    add_mask_hidden(folder, shape)
    return folder


def write_speculators(folder: Path) -> Path:
    speculators_draft(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config |= {"speculators_model_type": "peagle", "mask_token_id": 511}
    del config["norm_before_residual"]
    path.write_text(json.dumps(config))
    add_mask_hidden(folder, (1, 1, 3 * HIDDEN))
    return folder


def add_mask_hidden(folder: Path, shape: tuple[int, ...]) -> None:
    tensors = load_file(folder / "model.safetensors")
    torch.manual_seed(3)
    tensors["mask_hidden"] = torch.randn(shape).to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors")


def test_both_layouts_are_the_same_draft(tmp_path: Path, tiny_target: Path) -> None:
    one, two = write_peagle(tmp_path / "one"), write_speculators(tmp_path / "two")
    for folder, layout in ((one, "eagle"), (two, "speculators")):
        info = read_draft(folder)
        assert (info.family, info.format) == ("peagle", layout)
        config = speculative_config(folder, 4)
        assert config is not None
        assert (config["method"], config["parallel_drafting"]) == ("eagle3", True)
        require_compatible(tiny_target, folder)
    first, second = load_draft(one, tiny_target), load_draft(two)
    assert isinstance(first, PEagleDraft)
    assert first.config == second.config
    assert first.config.mask_token_id == 511
    for name, parameter in first.named_parameters():
        if name != "embed_tokens.weight":
            other = second.get_parameter(name).view_as(parameter)
            assert torch.equal(parameter, other), name


def test_an_eagle3_draft_stays_one(tiny_draft: Path) -> None:
    assert read_draft(tiny_draft).family == "eagle3"


@pytest.mark.parametrize("shape", [(1, 3 * HIDDEN), (1, 1, 3 * HIDDEN), (3 * HIDDEN,)])
def test_write_like_keeps_the_form_and_the_other_bytes(
    tmp_path: Path, tiny_target: Path, shape: tuple[int, ...]
) -> None:
    base, out = write_peagle(tmp_path / "base", shape), tmp_path / "out"
    out.mkdir()
    draft = load_draft(base, tiny_target)
    new = draft.get_parameter("mask_hidden").detach() + 1
    write_like(base, out, {"mask_hidden": new})
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    assert torch.equal(after.pop("mask_hidden"), new.to(torch.bfloat16).view(shape))
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]), name
    assert (base / "config.json").read_bytes() == (out / "config.json").read_bytes()


@pytest.mark.parametrize("num_layers", [1, 2])
def test_a_fresh_draft_saves_and_loads(tmp_path: Path, tiny_target: Path, num_layers: int) -> None:
    kept = torch.arange(0, VOCAB, 2)
    options = InitOptions(num_layers=num_layers, layer_ids=LAYER_IDS, kept=kept)
    draft = init_draft("peagle", tiny_target, options)
    save_draft(draft, "peagle", tmp_path, dtype=torch.float32)
    assert json.loads((tmp_path / "config.json").read_text())["pard_token"] == VOCAB - 1
    again = load_draft(tmp_path, tiny_target)
    assert again.config == draft.config
    for name, value in draft.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert draft.get_parameter("mask_hidden").std() > 0
    assert torch.equal(again.target_ids(), kept)


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    without_token = write_peagle(tmp_path / "a", pard_token=None)
    with pytest.raises(UserError, match="names no mask token"):
        read_draft(without_token)
    for token in (VOCAB, -1, "mask"):
        with pytest.raises(UserError, match="expected a token id below 512"):
            read_draft(write_peagle(tmp_path / f"b{token}", pard_token=token))
    without_hidden = write_draft(tmp_path / "c", ptd_token_id=5)
    with pytest.raises(UserError, match="lacks the tensor mask_hidden"):
        read_draft(without_hidden)
    with pytest.raises(UserError, match=r"mask_hidden is \[1, 128\], but fc.weight takes 384"):
        read_draft(write_peagle(tmp_path / "d", (1, HIDDEN)))
    with pytest.raises(UserError, match="lm_head"):
        read_draft(write_peagle(tmp_path / "e", draft_vocab_size=DRAFT_VOCAB - 1))


@pytest.mark.parametrize("architecture", ["LlamaForCausalLMEagle3", "PEagleDraftModel"])
def test_either_architecture_name_is_known(tmp_path: Path, architecture: str) -> None:
    folder = write_peagle(tmp_path / "draft", architectures=[architecture])
    assert read_draft(folder).family == "peagle"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, tiny_target: Path) -> tuple[Path, Path]:
    """A base draft and a store for it."""
    folder = tmp_path_factory.mktemp("peagle")
    base = write_peagle(folder / "base")
    return base, write_store(folder / "store", tiny_target, base)


@pytest.mark.parametrize("arm", ["afa-lora", "lora", "full"])
def test_trained_and_merged(
    arm: Any, store: tuple[Path, Path], tiny_target: Path, tmp_path: Path
) -> None:
    base, features = store
    settings: dict[str, Any] = {"steps": 6, "eval_every": 6, "rank": 4, "batch_size": 4}
    settings |= {"learning_rate": 1e-2, "compiled": False, "tensorboard": False}
    train(TrainConfig(store=features, draft=base, out=tmp_path / "run", arm=arm, **settings))
    parity = merge(tmp_path / "run", None, tmp_path / "merged")
    assert parity.float32 <= 1e-5
    before = load_file(base / "model.safetensors")
    after = load_file(tmp_path / "merged" / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert "fc.weight" in changed
    assert ("mask_hidden" in changed) == (arm == "full")
    assert "d2t" not in changed
    require_compatible(tiny_target, tmp_path / "merged")


def test_gradients_reach_the_hidden_state_of_the_masks() -> None:
    draft = make_draft()
    features, ids = torch.randn(10, FUSED), torch.randint(60, (10,))
    for steps in (1, 3):
        draft.zero_grad()
        outputs = draft(features, ids, steps, alone(10))
        torch.cat(outputs).square().sum().backward()
        reached = draft.mask_hidden.grad is not None and bool(draft.mask_hidden.grad.abs().sum())
        assert reached == (steps > 1)

"""Medusa: the module, both layouts, and the whole way from capture to a merged draft."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from afaspec.store.read import FeatureStore
from bench.stats.offline import offline_acceptance
from drafts.checkpoint.family import InitOptions
from drafts.errors import UserError
from drafts.families.medusa.module import MedusaConfig, MedusaDraft
from drafts.registry import read_draft, save_draft
from tests.opened import (
    convert,
    init_draft,
    load_draft,
    load_lm_head,
    merge,
    require_compatible,
    speculative_config,
    write_like,
)
from tests.packed import alone
from tests.tiny.models import HIDDEN
from tests.tiny.runs import run_losses, write_fresh
from tests.tiny.store import write_store

PLAIN = MedusaConfig(hidden_size=32, vocab_size=60, num_heads=4)
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "two_layers": {"num_layers": 2},
    "bias": {"bias": True},
    "shared_head": {"shared_head": True},
    "logit_scale": {"logit_scale": 0.5},
}


def make_draft(config: MedusaConfig) -> MedusaDraft:
    torch.manual_seed(0)
    draft = MedusaDraft(config).eval()
    for parameter in draft.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return draft


def saved(folder: Path, config: MedusaConfig = PLAIN) -> Path:
    folder.mkdir()
    save_draft(make_draft(config), "medusa", folder, dtype=torch.float32)
    return folder


def numbered(folder: Path, config: MedusaConfig = PLAIN, **changes: Any) -> Path:
    """The same draft as FasterDecoding writes it; `changes` replace entries of its config."""
    draft, folder = make_draft(config), Path(folder)
    folder.mkdir()
    tensors = {}
    for name, parameter in draft.named_parameters():
        parts = name.split(".")
        last = config.num_layers if parts[0] == "lm_heads" else parts[2]
        kind = "" if parts[0] == "lm_heads" else "linear."
        tensors[f"{parts[1]}.{last}.{kind}{parts[-1]}"] = parameter.detach()
    raw = {"medusa_num_heads": 4, "medusa_num_layers": config.num_layers, "hidden_size": 32}
    raw |= {"medusa_fc_bias": config.bias, "base_model_name_or_path": "some/model"}
    config_json = {k: v for k, v in {**raw, **changes}.items() if v is not None}
    (folder / "config.json").write_text(json.dumps(config_json))
    save_file(tensors, folder / "model.safetensors")
    return folder


def edit(
    folder: Path,
    config: Callable[[dict[str, Any]], Any] = lambda c: None,
    tensors: Callable[[dict[str, Any]], Any] = lambda t: None,
) -> Path:
    """Change a checkpoint's config and tensors in place."""
    raw, stored = json.loads((folder / "config.json").read_text()), folder / "model.safetensors"
    loaded = load_file(stored)
    config(raw)
    tensors(loaded)
    (folder / "config.json").write_text(json.dumps(raw))
    save_file(loaded, stored)
    return folder


def drop(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda mapping: mapping.pop(name)


def put(**entries: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda mapping: mapping.update(entries)


@pytest.mark.parametrize("name", VARIANTS)
def test_rows_at_once_equal_the_proposal_of_each_row(name: str) -> None:
    config = replace(PLAIN, **VARIANTS[name])
    draft = make_draft(config)
    features, ids = torch.randn(12, 32), torch.randint(60, (12,))
    with torch.no_grad():
        outputs = draft(features, ids, 4, alone(12, 3))
    assert [tuple(output.shape) for output in outputs] == [(8, 32)] * 4
    for row in range(3, 11):
        at_once = [draft.best(out[row - 3 : row - 2], i) for i, out in enumerate(outputs)]
        assert at_once == draft.propose(features[: row + 1], ids[: row + 2], 4)


def test_more_steps_than_heads_are_refused(tiny_target: Path) -> None:
    with pytest.raises(UserError, match=r"5 draft steps are asked of a Medusa draft with 4 heads"):
        make_draft(PLAIN)(torch.randn(8, 32), torch.zeros(8, dtype=torch.long), 5, alone(8))


@pytest.mark.parametrize("name", VARIANTS)
def test_saved_draft_loads_again(name: str, tmp_path: Path) -> None:
    config = replace(PLAIN, **VARIANTS[name])
    folder = saved(tmp_path / "draft", config)
    info, draft, again = read_draft(folder), make_draft(config), load_draft(folder)
    assert again.config == config
    assert (info.family, info.format, info.method) == ("medusa", "medusa", "medusa")
    assert (info.max_k, info.layer_ids, info.reads) == (4, (), "final")
    assert info.shared == (("lm_head.weight",) if config.shared_head else ())
    for tensor_name, value in draft.state_dict().items():
        assert torch.equal(value, again.state_dict()[tensor_name]), tensor_name
    (tmp_path / "copy").mkdir()
    write_like(folder, tmp_path / "copy", {})
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "copy" / path.name).read_bytes()


@pytest.mark.parametrize("name", ["plain", "two_layers", "bias"])
@pytest.mark.parametrize("prefix", ["", "medusa_heads."])
def test_both_layouts_are_the_same_draft(name: str, prefix: str, tmp_path: Path) -> None:
    config = replace(PLAIN, **VARIANTS[name])
    other = numbered(tmp_path / "numbered", config)
    if prefix:
        tensors = {prefix + k: v for k, v in load_file(other / "model.safetensors").items()}
        save_file(tensors, other / "model.safetensors")
    assert read_draft(other).format == "medusa-heads"
    assert read_draft(other).vocab_size == 60  # its config names none
    again = load_draft(other)
    assert again.config == config
    for tensor_name, value in make_draft(config).named_parameters():
        assert torch.equal(value, again.get_parameter(tensor_name)), tensor_name

    out = tmp_path / "out"
    out.mkdir()
    new = torch.randn(32, 32)
    write_like(other, out, {"blocks.2.0.linear.weight": new})
    before, after = load_file(other / "model.safetensors"), load_file(out / "model.safetensors")
    assert [n for n in before if not torch.equal(before[n], after[n])] == [
        f"{prefix}2.0.linear.weight"
    ]


def test_layouts_convert_into_each_other(tmp_path: Path) -> None:
    first = numbered(tmp_path / "numbered")
    there = convert(first, "medusa", tmp_path / "medusa")
    assert json.loads((there.folder / "config.json").read_text())["num_heads"] == 4
    assert "blocks.3.layers.0.weight" in load_file(there.folder / "model.safetensors")
    back = convert(there.folder, "medusa-heads", tmp_path / "back")
    assert (back.folder / "model.safetensors").read_bytes() == (
        first / "model.safetensors"
    ).read_bytes()
    assert json.loads((back.folder / "config.json").read_text()) == json.loads(
        (first / "config.json").read_text()
    )


def test_a_shared_head_may_lie_under_the_name_of_the_first(tmp_path: Path) -> None:
    folder, head = saved(tmp_path / "draft", replace(PLAIN, shared_head=True)), torch.randn(60, 32)
    edit(folder, tensors=drop("lm_head.weight"))
    edit(folder, tensors=put(**{"lm_heads.0.weight": head}))
    assert torch.equal(load_draft(folder).get_parameter("lm_head.weight"), head)


def test_more_heads_stored_than_counted_are_no_part_of_the_draft(tmp_path: Path) -> None:
    folder = edit(saved(tmp_path / "draft"), lambda c: c.update(num_heads=2))
    assert read_draft(folder).max_k == 2
    assert len(load_draft(folder).blocks) == 2


BAD: dict[str, tuple[str, dict[str, Any]]] = {
    "missing_block": (
        r"lacks the tensor blocks\.3\.0",
        {"tensors": drop("blocks.3.layers.0.weight")},
    ),
    "missing_head": (r"lacks the tensor lm_heads\.3", {"tensors": drop("lm_heads.3.weight")}),
    "no_head": (r"lacks the tensor lm_heads\.0", {"tensors": drop("lm_heads.0.weight")}),
    "more_counted": (r"lacks the tensor blocks\.4", {"config": put(num_heads=5)}),
    "wrong_size": (r"is \[32, 32\], the config says \[48, 48\]", {"config": put(hidden_size=48)}),
    "wrong_vocabulary": (
        r"lm_heads\.0\.head\.weight is \[60, 32\], the config says \[64, 32\]",
        {"config": put(vocab_size=64)},
    ),
    "no_width": ("vLLM takes 4096, but the heads have 32", {"config": drop("hidden_size")}),
    "dropped_bias": (
        r"has the tensor blocks\.0\.0\.linear\.bias.* vLLM leaves it out\n.*medusa_fc_bias",
        {"tensors": put(**{"blocks.0.layers.0.bias": torch.zeros(32)})},
    ),
    "absent_bias": (
        r"lacks the tensor blocks\.0\.0\.linear\.bias",
        {"config": put(medusa_fc_bias=True)},
    ),
    "deeper_block": (
        r"has the tensor blocks\.1\.1\.linear\.weight.* vLLM leaves it out",
        {"tensors": put(**{"blocks.1.layers.1.weight": torch.zeros(32, 32)})},
    ),
    "reduced": (
        "has a reduced vocabulary",
        {"config": put(truncated_vocab_size=40), "tensors": put(token_map=torch.arange(40))},
    ),
    "other_architecture": (
        "which vLLM does not load as Medusa heads",
        {"config": put(architectures=["LlamaForCausalLM"])},
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_damaged_checkpoints_are_refused(name: str, tmp_path: Path) -> None:
    expected, changes = BAD[name]
    folder = edit(saved(tmp_path / "draft"), **changes)
    with pytest.raises(UserError, match=expected):
        read_draft(folder)


def test_a_fresh_draft_says_what_the_target_says_next(tiny_target: Path) -> None:
    head = load_lm_head(tiny_target).float()
    draft = init_draft("medusa", tiny_target, InitOptions(max_k=2, num_layers=2))
    features = torch.randn(5, HIDDEN)
    said = int((features[-1] @ head.T).argmax())
    assert draft.propose(features, torch.zeros(6, dtype=torch.long), 2) == [said, said]
    with pytest.raises(UserError, match="reduced vocabulary"):
        init_draft("medusa", tiny_target, InitOptions(kept=torch.arange(100)))


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory, tiny_target: Path) -> Path:
    return write_fresh("medusa", tmp_path_factory.mktemp("medusa") / "draft", tiny_target)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, tiny_target: Path, draft: Path) -> Path:
    return write_store(tmp_path_factory.mktemp("medusa") / "store", tiny_target, draft)


def test_capture_keeps_the_final_state_only(store: Path) -> None:
    opened = FeatureStore.open(store)
    assert opened.manifest.layer_ids == ()
    assert opened[0].hidden.shape == (len(opened[0]), 0)
    for shard in opened.manifest.shards:
        assert shard.bytes < shard.tokens * (2 * HIDDEN + 5) + 2000  # final, id, mask; the header


@pytest.mark.parametrize("arm", ["afa-lora", "lora", "full"])
def test_every_arm_learns_and_merges(
    arm: str, store: Path, draft: Path, tiny_target: Path, tmp_path: Path
) -> None:
    rate = 1e-3 if arm == "full" else 1e-2
    losses = run_losses(store, draft, tmp_path / "run", arm=arm, learning_rate=rate)
    assert losses[-1] < 0.9 * losses[0]
    parity = merge(tmp_path / "run", None, tmp_path / "merged")
    assert parity.float32 <= 1e-5
    assert parity.stored <= 0.05  # bf16 weights: three significant digits each
    # of four heads the three that were trained: each a block and an output layer
    assert (parity.changed_tensors, parity.untouched_tensors) == (6, 2)
    assert (tmp_path / "merged" / "config.json").read_bytes() == (
        draft / "config.json"
    ).read_bytes()
    require_compatible(tiny_target, tmp_path / "merged")
    sequences = [FeatureStore.open(store)[i] for i in range(4)]
    assert offline_acceptance(load_draft(tmp_path / "merged"), sequences, 4).acceptance_length >= 1


def test_a_shared_head_stays_as_it_is(store: Path, tiny_target: Path, tmp_path: Path) -> None:
    own = init_draft("medusa", tiny_target, InitOptions())
    draft, folder = MedusaDraft(replace(own.config, shared_head=True)), tmp_path / "draft"
    draft.load_state_dict(own.state_dict(), strict=False)
    draft.lm_head.weight.data.copy_(load_lm_head(tiny_target))
    folder.mkdir()
    save_draft(draft, "medusa", folder, dtype=torch.bfloat16)
    losses = run_losses(store, folder, tmp_path / "run", arm="lora", learning_rate=1e-2)
    assert losses[-1] < 0.97 * losses[0]
    assert merge(tmp_path / "run", None, tmp_path / "merged").changed_tensors == 3
    with pytest.raises(UserError, match="shares lm_head with the target"):
        run_losses(store, folder, tmp_path / "other", arm="lora", lm_head=True)


def test_fewer_heads_than_steps(store: Path, tiny_target: Path, tmp_path: Path) -> None:
    draft = write_fresh("medusa", tmp_path / "draft", tiny_target, max_k=2)
    with pytest.raises(UserError, match="draft_steps is 3, but the draft drafts at most 2"):
        run_losses(store, draft, tmp_path / "run", arm="lora")
    run_losses(store, draft, tmp_path / "run", arm="lora", draft_steps=2)
    assert merge(tmp_path / "run", None, tmp_path / "merged").float32 <= 1e-5
    assert speculative_config(draft, 2) == {
        "method": "medusa",
        "model": str(draft),
        "num_speculative_tokens": 2,
    }
    with pytest.raises(UserError, match="drafts at most 2 tokens a step, not 3"):
        speculative_config(draft, 3)

"""Quantized drafts: FP8 is read as the weights that it stands for, the rest is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize
from safetensors.torch import load_file, save_file

from drafts.errors import UserError
from drafts.registry import load_draft as load_opened
from drafts.registry import read_draft
from drafts.target.info import read_target
from tests.command import run_command
from tests.opened import load_draft, merge
from tests.tiny.models import HIDDEN, write_draft

BLOCK = [64, 48]  # of which neither divides every size
GRIDS = {
    "tensor": lambda rows, columns: (1,),
    "channel": lambda rows, columns: (rows, 1),
    "block": lambda rows, columns: (-(-rows // BLOCK[0]), -(-columns // BLOCK[1])),
}


def compressed(strategy: str, **changes: Any) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True}
    weights |= {"dynamic": False, "block_structure": BLOCK if strategy == "block" else None}
    group = {"targets": ["Linear"], "weights": weights | changes.pop("weights", {})}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
        **changes,
    }


def quantized(folder: Path, config: dict[str, Any] | None, grid: Any, suffix: str) -> Path:
    """An EAGLE-3 draft whose projections and fc are FP8, with scales far from 1."""
    write_draft(folder)
    torch.manual_seed(0)
    tensors = load_file(folder / "model.safetensors")
    for name, value in list(tensors.items()):
        if name.endswith("proj.weight") or name == "fc.weight":
            tensors[name] = (value.float() * 100).to(torch.float8_e4m3fn)
            tensors[name + suffix] = (0.5 + torch.rand(grid(*value.shape))) / 100
    save_file(tensors, folder / "model.safetensors")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"quantization_config": config}))
    return folder


@pytest.mark.parametrize("strategy", GRIDS)
def test_fp8_of_compressed_tensors(strategy: str, tmp_path: Path, tiny_target: Path) -> None:
    """Held against their own arithmetic."""
    folder = quantized(tmp_path / "draft", compressed(strategy), GRIDS[strategy], "_scale")
    draft, stored = load_draft(folder, tiny_target), load_file(folder / "model.safetensors")
    args = QuantizationArgs(
        num_bits=8,
        type="float",
        strategy=strategy,
        block_structure=BLOCK if strategy == "block" else None,
    )
    for name in ("fc.weight", "midlayer.self_attn.k_proj.weight", "midlayer.mlp.down_proj.weight"):
        scale = stored[name + "_scale"]
        expected = dequantize(stored[name].float(), scale, args=args, dtype=torch.float32)
        own = draft.get_parameter(name.replace("midlayer.", "layers.0."))
        torch.testing.assert_close(own, expected, rtol=1e-6, atol=0.0)
    assert torch.equal(draft.get_parameter("norm.weight"), stored["norm.weight"].float())


@pytest.mark.parametrize("block", [BLOCK, None])
def test_fp8_of_transformers(block: list[int] | None, tmp_path: Path, tiny_target: Path) -> None:
    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": block}
    grid = GRIDS["block" if block else "tensor"]
    folder = quantized(tmp_path / "draft", config, grid, "_scale_inv")
    draft, stored = load_draft(folder, tiny_target), load_file(folder / "model.safetensors")
    own, weight = draft.get_parameter("fc.weight"), stored["fc.weight"].float()
    scale = stored["fc.weight_scale_inv"]
    for row, column in ((0, 0), (63, 47), (64, 48), (127, 383)):
        factor = scale[row // BLOCK[0], column // BLOCK[1]] if block else scale[0]
        assert own[row, column] == weight[row, column] * factor


def test_a_merge_writes_plain_weights(tmp_path: Path, tiny_target: Path) -> None:
    """Trained: fc. The others are written as what they stand for, and no field claims FP8."""
    base = quantized(tmp_path / "base", compressed("channel"), GRIDS["channel"], "_scale")
    before = load_draft(base, tiny_target)
    (tmp_path / "trained").mkdir()
    new = torch.randn(HIDDEN, 3 * HIDDEN)
    save_file({"fc.weight": new}, tmp_path / "trained" / "weights.safetensors")
    parity = merge(tmp_path / "trained", base, tmp_path / "merged", tiny_target)
    assert parity.float32 <= 1e-5
    assert parity.stored <= 0.05
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())
    info = read_draft(tmp_path / "merged")
    assert (info.dtype, info.warnings) == ("bfloat16", ())
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    assert not any("scale" in name for name in stored)
    assert {t.dtype for t in stored.values() if t.is_floating_point()} == {torch.bfloat16}
    after = load_opened(info, read_target(tiny_target))
    assert torch.equal(after.get_parameter("fc.weight"), new.bfloat16().float())
    for name, value in before.named_parameters():
        if name != "fc.weight":
            assert torch.equal(after.get_parameter(name), value.bfloat16().float()), name


def test_inspect_says_that_it_is_quantized(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draft = quantized(tmp_path / "draft", compressed("tensor"), GRIDS["tensor"], "_scale")
    code, _ = run_command("inspect", draft)
    assert code == 0
    assert "its weights are quantized" in capsys.readouterr().out


REFUSED: dict[str, tuple[Any, str]] = {
    "gptq": ({"quant_method": "gptq", "bits": 4}, r"is quantized \(gptq\)"),
    "awq": ({"quant_method": "awq", "bits": 4}, r"is quantized \(awq\)"),
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
    "int4": (
        compressed("group", format="pack-quantized", weights={"num_bits": 4, "type": "int"}),
        r"compressed-tensors, pack-quantized, 4-bit int",
    ),
    "not symmetric": (compressed("tensor", weights={"symmetric": False}), "8-bit float"),
    "transformed": (compressed("tensor", transform_config={"r1": {}}), "transform_config"),
    "sparse": (
        compressed("tensor", sparsity_config={"format": "sparse-24-bitmask"}),
        "sparsity_config",
    ),
    "unnamed": (None, r"as F8_E4M3, but its config names no quantization"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_others_are_refused_by_name(name: str, tmp_path: Path) -> None:
    config, says = REFUSED[name]
    draft = quantized(tmp_path / "draft", config, GRIDS["tensor"], "_scale")
    with pytest.raises(UserError, match=says):
        read_draft(draft)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop("fc.weight_scale"), r"fc\.weight .* with no scale"),
        (
            lambda t: t.update({"fc.weight_scale": torch.ones(3)}),
            r"fc\.weight_scale is \[3\] of float32, expected \[1, 1\]",
        ),
        (
            lambda t: t.update({"lm_head.weight_scale": torch.ones(1)}),
            r"lm_head\.weight_scale, for which this config has no place",
        ),
        (
            lambda t: t["fc.weight"].view(torch.uint8).view(-1)[:1].fill_(0x7F),
            r"fc\.weight holds NaN",
        ),
        (lambda t: t["fc.weight_scale"].fill_(float("inf")), r"fc\.weight_scale holds NaN or inf"),
    ],
)
def test_scales_that_do_not_fit_are_refused(change: Any, says: str, tmp_path: Path) -> None:
    draft = quantized(tmp_path / "draft", compressed("tensor"), GRIDS["tensor"], "_scale")
    tensors = load_file(draft / "model.safetensors")
    change(tensors)
    save_file(tensors, draft / "model.safetensors")
    with pytest.raises(UserError, match=says):
        read_draft(draft)

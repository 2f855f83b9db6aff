"""The embedded pair: what is packed unpacks to the same model, and the shipped files are whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from afaspec.embedded.quantize import pack_state, quantization_config, round_to_grid, unpack_state
from afaspec.embedded.unpack import ASSETS, pack, unpack_to
from afaspec.pairs.names import resolve_model
from afaspec.pretrain.card import write_card
from afaspec.pretrain.config import BuildConfig
from drafts.errors import UserError
from drafts.files import read_json
from drafts.hashes import hash_model
from drafts.registry import read_draft
from drafts.target.info import read_target
from tests.opened import require_compatible


@pytest.mark.parametrize("bits", [4, 8])
def test_packing_loses_exactly_the_rounding(bits: int) -> None:
    torch.manual_seed(0)
    state = {
        "layer.weight": torch.randn(40, 128),
        "norm.weight": torch.randn(128).to(torch.bfloat16),
        "d2t": torch.arange(5),
    }
    packed = pack_state(state, bits)
    unpacked = unpack_state(packed, bits)
    assert unpacked.keys() == state.keys()
    rounded = round_to_grid(state["layer.weight"], bits).to(torch.bfloat16)
    assert torch.equal(unpacked["layer.weight"], rounded)
    assert torch.equal(unpacked["norm.weight"], state["norm.weight"])
    assert torch.equal(unpacked["d2t"], state["d2t"])
    size = sum(t.numel() * t.element_size() for n, t in packed.items() if n.startswith("layer"))
    assert size < 40 * 128 * (bits + 0.5) / 8


def test_a_packed_folder_unpacks_to_a_plain_model(tiny_draft: Path, tmp_path: Path) -> None:
    pack(tiny_draft, tmp_path / "asset", 8)
    assert "quantization_config" in read_json(tmp_path / "asset" / "config.json")
    unpack_to(tmp_path / "asset", tmp_path / "plain")
    info = read_draft(tmp_path / "plain")
    assert (info.dtype, info.draft_vocab_size) == ("bfloat16", 320)
    before = load_file(tiny_draft / "model.safetensors")
    after = load_file(tmp_path / "plain" / "model.safetensors")
    assert before.keys() == after.keys()
    assert float((before["fc.weight"] - after["fc.weight"]).abs().max()) < 0.01


@pytest.mark.parametrize("bits", [4, 8])
def test_the_library_unpacks_the_same_values(bits: int) -> None:
    """The layout of each matrix is compressed-tensors' own, not one of ours."""
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme

    torch.manual_seed(0)
    packed = pack_state({"weight": torch.randn(40, 128)}, bits)
    scheme = QuantizationScheme(**quantization_config(bits)["config_groups"]["group_0"])
    theirs = PackedQuantizationCompressor.decompress(dict(packed), scheme)["weight"]
    assert torch.equal(theirs, unpack_state(packed, bits)["weight"])


def test_what_cannot_be_packed_is_refused(tiny_draft: Path, tmp_path: Path) -> None:
    out = tmp_path / "asset"
    with pytest.raises(UserError, match=r"takes 0\.\d MB when packed, and 0\.0 MB may ship"):
        pack(tiny_draft, out, 8, largest=1000)
    state = load_file(tiny_draft / "model.safetensors")
    save_file(state | {"fc.weight": torch.zeros(4, 100)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        UserError, match=r"fc.weight is \[4, 100\]: its columns make no whole groups"
    ):
        pack(tmp_path, out, 8)
    assert not out.exists()
    pack(tiny_draft, out, 8)
    with pytest.raises(UserError, match="is quantized already"):
        pack(out, tmp_path / "again", 8)


def test_a_packed_model_may_lie_in_several_files(tiny_draft: Path, tmp_path: Path) -> None:
    state = load_file(tiny_draft / "model.safetensors")
    names = sorted(state)
    for number, part in enumerate((names[:5], names[5:]), 1):
        file = tmp_path / f"model-0000{number}-of-00002.safetensors"
        save_file({name: state[name] for name in part}, file)
    (tmp_path / "config.json").write_bytes((tiny_draft / "config.json").read_bytes())
    pack(tmp_path, tmp_path / "asset", 8)
    pack(tiny_draft, tmp_path / "other", 8)
    assert {path.name for path in (tmp_path / "asset").iterdir()} == {
        path.name for path in (tmp_path / "other").iterdir()
    }
    assert hash_model(tmp_path / "asset") == hash_model(tmp_path / "other")


def test_the_shipped_pair_is_small_and_fits() -> None:
    files = [path for name in ("target", "draft") for path in (ASSETS / name).iterdir()]
    assert sum(path.stat().st_size for path in files) <= 30 * 10**6
    target, draft = resolve_model("embedded"), resolve_model("embedded-draft")
    assert read_target(target).dtype == "bfloat16"
    require_compatible(target, draft)
    assert (ASSETS / "README.md").exists()
    assert (ASSETS / "loss.png").exists()


def test_unpacking_happens_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AFASPEC_CACHE", str(tmp_path))
    first = resolve_model("embedded-draft")
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    assert resolve_model("embedded-draft") == first
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp


def test_the_shortest_build_has_a_card_too(tmp_path: Path) -> None:
    """A build so short that it logged no step on its way still ends with its card."""
    work, out = tmp_path / "work", tmp_path / "pair"
    (work / "draft-run").mkdir(parents=True)
    out.mkdir()
    final = {"step": 13, "tokens": 53248, "minutes": 2.0, "final_held_out": {"python": 6.44}}
    (work / "loss.jsonl").write_text(json.dumps(final) + "\n")
    row = {"step": 20, "loss": 4.0, "acceptance_length": 1.25}
    (work / "draft-run" / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    write_card(work, out, BuildConfig().model_dump(mode="json"))
    assert "53,248 tokens in 13 steps (2 minutes)" in (out / "README.md").read_text()
    assert (out / "loss.png").stat().st_size > 1000


def test_other_names_are_folders(tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path
    with pytest.raises(UserError, match="no such model folder"):
        resolve_model("./meta-llama/Nowhere")

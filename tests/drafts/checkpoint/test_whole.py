"""A checkpoint is read whole or refused, with one message and by every command alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from drafts.errors import UserError
from drafts.registry import read_draft
from tests.command import run_command
from tests.drafts.test_registry import speculators_draft
from tests.opened import load_draft, load_lm_head, require_compatible, write_like
from tests.packed import alone
from tests.tiny.models import HIDDEN, LAYER_IDS, VOCAB, write_draft, write_target

IDS = "eagle_aux_hidden_state_layer_ids"


def edit(
    folder: Path,
    change: Callable[[dict[str, Any]], Any] = lambda tensors: None,
    **config: Any,
) -> Path:
    """Change a checkpoint's tensors and config in place; None removes an entry of the config."""
    raw = json.loads((folder / "config.json").read_text()) | config
    kept = {key: value for key, value in raw.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def wide_heads(folder: Path, **config: Any) -> Path:
    """Heads of 64 where hidden_size / heads is 32."""

    def widen(tensors: dict[str, Any]) -> None:
        for name in "qkv":
            weight = tensors[f"midlayer.self_attn.{name}_proj.weight"]
            tensors[f"midlayer.self_attn.{name}_proj.weight"] = weight.repeat(2, 1)
        weight = tensors["midlayer.self_attn.o_proj.weight"]
        tensors["midlayer.self_attn.o_proj.weight"] = weight.repeat(1, 2)

    return edit(write_draft(folder), widen, **config)


def test_heads_of_a_size_that_the_config_names(tmp_path: Path, tiny_target: Path) -> None:
    draft = load_draft(wide_heads(tmp_path / "named", head_dim=64), tiny_target)
    assert draft.get_parameter("layers.0.self_attn.o_proj.weight").shape == (HIDDEN, 4 * 64)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"head_dim": None}, r"k_proj\.weight is \[128, 256\], the config says \[64, 256\]"),
        (
            {"head_dim": 64, "num_key_value_heads": 4},
            r"k_proj\.weight is \[128, 256\], the config says \[256, 256\]",
        ),
    ],
)
def test_heads_of_another_size_are_refused(
    config: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=says):
        read_draft(wide_heads(tmp_path / "draft", **config))


def second_layer(tensors: dict[str, Any]) -> None:
    """As a draft of two layers has it, whose later layers read no embedding."""
    for name, value in list(tensors.items()):
        if name.startswith("midlayer.") and "hidden_norm" not in name:
            wide = name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))
            second = value[:, :HIDDEN] if wide else value
            tensors[name.replace("midlayer.", "layers.1.")] = second.clone()


CHANGES: dict[str, tuple[str, Callable[[dict[str, Any]], Any], dict[str, Any]]] = {
    "a bias without its field": (
        r"layers\.0\.self_attn\.q_proj\.bias, for which this config has no place",
        lambda t: t.update({"midlayer.self_attn.q_proj.bias": torch.zeros(128)}),
        {},
    ),
    "a field without its bias": (
        r"lacks the tensor layers\.0\.self_attn\.q_proj\.bias.*and 3 more",
        lambda t: None,
        {"attention_bias": True},
    ),
    "a surplus layer": (r"layers\.1\..*, for which this config has no place", second_layer, {}),
    "a missing layer": (
        r"lacks the tensor layers\.1\.",
        lambda t: None,
        {"num_hidden_layers": 2},
    ),
    "a missing norm": (
        r"lacks the tensor norm\.weight",
        lambda t: t.pop("norm.weight"),
        {},
    ),
    "a norm of another size": (
        r"norm\.weight is \[64\], the config says \[128\]",
        lambda t: t.update({"norm.weight": torch.ones(64)}),
        {},
    ),
    "one place, two tensors": (
        r"stores layers\.0\.hidden_norm\.weight twice",
        lambda t: t.update({"layers.0.hidden_norm.weight": torch.ones(128)}),
        {},
    ),
    "norms of queries in a Llama": (
        r"q_norm\.weight, for which this config has no place",
        lambda t: t.update({"midlayer.self_attn.q_norm.weight": torch.ones(32)}),
        {},
    ),
    "a map of a full vocabulary": (
        r"has a d2t tensor, but its config makes a full vocabulary of 512",
        lambda t: t.update({"lm_head.weight": torch.zeros(VOCAB, HIDDEN)}),
        {"draft_vocab_size": None},
    ),
    "a map of another size": (
        r"d2t is \[319\] of I64, expected \[320\] whole numbers",
        lambda t: t.update({"d2t": t["d2t"][:-1].clone()}),
        {},
    ),
    "a map of floats": (
        r"d2t is \[320\] of float32",
        lambda t: t.update({"d2t": t["d2t"].float()}),
        {},
    ),
    "two maps that disagree": (
        r"d2t and t2d disagree: d2t leads to 320 tokens, t2d marks 319, 319 of them the same",
        lambda t: t["t2d"].__setitem__(int(t["t2d"].nonzero()[0]), False),
        {},
    ),
    "four layer ids where vLLM fuses three": (
        r"names 4 layers \[0, 1, 2, 3\], but vLLM fuses 3",
        lambda t: None,
        {IDS: [0, 1, 2, 3]},
    ),
    "layer ids of another program": (
        r"names layers \[7\] in feature_layers, where vLLM does not look",
        lambda t: None,
        {IDS: None, "feature_layers": [7]},
    ),
    "layer ids that disagree": (
        r"names layers \[0, 1, 2\] in target_layer_ids.*and \[1, 2, 3\] in eagle_aux",
        lambda t: None,
        {"target_layer_ids": [0, 1, 2]},
    ),
    "no architectures": (
        r"names no architectures.*\n.*LlamaForCausalLMEagle3",
        lambda t: None,
        {"architectures": None},
    ),
    "an architecture of another module": (
        r"Eagle3DeepseekV2ForCausalLM, an EAGLE-3 draft .*MLA.* that vLLM has another module for",
        lambda t: None,
        {"architectures": ["Eagle3DeepseekV2ForCausalLM"]},
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_has_no_place_is_refused(name: str, tmp_path: Path) -> None:
    says, change, config = CHANGES[name]
    with pytest.raises(UserError, match=says):
        read_draft(edit(write_draft(tmp_path / "draft"), change, **config))


def test_what_vllm_leaves_out_too_is_no_fault(tmp_path: Path, tiny_target: Path) -> None:
    def add(tensors: dict[str, Any]) -> None:
        tensors["midlayer.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
        second_layer(tensors)
        tensors["layers.1.hidden_norm.weight"] = torch.ones(HIDDEN)

    draft = edit(write_draft(tmp_path / "draft"), add, num_hidden_layers=2)
    assert len(load_draft(draft, tiny_target).layers) == 2  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "architecture",
    [
        "Eagle3MiniMaxM2ForCausalLM",
        "Eagle3Qwen2_5vlForCausalLM",
        "Eagle3Qwen3vlForCausalLM",
        "LlamaForCausalLM",
    ],
)
def test_names_for_which_vllm_takes_the_same_module(
    architecture: str, tmp_path: Path, tiny_target: Path
) -> None:
    draft = write_draft(tmp_path / "draft", architectures=[architecture])
    assert read_draft(draft).family == "eagle3"
    assert load_draft(draft, tiny_target).config.layer_ids == LAYER_IDS


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_value_that_is_not_finite_is_refused(
    value: float, dtype: torch.dtype, tmp_path: Path
) -> None:
    def spoil(tensors: dict[str, Any]) -> None:
        weight = tensors["midlayer.mlp.up_proj.weight"].to(dtype)
        weight[-1, -1] = torch.finfo(dtype).max  # which is a number
        tensors["midlayer.mlp.up_proj.weight"] = weight

    draft = edit(write_draft(tmp_path / "draft"), spoil)
    read_draft(draft)

    def spoil_more(tensors: dict[str, Any]) -> None:
        tensors["midlayer.mlp.up_proj.weight"][0, 3] = value

    code, error = run_command("inspect", edit(draft, spoil_more))
    assert code == 2
    assert "midlayer.mlp.up_proj.weight holds NaN or infinity" in error


def test_layer_ids_that_stand_inside_move_to_the_top(
    tmp_path: Path, tiny_target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draft = write_draft(tmp_path / "draft")
    edit(draft, **{IDS: None, "eagle_config": {IDS: list(LAYER_IDS)}})
    assert read_draft(draft).layer_ids == LAYER_IDS
    code, _ = run_command("inspect", draft)
    assert code == 0
    assert "stands only in eagle_config" in capsys.readouterr().out
    (tmp_path / "written").mkdir()
    write_like(draft, tmp_path / "written", {"norm.weight": torch.ones(HIDDEN)})
    written = json.loads((tmp_path / "written" / "config.json").read_text())
    assert written[IDS] == list(LAYER_IDS)
    found = read_draft(tmp_path / "written")
    assert (found.layer_ids, found.warnings) == (LAYER_IDS, ())


def test_a_mixture_of_types_survives(tmp_path: Path) -> None:
    def mix(tensors: dict[str, Any]) -> None:
        for i, name in enumerate(sorted(tensors)):
            if tensors[name].is_floating_point():
                tensors[name] = tensors[name].to([torch.float32, torch.float16][i % 2])

    draft = edit(write_draft(tmp_path / "draft"), mix)
    (tmp_path / "written").mkdir()
    write_like(draft, tmp_path / "written", {"fc.weight": torch.zeros(HIDDEN, 3 * HIDDEN)})
    before = load_file(draft / "model.safetensors")
    after = load_file(tmp_path / "written" / "model.safetensors")
    assert {n: t.dtype for n, t in before.items()} == {n: t.dtype for n, t in after.items()}
    assert [n for n in before if not torch.equal(before[n], after[n])] == ["fc.weight"]


def test_what_is_written_is_finite(tmp_path: Path) -> None:
    draft = edit(write_draft(tmp_path / "draft"), lambda t: t.update(fc16(t)))
    huge = torch.full((HIDDEN, 3 * HIDDEN), 1e5)  # finite, but not as float16
    (tmp_path / "written").mkdir()
    with pytest.raises(UserError, match=r"fc\.weight would hold 49,152 values .* in float16"):
        write_like(draft, tmp_path / "written", {"fc.weight": huge})


def fc16(tensors: dict[str, Any]) -> dict[str, Any]:
    return {"fc.weight": tensors["fc.weight"].half()}


def medusa_heads(folder: Path, **config: Any) -> Path:
    """Heads without output layers, as FasterDecoding's trainer numbers them."""
    folder.mkdir()
    torch.manual_seed(0)
    tensors = {}
    for i in range(3):
        tensors[f"{i}.0.linear.weight"] = torch.randn(HIDDEN, HIDDEN) / 10
        tensors[f"{i}.0.linear.bias"] = torch.randn(HIDDEN) / 10
    raw = {"medusa_num_heads": 3, "medusa_num_layers": 1, "hidden_size": HIDDEN}
    raw |= {"vocab_size": VOCAB, "base_model_name_or_path": "some/target"}
    (folder / "config.json").write_text(json.dumps(raw | config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_medusa_heads_alone_share_the_output_layer(tmp_path: Path, tiny_target: Path) -> None:
    heads = medusa_heads(tmp_path / "heads")
    info, draft = read_draft(heads), load_draft(heads, tiny_target).eval()
    assert (info.family, info.max_k, info.shared) == ("medusa", 3, ("lm_head.weight",))
    features = torch.randn(4, HIDDEN)
    outputs = draft(features, torch.zeros(4, dtype=torch.long), 3, alone(4))
    stored = load_file(heads / "model.safetensors")
    head = load_lm_head(tiny_target).float()
    for i, output in enumerate(outputs):
        x = features[:-1]
        linear = x @ stored[f"{i}.0.linear.weight"].T + stored[f"{i}.0.linear.bias"]
        expected = (x + linear * linear.sigmoid()) @ head.T
        torch.testing.assert_close(draft.logits(output, i), expected, rtol=1e-4, atol=1e-4)

    # vLLM reads no such checkpoint; what a merge writes has the output layer.
    with pytest.raises(UserError, match=r"lm_head: the target has its own, the draft shares it"):
        require_compatible(tiny_target, heads)
    (tmp_path / "written").mkdir()
    write_like(heads, tmp_path / "written", {"lm_head.weight": head})
    require_compatible(tiny_target, tmp_path / "written")
    again = load_draft(tmp_path / "written")
    for name, value in draft.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_medusa_heads_alone_need_the_size_of_the_output_layer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="vocab_size"):
        read_draft(medusa_heads(tmp_path / "heads", vocab_size=None))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(128)}),
            r"has model\.layers\.0\.self_attn\.q_proj\.bias, for which its config has no place",
        ),
        (
            lambda t: t.update({"model.layers.1.self_attn.k_proj.weight": torch.zeros(32, 128)}),
            r"lacks or misshapes model\.layers\.1\.self_attn\.k_proj\.weight",
        ),
        (lambda t: t.pop("model.norm.weight"), r"lacks or misshapes model\.norm\.weight"),
    ],
)
def test_a_draft_model_is_read_whole_too(
    change: Callable[[dict[str, Any]], Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=says):
        read_draft(edit(write_target(tmp_path / "lm"), change))


def test_speculators_layout_is_checked_alike(tmp_path: Path) -> None:
    draft = speculators_draft(tmp_path / "draft")
    with pytest.raises(UserError, match=r"layers\.0\.mlp\.up_proj\.weight is \[128, 128\]"):
        read_draft(
            edit(draft, lambda t: t.update({"layers.0.mlp.up_proj.weight": torch.zeros(128, 128)}))
        )

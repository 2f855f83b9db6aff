"""Conversion: another layout of the same draft, a way back without loss, and vLLM serves both."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from drafts.checkpoint.family import InitOptions
from drafts.convert import RECORD, changed, differences
from drafts.errors import UserError
from drafts.files import read_json
from drafts.registry import FAMILIES, save_draft
from tests.drafts.test_registry import speculators_draft
from tests.opened import convert, init_draft, load_draft, load_embedding
from tests.tiny.models import (
    HIDDEN,
    VOCAB,
    draft_config,
    draft_tensors,
    write_draft,
    write_target,
)
from tests.vllm_client import VllmWorker

TWO_LAYOUTS = [name for name, family in FAMILIES.items() if len(family.formats) > 1]
ONE_LAYOUT = [name for name, family in FAMILIES.items() if len(family.formats) == 1]


def same_checkpoint(one: Path, two: Path) -> None:
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
    assert read_json(one / "config.json") == read_json(two / "config.json")


def write_fresh(family: str, folder: Path, target: Path, kept: torch.Tensor | None = None) -> Path:
    layer_ids = (1, 2, 3) if family != "draft_model" else None
    options = InitOptions(layer_ids=layer_ids, kept=kept)
    folder.mkdir()
    save_draft(init_draft(family, target, options), family, folder, dtype=torch.bfloat16)
    return folder


@pytest.mark.parametrize("family", TWO_LAYOUTS)
def test_there_and_back_again(family: str, tiny_target: Path, tmp_path: Path) -> None:
    base = write_fresh(family, tmp_path / "base", tiny_target)
    first, second = FAMILIES[family].formats
    there = convert(base, second, tmp_path / "there", tiny_target)
    assert (there.format, there.family) == (second, family)
    one, two = load_draft(base, tiny_target), load_draft(there.folder, tiny_target)
    for name, value in one.state_dict().items():
        assert torch.equal(value.flatten(), two.state_dict()[name].flatten()), name
    convert(there.folder, first, tmp_path / "back")
    same_checkpoint(base, tmp_path / "back")

    # The same from the second layout, as it comes without any record of a conversion.
    (there.folder / RECORD).unlink(missing_ok=True)
    convert(there.folder, first, tmp_path / "plain")
    convert(tmp_path / "plain", second, tmp_path / "again")
    same_checkpoint(there.folder, tmp_path / "again")


def test_speculators_fields_without_a_place_come_back(tmp_path: Path, tiny_target: Path) -> None:
    base = speculators_draft(tmp_path / "base")
    config = read_json(base / "config.json") | {"speculators_version": "0.1", "auto_map": {"": "x"}}
    (base / "config.json").write_text(json.dumps(config))
    there = convert(base, "eagle", tmp_path / "eagle")
    made = read_json(there.folder / "config.json")
    assert made["architectures"] == ["LlamaForCausalLMEagle3"]
    assert made["model_type"] == "llama"
    assert "speculators_version" not in made
    assert "midlayer.mlp.up_proj.weight" in load_file(there.folder / "model.safetensors")
    convert(there.folder, "speculators", tmp_path / "back", tiny_target)
    back = read_json(tmp_path / "back" / "config.json")
    assert back["speculators_config"].pop("verifier") == {
        "architectures": ["LlamaForCausalLM"],
        "name_or_path": str(tiny_target),
    }
    config["speculators_config"].pop("verifier")
    assert back == config


@pytest.mark.parametrize(
    "changes",
    [
        {"rms_norm_eps": None, "max_position_embeddings": None, "hidden_act": None},
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 500000.0},
        {"rope_scaling": None, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
        {"layer_types": ["sliding_attention"], "sliding_window": 8},
        {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0},
        {"partial_rotary_factor": 0.5},
    ],
)
def test_fields_mean_the_same_in_both_layouts(
    changes: dict[str, Any], tmp_path: Path, tiny_target: Path
) -> None:
    """Also those that one layout leaves to a class's defaults, or reads in another order."""
    base = write_draft(tmp_path / "base")
    config = draft_config() | changes
    (base / "config.json").write_text(
        json.dumps({key: value for key, value in config.items() if changes.get(key, 0) is not None})
    )
    there = convert(base, "speculators", tmp_path / "there", tiny_target).folder
    (there / RECORD).unlink(missing_ok=True)
    back = convert(there, "eagle", tmp_path / "back").folder
    before = load_draft(base, tiny_target).config
    assert load_draft(there, tiny_target).config == before
    assert load_draft(back, tiny_target).config == before


def test_tensor_names_of_other_tools_come_back(tmp_path: Path, tiny_target: Path) -> None:
    """SpecForge's switches in `eagle_config`, and the first layer under its other name."""
    base = tmp_path / "base"
    base.mkdir()
    config = draft_config(eagle_config={"norm_before_fc": True, "use_aux_hidden_state": True})
    (base / "config.json").write_text(json.dumps(config))
    tensors = {k.replace("midlayer.", "layers.0."): v for k, v in draft_tensors().items()}
    tensors["input_norm.weight"] = torch.ones(3 * HIDDEN, dtype=torch.bfloat16)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt", "made": "elsewhere"})
    there = convert(base, "speculators", tmp_path / "there", tiny_target).folder
    assert read_json(there / "config.json")["norm_before_fc"] is True
    convert(there, "eagle", tmp_path / "back")
    same_checkpoint(base, tmp_path / "back")


def test_an_edit_between_the_ways_is_kept(
    tmp_path: Path, tiny_draft: Path, tiny_target: Path
) -> None:
    there = convert(tiny_draft, "speculators", tmp_path / "there", tiny_target).folder
    config = read_json(there / "config.json")
    config["eagle_aux_hidden_state_layer_ids"] = [0, 2, 4]
    (there / "config.json").write_text(json.dumps(config))
    back = convert(there, "eagle", tmp_path / "back")
    assert back.layer_ids == (0, 2, 4)
    assert back.shared == ("embed_tokens.weight",)
    tensors = load_file(there / "model.safetensors")
    tensors["embed_tokens.weight"][7] = 1.5  # trained in speculators
    save_file(tensors, there / "model.safetensors", metadata={"format": "pt"})
    trained = convert(there, "eagle", tmp_path / "trained")
    assert trained.shared == ()
    kept = load_file(trained.folder / "model.safetensors")["embed_tokens.weight"]
    assert torch.equal(kept, tensors["embed_tokens.weight"])


def test_order_and_metadata_of_the_tensors_stay(
    tmp_path: Path, tiny_draft: Path, tiny_target: Path
) -> None:
    there = convert(tiny_draft, "speculators", tmp_path / "there", tiny_target).folder

    def in_order(folder: Path) -> list[str]:
        data = (folder / "model.safetensors").read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        header.pop("__metadata__")
        names = sorted(header, key=lambda name: header[name]["data_offsets"])
        return [name.replace("midlayer.", "layers.0.") for name in names]

    names = in_order(there)
    assert names.index("t2d") == len(names) - 1  # of the narrowest type: no other moves by its size
    names.remove("embed_tokens.weight")
    assert names == in_order(tiny_draft)
    with safe_open(there / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("vocab", [511, 512])
def test_tensors_are_added_where_their_type_can_lie(vocab: int, tmp_path: Path) -> None:
    """A t2d of odd length, before which wider values have to end."""
    target = write_target(tmp_path / "target", vocab=vocab)
    kept = torch.arange(1, vocab, 2)
    base = write_fresh("eagle3", tmp_path / "base", target, kept)
    there = convert(base, "speculators", tmp_path / "there", target).folder
    stored = load_file(there / "model.safetensors")
    assert torch.equal(stored["t2d"].nonzero().flatten(), kept)
    assert torch.equal(stored["embed_tokens.weight"], load_embedding(target))
    convert(there, "eagle", tmp_path / "back")
    same_checkpoint(base, tmp_path / "back")


def test_sharded_drafts_and_their_other_files_convert(
    tmp_path: Path, tiny_draft: Path, tiny_target: Path
) -> None:
    base, tensors = tmp_path / "base", load_file(tiny_draft / "model.safetensors")
    base.mkdir()
    (base / "config.json").write_bytes((tiny_draft / "config.json").read_bytes())
    (base / "NOTES.md").write_text("trained on tickets\n")
    names, where = list(tensors), {}
    for i, part in enumerate((names[:6], names[6:]), 1):
        file = f"model-0000{i}-of-00002.safetensors"
        save_file({n: tensors[n] for n in part}, base / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    there = convert(base, "speculators", tmp_path / "there", tiny_target).folder
    written = read_json(there / "model.safetensors.index.json")["weight_map"]
    assert written.keys() == load_draft_names(there)
    assert (there / "NOTES.md").read_text() == "trained on tickets\n"
    back = convert(there, "eagle", tmp_path / "back").folder
    for path in base.iterdir():
        if path.suffix == ".json":
            assert read_json(path) == read_json(back / path.name)
        else:
            assert path.read_bytes() == (back / path.name).read_bytes()


def load_draft_names(folder: Path) -> set[str]:
    return {name for path in folder.glob("*.safetensors") for name in load_file(path)}


def test_differences_and_changes_are_opposites() -> None:
    one = {"a": 1, "b": {"c": [1], "d": {}}, "e": None, "x": {"y": 1}}
    two = {"a": 2, "b": {"c": [1], "d": {"f": 0}}, "g": {"h": False}, "x": 3}
    for start, goal in ((one, two), (two, one), (one, one), ({}, two)):
        assert changed(start, differences(start, goal)) == goal


def test_what_cannot_be_converted_is_refused(
    tmp_path: Path, tiny_draft: Path, target_of: Callable[[str], Path]
) -> None:
    with pytest.raises(UserError, match="give --to speculators"):
        convert(tiny_draft, "medusa", tmp_path / "out")
    with pytest.raises(UserError, match="has the layout eagle already"):
        convert(tiny_draft, "eagle", tmp_path / "out")
    with pytest.raises(
        UserError, match="it shares the target's, which the layout speculators holds"
    ):
        convert(tiny_draft, "speculators", tmp_path / "out")
    full = tmp_path / "full"
    full.mkdir()
    (full / "precious").touch()
    with pytest.raises(UserError, match="is there already"):
        convert(tiny_draft, "speculators", full)
    assert [path.name for path in full.iterdir()] == ["precious"]
    for family in ONE_LAYOUT:
        only = write_fresh(family, tmp_path / family, target_of(family))
        with pytest.raises(UserError, match="has one layout only"):
            convert(only, "speculators", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def unlike_speculators(folder: Path, change: str) -> Path:
    """A draft that speculators would compute otherwise."""
    tensors = draft_tensors()
    changes: dict[str, Any] = {}
    if change == "scaled":
        changes["logit_scale"] = 0.5
    elif change == "norms":
        changes |= {"norm_before_fc": True, "fc_norm": True}
        tensors["input_norm.weight"] = torch.ones(3 * HIDDEN, dtype=torch.bfloat16)
        norms = {f"fc_norm.{i}.weight": torch.ones(HIDDEN, dtype=torch.bfloat16) for i in range(3)}
        tensors |= norms
    elif change == "width":
        changes["target_hidden_size"] = 2 * HIDDEN
        tensors["fc.weight"] = torch.zeros(HIDDEN, 6 * HIDDEN, dtype=torch.bfloat16)
        tensors["embed_tokens.weight"] = torch.zeros(VOCAB, HIDDEN, dtype=torch.bfloat16)
    else:
        ids = (tensors["d2t"] + torch.arange(len(tensors["d2t"]))).flip(0)
        tensors["d2t"] = ids - torch.arange(len(ids))
        del tensors["t2d"]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(draft_config(**changes)))
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("scaled", "scales its logits"),
        ("norms", "norms what fc takes twice"),
        ("width", "reads a target of another width"),
        ("order", "d2t is not in the order of the target's ids"),
    ],
)
def test_what_speculators_would_compute_otherwise_is_refused(
    change: str, said: str, tmp_path: Path, tiny_target: Path
) -> None:
    base = unlike_speculators(tmp_path / "base", change)
    with pytest.raises(UserError, match=said):
        convert(base, "speculators", tmp_path / "out", tiny_target)
    assert not (tmp_path / "out").exists()


def test_a_causal_dflash_draft_is_refused(tmp_path: Path, tiny_target: Path) -> None:
    """speculators lets every slot of a block see all others, but for sliding windows."""
    base = write_fresh("dflash", tmp_path / "base", tiny_target)
    config = read_json(base / "config.json")
    config["dflash_config"]["causal"] = True
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="no draft that is causal"):
        convert(base, "speculators", tmp_path / "out", tiny_target)


def test_a_verifier_that_would_replace_the_drafts_own_is_not_named(
    tmp_path: Path, tiny_target: Path
) -> None:
    """speculators takes a DFlash draft's full output layer from the verifier that is named."""
    base = write_fresh("dflash", tmp_path / "base", tiny_target)  # its lm_head is the target's
    named = convert(base, "speculators", tmp_path / "named", tiny_target)
    verifier = read_json(named.folder / "config.json")["speculators_config"]["verifier"]
    assert verifier["name_or_path"] == str(tiny_target)
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"][3] += 1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    unnamed = convert(base, "speculators", tmp_path / "unnamed", tiny_target)
    verifier = read_json(unnamed.folder / "config.json")["speculators_config"]["verifier"]
    assert verifier == {"architectures": ["LlamaForCausalLM"], "name_or_path": None}


def test_vllm_serves_both_layouts_alike(tmp_path: Path, vllm_worker: VllmWorker) -> None:
    """The embedded pair: same outputs as without a draft, same acceptance, in either layout."""
    from afaspec.capture.target_model import load_tokenizer
    from afaspec.pairs.names import resolve_model

    target, draft = resolve_model("embedded"), resolve_model("embedded-draft")
    other = convert(draft, "speculators", tmp_path / "speculators", target).folder
    tokenizer = load_tokenizer(target)
    texts = ["def read(path):\n    with open(path", "import os\n\nclass Node:\n    def __init__"]
    prompts = [tokenizer.encode(text) for text in texts]
    replies = [vllm_worker.serve(target, served, 3, prompts, 48) for served in (None, draft, other)]
    outputs = [[run["output"] for run in reply["runs"]] for reply in replies]
    assert outputs[0] == outputs[1] == outputs[2]
    plain, first, second = (reply["counters"] for reply in replies)
    assert plain["drafts"] == 0
    assert first == second
    assert first["accepted_tokens"] > 20

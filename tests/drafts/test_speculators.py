"""What is written in speculators' layout, loaded by speculators itself: the same logits as ours."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from speculators import SpeculatorModel, SpeculatorModelConfig
from speculators.losses import resolve_loss_config
from speculators.models.peagle import core as peagle_core
from torch import Tensor

from drafts.checkpoint.family import InitOptions
from drafts.files import read_json
from drafts.nn.interface import Draft
from drafts.registry import FAMILIES, read_draft, save_draft
from tests.opened import convert, init_draft, load_draft
from tests.packed import alone
from tests.tiny.models import LAYER_IDS, VOCAB

KEPT = torch.arange(0, VOCAB, 3)
ROWS, STEPS = 24, 3
CASES: dict[str, tuple[str, Tensor | None, dict[str, Any]]] = {
    "eagle3": ("eagle3", KEPT, {}),
    "eagle3-full": ("eagle3", None, {"num_layers": 2, "fc_norm": True, "norm_output": True}),
    "eagle3-qwen3": (
        "eagle3",
        KEPT,
        {"qk_norm": True, "norm_before_fc": True, "norm_before_residual": True, "head_dim": 16},
    ),
    "eagle3-biases": ("eagle3", KEPT, {"qkv_bias": True, "o_bias": True}),
    "peagle": ("peagle", KEPT, {"norm_before_residual": True}),
    "peagle-normed": ("peagle", None, {"fc_norm": True}),
    "dflash": ("dflash", KEPT, {"block_size": STEPS + 1, "num_layers": 2}),
    "dflash-full": ("dflash", None, {"block_size": STEPS + 1}),
    "dspark": ("dspark", KEPT, {"block_size": STEPS, "num_layers": 2}),
    "dspark-confident": ("dspark", KEPT, {"block_size": STEPS, "confidence": 128 + 24}),
    "dspark-full": ("dspark", None, {"block_size": STEPS}),
    "dspark-behind-the-anchor": ("dspark", KEPT, {"block_size": STEPS + 1, "from_anchor": False}),
}


def write_random(folder: Path, target: Path, case: str) -> Path:
    """A draft whose every tensor is random, norms included, in its family's first layout."""
    family, kept, changes = CASES[case]
    start = init_draft(family, target, InitOptions(layer_ids=LAYER_IDS, kept=kept))
    if family == "dspark":
        changes = {**changes, "markov_rank": 24}
    draft = type(start)(replace(start.config, **changes))
    draft.set_vocabulary_map(start.d2t)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in draft.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + noise / 4 if "norm" in name else noise / 8)
    folder.mkdir()
    save_draft(draft, family, folder, dtype=torch.float32)
    return folder


def load_speculators(folder: Path) -> tuple[Any, list[Tensor]]:
    """speculators' own model, and a list that takes the logits of each pass."""
    config = SpeculatorModelConfig.from_pretrained(folder)
    config.transformer_layer_config._attn_implementation = "eager"
    model = SpeculatorModel.from_pretrained(folder, config=config).eval()
    logits: list[Tensor] = []
    model.lm_head.register_forward_hook(lambda module, given, out: logits.append(out.detach()))
    if getattr(model, "markov_head", None) is not None:  # its bias is added to the first
        model.markov_head.markov_w2.register_forward_hook(
            lambda module, given, out: logits.append(
                logits.pop() + out.detach().view(1, -1, out.shape[-1])
            )
        )
    return model, logits


def all_slots(seq_length: int, num_depths: int, **_: Any) -> tuple[Tensor, Tensor]:
    """Every row of every draft step, where speculators' training draws some."""
    depths = torch.arange(num_depths).repeat_interleave(seq_length)
    anchors = torch.arange(seq_length).repeat(num_depths)
    inside = anchors + depths < seq_length
    return anchors[inside], depths[inside]


@torch.no_grad()
def pairs(
    ours: Draft, model: Any, logits: list[Tensor], family: str, features: Tensor, ids: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Our logits and theirs, of each draft step."""
    rows = ROWS - 1
    outputs = ours(features[0], ids[0], STEPS, alone(ROWS))
    drafted = [ours.logits(output, j) for j, output in enumerate(outputs)]
    given: dict[str, Any] = {
        "hidden_states": features[:, :-1],
        "input_ids": ids[:, 1:],
        "document_ids": torch.zeros(1, rows, dtype=torch.long),
        "loss_mask": torch.ones(1, rows),
    }
    if family == "eagle3":
        model(**given, ttt_steps=STEPS)
        for j in range(STEPS):
            yield drafted[j][: rows - j], logits[j][0, : rows - j]
        return
    given["loss_config"] = resolve_loss_config("kl_div", "eager")  # which it computes as well
    given["verifier_last_hidden_states"] = torch.randn(1, rows, model.hidden_size)
    if family == "peagle":
        model(**given, num_depths=STEPS)
        anchors, depths = all_slots(rows, STEPS)
        for j in range(STEPS):
            yield drafted[j][anchors[depths == j]], logits[0][0, depths == j]
        return
    given |= {"hidden_states": features, "input_ids": ids, "loss_mask": torch.ones(1, ROWS)}
    if family == "dspark":
        given["tv_loss_fn"] = resolve_loss_config("tv", "eager")["tv"][0]
    given["document_ids"] = torch.zeros(1, ROWS, dtype=torch.long)
    given["verifier_last_hidden_states"] = torch.randn(1, ROWS, model.hidden_size)
    given["loss_mask"][0, 0] = 0  # nothing is drafted after no token
    anchored = ROWS - 1 - model.block_size  # speculators leaves a block out at the end
    model(**given, max_anchors=anchored)
    found = logits[0][0].unflatten(0, (anchored, model.block_size))
    first = 0 if getattr(ours.config, "from_anchor", False) else 1  # type: ignore[attr-defined]
    for j in range(STEPS):
        yield drafted[j][:anchored], found[:, j + first]


@pytest.mark.parametrize("case", CASES)
def test_speculators_computes_the_same(
    case: str, tiny_target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peagle_core, "generate_cod_sample_indices", all_slots)
    base = write_random(tmp_path / "base", tiny_target, case)
    there = convert(base, "speculators", tmp_path / "there", tiny_target)
    assert there.shared == ()
    ours = load_draft(base, tiny_target)
    model, logits = load_speculators(there.folder)
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(1, ROWS, ours.feature_size, generator=generator)
    ids = torch.randint(VOCAB, (1, ROWS), generator=generator)
    compared = list(pairs(ours, model, logits, there.family, features, ids))
    assert len(compared) == STEPS
    for one, other in compared:
        assert one.shape == other.shape
        assert one.shape[0] > ROWS // 2
        torch.testing.assert_close(other, one, rtol=0, atol=1e-5 * float(one.abs().max()))
    if there.draft_vocab_size < VOCAB:
        assert torch.equal(model.t2d, ours.t2d >= 0)
        assert torch.equal(model.d2t, ours.d2t)
    with torch.no_grad():
        embedding = model.embed_tokens.weight
        assert torch.equal(embedding.float(), ours.get_parameter("embed_tokens.weight"))


@pytest.mark.parametrize("case", ["eagle3-qwen3", "peagle", "dflash", "dspark", "dspark-confident"])
def test_what_speculators_writes_is_read_and_comes_back(
    case: str, tiny_target: Path, tmp_path: Path
) -> None:
    base = write_random(tmp_path / "base", tiny_target, case)
    there = convert(base, "speculators", tmp_path / "there", tiny_target)
    theirs = tmp_path / "theirs"
    load_speculators(there.folder)[0].save_pretrained(theirs)
    read = read_draft(theirs)
    assert (read.family, read.format) == (there.family, "speculators")
    one, two = load_draft(base, tiny_target), load_draft(theirs, tiny_target)
    for name, value in one.state_dict().items():
        assert torch.equal(value.flatten(), two.state_dict()[name].flatten()), name
    first = FAMILIES[read.family].formats[0]
    convert(theirs, first, tmp_path / "first")
    convert(tmp_path / "first", "speculators", tmp_path / "again")
    written = (tmp_path / "again" / "model.safetensors").read_bytes()
    assert written == (theirs / "model.safetensors").read_bytes()
    assert read_json(tmp_path / "again" / "config.json") == read_json(theirs / "config.json")

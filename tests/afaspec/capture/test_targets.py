"""What is stored as `final` is what the output layer takes, for targets of every kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from afaspec.capture.config import CaptureConfig
from afaspec.store.read import FeatureStore
from tests.opened import capture, load_target_head
from tests.tiny.architectures import write_architecture, write_multimodal

TARGETS: dict[str, Callable[[Path, str], Path]] = {
    **dict.fromkeys(("Granite", "Cohere 2", "Gemma 2", "Phi", "GPT-NeoX"), write_architecture),
    **dict.fromkeys(("Qwen3-Next", "Granite hybrid"), write_architecture),
    **dict.fromkeys(("LLaVA", "Qwen2.5-VL"), write_multimodal),
}


@pytest.mark.parametrize("name", TARGETS)
def test_the_stored_states_make_the_answers(name: str, tmp_path: Path) -> None:
    """All but near-ties: states are stored in bfloat16."""
    store = captured(tmp_path, TARGETS[name](tmp_path / "target", name))
    head = load_target_head(tmp_path / "target").float()
    same = total = 0
    for sequence in store:
        said = head(sequence.final[:-1].float()).argmax(-1) == sequence.input_ids[1:]
        same += int(said[sequence.loss_mask[1:]].sum())
        total += int(sequence.loss_mask.sum())
    assert total == 48
    assert same >= total - 2


def test_scores_that_a_target_caps_are_capped(tmp_path: Path) -> None:
    """By transformers' default attention Gemma 2 attends as if it had no cap."""
    target = write_architecture(tmp_path / "target", "Gemma 2", attn_logit_softcapping=0.05)
    ids = captured(tmp_path, target)[0]
    states = {}
    for attention in ("eager", "sdpa"):
        model = AutoModelForCausalLM.from_pretrained(
            target, dtype=torch.float32, attn_implementation=attention
        )
        with torch.no_grad():
            states[attention] = model.eval().model(ids.input_ids.unsqueeze(0)).last_hidden_state[0]
    apart = {name: (ids.final.float() - found).abs().max() for name, found in states.items()}
    assert apart["eager"] < 0.02  # stored in bfloat16
    assert apart["sdpa"] > 10 * apart["eager"]


def captured(folder: Path, target: Path) -> FeatureStore:
    """The target's answers to a few prompts."""
    rows = (f'{{"prompt": "def f{i}(x, y): return x[{i}]"}}\n' for i in range(6))
    (folder / "prompts.jsonl").write_text("".join(rows))
    return capture(
        CaptureConfig(
            target=str(target),
            prompts=str(folder / "prompts.jsonl"),
            out=folder / "store",
            layer_ids="1,2,3",
            max_new_tokens=8,
            batch_size=4,
            dtype="float32",
            device="cpu",
        )
    )

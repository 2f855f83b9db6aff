"""What is stored as `final` is what the output layer takes, for targets of every kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from afaspec.capture.config import CaptureConfig
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
    target = TARGETS[name](tmp_path / "target", name)
    rows = (f'{{"prompt": "def f{i}(x, y): return x[{i}]"}}\n' for i in range(6))
    (tmp_path / "prompts.jsonl").write_text("".join(rows))
    store = capture(
        CaptureConfig(
            target=str(target),
            prompts=str(tmp_path / "prompts.jsonl"),
            out=tmp_path / "store",
            layer_ids="1,2,3",
            max_new_tokens=8,
            batch_size=4,
            dtype="float32",
            device="cpu",
        )
    )
    head = load_target_head(target).float()
    same = total = 0
    for sequence in store:
        said = head(sequence.final[:-1].float()).argmax(-1) == sequence.input_ids[1:]
        same += int(said[sequence.loss_mask[1:]].sum())
        total += int(sequence.loss_mask.sum())
    assert total == 48
    assert same >= total - 2

"""Parity with vLLM: the tokens that vLLM's drafter proposes are those of our module."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from drafts.checkpoint import load_draft
from tests.tiny_models import LAYER_IDS, write_draft

PROMPTS = [[5, 9, 200, 31, 44, 17, 300, 8], [400, 3, 3, 77, 120, 256], list(range(100, 140))]
NEW_TOKENS = 24


def vllm_proposals(target: Path, draft: Path, k: int) -> list[dict[str, Any]]:
    request = {"target": str(target), "draft": str(draft), "k": k}
    request |= {"prompts": PROMPTS, "new_tokens": NEW_TOKENS}
    ran = subprocess.run(
        [sys.executable, "-m", "tests.drafts.vllm_proposals"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = [line for line in ran.stdout.splitlines() if line.startswith("RESULTS ")]
    assert lines, ran.stdout[-2000:] + ran.stderr[-4000:]
    return json.loads(lines[-1].removeprefix("RESULTS "))


def accepted(proposal: list[int], path: list[int]) -> int:
    """How many leading tokens of the proposal are on the target's path."""
    count = 0
    while count < min(len(proposal), len(path)) and proposal[count] == path[count]:
        count += 1
    return count


@pytest.fixture(scope="module")
def reference(tiny_target: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_target, dtype=torch.float32).eval()


@pytest.mark.parametrize(
    ("k", "switches"),
    [
        (1, {}),
        (3, {"norm_before_residual": True}),
        (5, {}),
        (4, {"norm_output": True, "rope_theta": 500000.0}),
    ],
)
def test_vllm_proposes_what_our_module_proposes(
    k: int, switches: dict[str, Any], tmp_path: Path, tiny_target: Path, reference: Any
) -> None:
    draft_folder = write_draft(tmp_path / "draft", **switches)
    results = vllm_proposals(tiny_target, draft_folder, k)
    draft = load_draft(draft_folder, tiny_target).eval()
    compared = 0
    for prompt, result in zip(PROMPTS, results, strict=True):
        path = prompt + result["output"]
        with torch.no_grad():
            states = reference.model(torch.tensor([path]), output_hidden_states=True).hidden_states
        features = torch.cat([states[i][0] for i in LAYER_IDS], dim=-1)
        known = len(prompt) + 1  # the prompt and the token sampled from it
        for proposal in result["proposed"]:
            if known > len(path):
                break
            ours = draft.propose(features[: known - 1], torch.tensor(path[:known]), k)
            assert ours == proposal, f"after {known} tokens"
            compared += 1
            known += accepted(proposal, path[known:]) + 1
    assert compared > 20

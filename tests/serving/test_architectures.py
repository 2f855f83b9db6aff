"""Every family on every architecture, end to end: capture, train, merge, serve in vLLM.

`docs/architectures.md` holds the table that this makes; where a cell cannot work, vLLM says why.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from afaspec.capture.config import CaptureConfig
from afaspec.store.read import FeatureStore
from afaspec.train.config import TrainConfig
from bench.stats.offline import offline_acceptance
from drafts.checkpoint.family import InitOptions
from drafts.registry import FAMILIES, save_draft
from tests.drafts.families.test_vllm_parity import accepted
from tests.opened import capture, init_draft, load_draft, merge, train
from tests.tiny.architectures import write_architecture
from tests.vllm_client import VllmWorker

K = 3
NEW_TOKENS = 20
SERVED = 10  # of the prompts
NO_STATES = (
    "RuntimeError: Model does not support EAGLE3 interface "
    "but aux_hidden_state_outputs was requested"
)
REFUSED = {  # (architecture, family): how vLLM refuses it
    (architecture, family): NO_STATES
    for architecture in ("Gemma 3", "Mixtral")
    for family in ("eagle3", "peagle", "dflash")
}
# An MTP layer is its own target's, and vLLM serves DSpark on GPUs alone.
FOR_ANY = [name for name in FAMILIES if name not in ("mtp", "dspark")]
ARCHITECTURES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Phi-3", "Gemma 3", "Qwen3-MoE", "Mixtral")


def table() -> str:
    """The matrix as Markdown, with footnotes for what vLLM refuses."""
    titles = [FAMILIES[name].title for name in FOR_ANY]
    lines = ["| target | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    for architecture in ARCHITECTURES:
        cells = ["no [1]" if (architecture, name) in REFUSED else "yes" for name in FOR_ANY]
        lines.append(f"| {architecture} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"[1] vLLM 0.32.0: `{NO_STATES}`"])


def test_the_documented_table_is_the_tested_one() -> None:
    assert table() in (Path(__file__).parents[2] / "docs" / "architectures.md").read_text()


def captured(folder: Path, target: Path) -> FeatureStore:
    """The target's answers to a few prompts, with the states that any family may read."""
    rows = folder / "prompts.jsonl"
    texts = (f'{{"prompt": "def f{i}(x, y): return x[{i}]"}}\n' for i in range(16))
    rows.write_text("".join(texts))
    return capture(
        CaptureConfig(
            target=str(target),
            prompts=str(rows),
            out=folder / "store",
            layer_ids="1,2,3",
            max_new_tokens=NEW_TOKENS,
            batch_size=8,
            dtype="float32",
            device="cpu",
        )
    )


def adapted(folder: Path, family: str, target: Path, store: FeatureStore) -> Path:
    """A fresh draft of the family, trained for a moment on the store, and merged."""
    base = folder / f"{family}-base"
    base.mkdir()
    save_draft(init_draft(family, target, InitOptions(max_k=K)), family, base, dtype=torch.float32)
    run = train(
        TrainConfig(
            store=store.folder,
            draft=base,
            out=folder / f"{family}-run",
            target=target,
            arm="full",
            learning_rate=3e-3,
            steps=80,
            draft_steps=K,
            precision="fp32",
            compiled=False,
            tensorboard=False,
            eval_every=80,
        )
    )
    merge(run.folder, base, folder / family, target)
    return folder / family


def acceptance_length(
    prompts: list[list[int]], answers: list[list[int]], runs: list[dict[str, Any]]
) -> float:
    """vLLM's own, without the blocks that reach beyond an answer: offline acceptance has none."""
    drafts = taken = 0
    for prompt, answer, run in zip(prompts, answers, runs, strict=True):
        path, known = prompt + answer, len(prompt) + 1
        for proposal in run["proposed"]:
            if known + K > len(path):
                break
            count = accepted(proposal, path[known:])
            drafts, taken, known = drafts + 1, taken + count, known + count + 1
    return 1 + taken / drafts


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_family_end_to_end(
    architecture: str, tmp_path: Path, vllm_worker: VllmWorker
) -> None:
    target = write_architecture(tmp_path / "target", architecture)
    store = captured(tmp_path, target)
    sequences = [store[i] for i in range(SERVED)]
    prompts = [s.input_ids[~s.loss_mask].tolist() for s in sequences]
    answers = [s.input_ids[s.loss_mask].tolist() for s in sequences]
    for family in FOR_ANY:
        folder = adapted(tmp_path, family, target, store)
        result = vllm_worker.serve(target, folder, K, prompts, NEW_TOKENS)
        if (architecture, family) in REFUSED:
            assert result.get("error") == REFUSED[architecture, family], family
            continue
        assert "error" not in result, (family, result["error"])
        for run, answer in zip(result["runs"], answers, strict=True):  # vLLM goes on past an end
            assert run["output"][: len(answer)] == answer, family
        measured = acceptance_length(prompts, answers, result["runs"])
        draft = load_draft(folder, target).eval()
        offline = offline_acceptance(draft, sequences, K, amp=False).acceptance_length
        assert measured > 1.3, family
        assert measured == pytest.approx(offline, rel=0.05), family

"""Parity with vLLM: the tokens that vLLM's drafters propose are those of our modules.

Each draft is fitted to what the tiny target says after some of the prompts, so that proposals are
accepted, rejected and accepted in part. Compared is every token of every proposal, at float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from afaspec.train.objective import Batch, DraftObjective
from drafts.checkpoint.family import InitOptions
from drafts.families.dflash.module import DFlashDraft
from drafts.families.eagle3.layouts import SWITCHES
from drafts.families.eagle3.module import Eagle3Draft
from drafts.nn.interface import Draft
from drafts.registry import read_draft, save_draft, wanted_layer_ids
from drafts.target.info import read_target
from tests.drafts.families.test_lm import write_lm
from tests.drafts.families.test_pard import write_pard
from tests.opened import convert, init_draft, load_draft, load_target_head, take_from_target
from tests.tiny.architectures import write_architecture
from tests.tiny.models import write_draft
from tests.vllm_client import VllmWorker

PROMPTS = [[5, 9, 200, 31, 44, 17, 300, 8], [400, 3, 3, 77, 120, 256], list(range(100, 140))]
FITTED = 2  # prompts whose continuations the drafts are fitted to
NEW_TOKENS = 24
EVERY_K = (1, 2, 3, 4, 5)
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,  # so few that the tests' positions reach beyond
}
Case = tuple[Callable[[Path, Path], Path], tuple[int, ...]]  # (folder, target) -> draft; ks


def fresh(family: str, **options: Any) -> Callable[[Path, Path], Path]:
    """A maker of fresh drafts of a family."""

    def make(folder: Path, target: Path) -> Path:
        folder.mkdir()
        draft = init_draft(family, target, InitOptions(max_k=max(EVERY_K), **options))
        save_draft(draft, family, folder, dtype=torch.float32)
        return folder

    return make


def switched(
    family: str, num_layers: int | None = None, **switches: Any
) -> Callable[[Path, Path], Path]:
    """A maker of fresh drafts with switches of their config; tensors that these add are random."""

    def make(folder: Path, target: Path) -> Path:
        folder.mkdir()
        options = InitOptions(max_k=max(EVERY_K), num_layers=num_layers)
        plain: Any = init_draft(family, target, options)
        draft = type(plain)(replace(plain.config, **switches))
        for name, parameter in draft.named_parameters():
            norm, wide = "norm" in name, name.endswith("bias")
            torch.nn.init.normal_(parameter, float(norm), 0.3 if norm or wide else 0.02)
        draft.load_state_dict(plain.state_dict(), strict=False)
        take_from_target(draft, target, None)
        save_draft(draft, family, folder, dtype=torch.float32)
        return folder

    return make


def eagle3(**switches: Any) -> Callable[[Path, Path], Path]:
    """A maker of EAGLE-3 drafts with switches of its config, and a reduced vocabulary."""
    return lambda folder, target: write_draft(folder, **switches)


def eagle3_narrow(folder: Path, target: Path) -> Path:
    """An EAGLE-3 draft half as wide as the target, so with an embedding of its own."""
    folder.mkdir()
    plain = init_draft("eagle3", target)
    size = plain.config.hidden_size // 2
    torch.manual_seed(0)
    draft = Eagle3Draft(
        replace(plain.config, hidden_size=size, num_attention_heads=2, num_key_value_heads=2)
    )
    save_draft(draft, "eagle3", folder, dtype=torch.float32)
    return folder


def eagle3_qwen3(folder: Path, target: Path) -> Path:
    """A fresh EAGLE-3 draft with Qwen3's layers, which norm queries and keys."""
    folder.mkdir()
    plain = init_draft("eagle3", target)
    draft = Eagle3Draft(replace(plain.config, qk_norm=True))
    draft.load_state_dict(plain.state_dict(), strict=False)
    save_draft(draft, "eagle3", folder, dtype=torch.float32)
    return folder


def lm(architecture: str, **changes: Any) -> Callable[[Path, Path], Path]:
    """A maker of causal language models of an architecture."""
    return lambda folder, target: write_lm(folder, architecture, **changes)


def pard(architecture: str, **changes: Any) -> Callable[[Path, Path], Path]:
    """A maker of PARD drafts of an architecture."""
    return lambda folder, target: write_pard(folder, architecture, **changes)


def dflash(num_layers: int, **switches: Any) -> Callable[[Path, Path], Path]:
    """A maker of DFlash drafts with switches of their config.

    Their layers all have one and the same k_norm, which `fit` keeps.

    vLLM's CPU build norms the context keys of every layer with the first layer's.
    """

    def make(folder: Path, target: Path) -> Path:
        folder.mkdir()
        plain: Any = init_draft("dflash", target, InitOptions(max_k=5, num_layers=num_layers))
        draft = DFlashDraft(replace(plain.config, **switches))
        fill_biases(draft)
        draft.load_state_dict(plain.state_dict(), strict=False)
        scales = torch.linspace(0.5, 1.5, draft.config.head_dim)
        for layer in draft.layers:
            layer.self_attn.k_norm.weight.data.copy_(scales)
        save_draft(draft, "dflash", folder, dtype=torch.float32)
        return folder

    return make


def fill_biases(draft: Draft) -> None:
    for name, parameter in draft.named_parameters():
        if name.endswith("bias"):  # a sink's has to outweigh scores to be seen
            torch.nn.init.normal_(parameter, std=2.0 if "sink" in name else 0.3)


BIASES = {"qkv_bias": True, "o_bias": True, "mlp_bias": True}
QWEN3 = {"qk_norm": True, "qkv_bias": True}  # the biases that vLLM gives these layers
W = 7  # a window that all prompts but one, and all answers, are longer than
CASES: dict[str, Case] = {
    "eagle3": (fresh("eagle3"), (1, 5)),
    "eagle3, sliding, biases": (switched("eagle3", windows=(W,), **BIASES), EVERY_K),
    "eagle3, two sliding layers": (switched("eagle3", 2, windows=(W, W)), (3,)),
    "eagle3, a window shorter than its steps": (switched("eagle3", windows=(4,)), (5,)),
    "eagle3, Qwen3's layers, sliding, biases": (switched("eagle3", windows=(W,), **QWEN3), (4,)),
    "eagle3, half rotary": (
        eagle3(rope_scaling={"type": "linear", "factor": 2.0}, partial_rotary_factor=0.5),
        (3,),
    ),
    "eagle3, two layers": (fresh("eagle3", num_layers=2), (1, 3)),
    "eagle3, norm_before_residual": (eagle3(norm_before_residual=True), (3,)),
    "eagle3, norm_output": (eagle3(norm_output=True, rope_theta=500000.0), (4,)),
    "eagle3, norm_before_fc": (switched("eagle3", norm_before_fc=True), (3,)),
    "eagle3, fc_norm": (switched("eagle3", fc_norm=True), (3,)),
    "eagle3, all switches": (switched("eagle3", **dict.fromkeys(SWITCHES, True)), (4,)),
    "eagle3, llama3 rope": (eagle3(rope_parameters=LLAMA3_ROPE, rope_theta=500000.0), (3,)),
    "eagle3, narrower than its target": (eagle3_narrow, (1, 3)),
    "eagle3, Qwen3's layers": (eagle3_qwen3, (3,)),
    "peagle": (fresh("peagle"), (1, 5)),
    "peagle, sliding, biases": (switched("peagle", 2, windows=(W, W), **BIASES), EVERY_K),
    "dflash": (dflash(1), (1, 5)),
    "dflash, sliding, biases": (
        dflash(1, windows=(W,), qkv_bias=True, o_bias=True),
        EVERY_K,
    ),
    "dflash, two layers": (dflash(2), (3, 5)),
    "dflash, causal": (dflash(1, causal=(True,)), (3,)),
    "dflash, causal and sliding": (dflash(2, causal=(True, True), windows=(W, W)), (4,)),
    "dflash, sinks": (dflash(2, sinks=True), EVERY_K),
    "dflash, sliding, sinks, scaled values": (
        dflash(1, windows=(W,), sinks=True, value_scale=0.7),
        (4,),
    ),
    "eagle": (fresh("eagle"), (1, 5)),
    "eagle, biases": (switched("eagle", logit_scale=0.5, **BIASES), EVERY_K),
    "eagle, biases of queries, keys and values": (switched("eagle", qkv_bias=True), (3,)),
    "eagle, three layers": (fresh("eagle", num_layers=3), (1, 3)),
    "medusa": (fresh("medusa"), EVERY_K),
    "medusa, two layers": (fresh("medusa", num_layers=2), (5,)),
    "medusa, biases": (switched("medusa", bias=True, logit_scale=0.5), (4,)),
    "medusa, shared output layer": (switched("medusa", shared_head=True), (3,)),
    "draft_model": (fresh("draft_model"), EVERY_K),
    "draft_model, Qwen3 with tied embedding": (lm("qwen3, tied"), (3,)),
    "draft_model, Gemma 2 with full and sliding attention": (lm("gemma2, softcap"), (3,)),
    "draft_model, a Mistral whose window vLLM leaves out": (lm("mistral", sliding_window=W), (3,)),
    "draft_model, Gemma 2 whose scores are capped": (
        lm("gemma2, softcap", attn_logit_softcapping=0.1),
        (3,),
    ),
    "pard": (fresh("pard"), EVERY_K),
    "pard, Qwen3 with tied embedding": (pard("qwen3, tied"), (4,)),
    "pard, a Mistral whose window vLLM leaves out": (pard("mistral", sliding_window=W), (3,)),
}
# Of a target whose layers all slide, vLLM gives the window to the draft's layers too.
SLIDING_TARGET: dict[str, Case] = {
    "eagle3": (fresh("eagle3"), (3,)),
    "eagle3, a window of its own": (switched("eagle3", windows=(4,)), (3,)),
    "eagle": (fresh("eagle", num_layers=2), (3,)),
    "peagle": (fresh("peagle"), (3,)),
    "dflash": (dflash(1), (3,)),
    "draft_model": (lm("mistral", sliding_window=None), (3,)),
    "pard": (pard("mistral", sliding_window=None), (3,)),
}


def vllm_runs(worker: VllmWorker, target: Path, draft: Path, k: int) -> list[dict[str, Any]]:
    reply = worker.serve(target, draft, k, PROMPTS, NEW_TOKENS)
    assert "error" not in reply, reply["error"]
    runs: list[dict[str, Any]] = reply["runs"]
    return runs


class Reference:
    """The tiny target in float32: its greedy continuations, and the states that drafts read."""

    def __init__(self, folder: Path):
        from transformers import AutoModelForCausalLM

        self.folder = folder
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def path(self, prompt: list[int]) -> list[int]:
        path = list(prompt)
        for _ in range(NEW_TOKENS):
            path.append(int(self.model(torch.tensor([path])).logits[0, -1].argmax()))
        return path

    @torch.no_grad()
    def states(self, path: list[int], layer_ids: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Hidden states after the layers [n, L*d], and the final one [n, d]."""
        output = self.model.model(torch.tensor([path]), output_hidden_states=True)
        final = output.last_hidden_state[0]
        chosen = [output.hidden_states[i][0] for i in layer_ids]
        return torch.cat(chosen, dim=-1) if chosen else final[:, :0], final


def fit(draft: Draft, reference: Reference, layer_ids: tuple[int, ...], steps: int) -> None:
    """Train `draft` on the target's continuations for a moment, all but what is shared."""
    batches = []
    for prompt in PROMPTS[:FITTED]:
        path = reference.path(prompt)
        hidden, final = reference.states(path, layer_ids)
        mask = torch.arange(len(path)) >= len(prompt)
        batches.append(Batch(torch.tensor(path), mask, hidden, final, [len(path)]))
    head = load_target_head(reference.folder).float()
    objective = DraftObjective(
        draft, head, loss="kl", draft_steps=steps, step_decay=1.0, chunk=999, compiled=False
    )
    kept = ["k_norm"] if isinstance(draft, DFlashDraft) else []
    for name, parameter in draft.named_parameters():
        parameter.requires_grad_({"embed_tokens", "lm_head", *kept}.isdisjoint(name.split(".")))
    trained = [p for p in draft.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3, weight_decay=0.0)
    for i in range(40):
        objective(batches[i % FITTED]).backward()
        optimizer.step()
        optimizer.zero_grad()


def accepted(proposal: list[int], path: list[int]) -> int:
    """How many leading tokens of the proposal are on the target's path."""
    count = 0
    while count < min(len(proposal), len(path)) and proposal[count] == path[count]:
        count += 1
    return count


def check_parity(
    case: Case, folder: Path, target: Path, reference: Reference, worker: VllmWorker
) -> None:
    """Every token of every proposal is ours, for a draft fitted to the target."""
    make, ks = case
    base = make(folder / "base", target)
    info = read_draft(base)
    layer_ids = wanted_layer_ids(info, read_target(target))
    draft = load_draft(base, target)
    fit(draft, reference, layer_ids, max(ks))
    fitted = folder / "fitted"
    fitted.mkdir()
    save_draft(draft, info.family, fitted, dtype=torch.float32)
    draft = load_draft(fitted, target).eval()

    taken = refused = 0
    for k in ks:
        runs = vllm_runs(worker, target, fitted, k)
        for prompt, run in zip(PROMPTS, runs, strict=True):
            path = prompt + run["output"]
            features = draft.features(*reference.states(path, layer_ids))
            known = len(prompt) + 1  # the prompt and the token sampled from it
            for proposal in run["proposed"]:
                if known > len(path):
                    break
                ours = draft.propose(features[: known - 1], torch.tensor(path[:known]), k)
                assert ours == proposal, f"k = {k}, after {known} tokens"
                count = accepted(proposal, path[known:])
                taken, refused = taken + count, refused + (count < k)
                known += count + 1
    assert taken > 20, "the case accepts too little to say much"
    assert refused > 20, "the case rejects too little to say much"


@pytest.fixture(scope="module")
def reference(tiny_target: Path) -> Reference:
    return Reference(tiny_target)


@pytest.mark.parametrize("name", CASES)
def test_vllm_proposes_what_our_module_proposes(
    name: str, tmp_path: Path, tiny_target: Path, reference: Reference, vllm_worker: VllmWorker
) -> None:
    check_parity(CASES[name], tmp_path, tiny_target, reference, vllm_worker)


@pytest.fixture(scope="module")
def sliding_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "sliding-target"
    return write_architecture(folder, "Mistral", sliding_window=W)


@pytest.fixture(scope="module")
def sliding_reference(sliding_target: Path) -> Reference:
    return Reference(sliding_target)


@pytest.mark.parametrize("name", SLIDING_TARGET)
def test_vllm_gives_a_draft_its_targets_window(
    name: str,
    tmp_path: Path,
    sliding_target: Path,
    sliding_reference: Reference,
    vllm_worker: VllmWorker,
) -> None:
    case = SLIDING_TARGET[name]
    check_parity(case, tmp_path, sliding_target, sliding_reference, vllm_worker)


@pytest.mark.parametrize("name", ["peagle", "dflash"])
def test_vllm_proposes_the_same_from_both_layouts(
    name: str, tmp_path: Path, tiny_target: Path, vllm_worker: VllmWorker
) -> None:
    base = CASES[name][0](tmp_path / "base", tiny_target)
    other = convert(base, "speculators", tmp_path / "speculators", tiny_target).folder
    first, second = (vllm_runs(vllm_worker, tiny_target, folder, 3) for folder in (base, other))
    assert first == second
    assert len({tuple(p) for run in first for p in run["proposed"]}) > 5

"""MTP layers: read out of a target, drafting as vLLM's and transformers' do, and written back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from afaspec.capture.config import CaptureConfig
from afaspec.train.config import TrainConfig
from bench.stats.offline import offline_acceptance
from drafts.errors import UserError
from drafts.nn.packing import Packing
from drafts.registry import read_draft, save_draft
from tests.drafts.families.test_vllm_parity import Reference, check_parity
from tests.opened import (
    capture,
    init_draft,
    inspect_draft,
    load_draft,
    load_embedding,
    merge,
    require_compatible,
    train,
)
from tests.serving.test_architectures import acceptance_length
from tests.tiny.models import HIDDEN, VOCAB
from tests.tiny.mtp import KINDS, LAYERS, write_mtp_target
from tests.vllm_client import VllmWorker

SERVED = ("GLM-4.5", "Qwen3-Next")  # that vLLM serves on a CPU in float32, and without torchvision
K = 3


def write_mtp(folder: Path, target: Path) -> Path:
    """The target's own layer as a draft."""
    folder.mkdir()
    save_draft(init_draft("mtp", target), "mtp", folder, dtype=torch.float32)
    return folder


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mtp_target(tmp_path_factory.mktemp("models") / "target", "GLM-4.5")


@pytest.mark.parametrize("kind", SERVED)
def test_vllm_proposes_what_our_module_proposes(
    kind: str, tmp_path: Path, vllm_worker: VllmWorker
) -> None:
    target = write_mtp_target(tmp_path / "target", kind)
    case = (write_mtp, (1, 2, 3, 4, 5))
    check_parity(case, tmp_path, target, Reference(target), vllm_worker)


class ByHand:
    """A layer of the checkpoint, computed step by step by transformers' own attention and cache.

    Knows nothing of our module: it is filled from the target's tensors by their stored names.
    """

    def __init__(self, folder: Path, kind: str):
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model, self.behind = model.eval(), not kind.startswith("Qwen")
        stored = load_file(folder / "model.safetensors")
        prefix = f"model.layers.{LAYERS}." if self.behind else "mtp."
        own = {n.removeprefix(prefix): t for n, t in stored.items() if n.startswith(prefix)}
        last = model.model.layers[LAYERS - 1]
        layers = {n.removeprefix("layers.0."): t for n, t in own.items()}
        experts = [n for n in layers if ".experts." in n and "gate_up_proj" not in n]
        for name in {n.split(".experts.")[0] for n in experts}:  # as transformers joins them
            number = len({n.split(".experts.")[1].split(".")[0] for n in experts})
            each = [f"{name}.experts.{i}" for i in range(number)]
            parts = {
                part: torch.stack([layers[f"{one}.{part}_proj.weight"] for one in each])
                for part in ("gate", "up", "down")
            }
            layers[f"{name}.experts.gate_up_proj"] = torch.cat([parts["gate"], parts["up"]], 1)
            layers[f"{name}.experts.down_proj"] = parts["down"]
        wanted = last.state_dict()
        last.load_state_dict({n: layers[n] for n in wanted})
        self.layer, self.norms = last, {}
        names = ("enorm", "hnorm", "shared_head.norm") if self.behind else (
            "pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"
        )  # fmt: skip
        for place, name in zip(("embedding", "hidden", "out"), names, strict=True):
            norm = type(last.input_layernorm)(HIDDEN, eps=model.config.rms_norm_eps)
            norm.load_state_dict({"weight": own[f"{name}.weight"]})
            self.norms[place] = norm
        self.joins = own["eh_proj.weight" if self.behind else "fc.weight"]
        self.fed_normed = kind != "GLM-4.5"

    @torch.no_grad()
    def propose(self, features: torch.Tensor, ids: list[int], k: int) -> list[int]:
        """One token after another, as a server drafts them."""
        from transformers import DynamicCache

        cache, tokens, hidden, drafted = DynamicCache(), ids[1:], features, []
        place = 0
        for _ in range(k):
            embeds = self.model.model.embed_tokens(torch.tensor(tokens))
            if self.behind and place == 0:
                embeds[0] = 0.0
            joined = [self.norms["embedding"](embeds), self.norms["hidden"](hidden)]
            x = (torch.cat(joined, -1) @ self.joins.T).unsqueeze(0)
            at = torch.arange(place, place + len(tokens)).unsqueeze(0)
            mask = None  # causal by itself where several tokens come, all where one does
            out = self.layer(
                x,
                position_embeddings=self.model.model.rotary_emb(x, at),
                attention_mask=mask,
                past_key_values=cache,
            )[0]
            normed = self.norms["out"](out)
            drafted.append(int(self.model.lm_head(normed[-1]).argmax()))
            hidden = (normed if self.fed_normed else out)[-1:]
            place, tokens = place + len(tokens), drafted[-1:]
        return drafted


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_layer_with_its_own_cache_drafts_alike(kind: str, tmp_path: Path) -> None:
    folder = write_mtp_target(tmp_path / "target", kind)
    draft, by_hand = load_draft(write_mtp(tmp_path / "own", folder), folder).eval(), None
    by_hand = ByHand(folder, kind)
    torch.manual_seed(1)
    features, ids = torch.randn(14, HIDDEN), torch.randint(VOCAB, (15,))
    said = set()
    for known in (2, 5, 15):
        expected = by_hand.propose(features[: known - 1], ids[:known].tolist(), 5)
        assert draft.propose(features[: known - 1], ids[:known], 5) == expected
        said |= set(expected)
    assert len(said) > 8, "it says the same whatever it sees"


@pytest.mark.parametrize("kind", KINDS)
def test_rows_at_once_are_what_the_server_drafts(kind: str, tmp_path: Path) -> None:
    """Rows are compared as long as what they drafted is what the text goes on with."""
    folder = write_mtp_target(tmp_path / "target", kind)
    draft = load_draft(write_mtp(tmp_path / "own", folder), folder).eval()
    torch.manual_seed(1)
    features, text = torch.randn(20, HIDDEN), torch.randint(VOCAB, (8,)).tolist()
    text += draft.propose(features[:7], torch.tensor(text), 12)
    ids = torch.tensor(text)
    with torch.no_grad():
        outputs = draft(features, ids, 5, Packing.of([20], torch.tensor([3, 6, 11])))
    assert [draft.best(outputs[j][1:2], j) for j in range(5)] == text[8:13]
    for row, place in ((3, 0), (11, 2)):
        (first,) = draft.propose(features[: row + 1], ids[: row + 2], 1)
        assert draft.best(outputs[0][place : place + 1], 0) == first


def test_the_folder_holds_the_targets_tensors_and_no_others(target: Path, tmp_path: Path) -> None:
    folder = write_mtp(tmp_path / "own", target)
    found, whole = load_file(folder / "model.safetensors"), load_file(target / "model.safetensors")
    assert found.keys() == {name for name in whole if name.startswith(f"model.layers.{LAYERS}.")}
    assert all(torch.equal(tensor, whole[name]) for name, tensor in found.items())
    assert json.loads((folder / "config.json").read_text()) == json.loads(
        (target / "config.json").read_text()
    )
    shown = inspect_draft(folder, target)
    assert (shown.fits, shown.family) == (True, "mtp")
    assert shown.speculative_config["method"] == "mtp"
    draft = load_draft(folder, target)
    assert torch.equal(draft.embed_tokens.weight, load_embedding(target))  # type: ignore[attr-defined]


def test_experts_stored_as_two_tensors_stay_so(tmp_path: Path) -> None:
    """As newer conversions store them; the module computes the same."""
    target = write_mtp_target(tmp_path / "target", "Qwen3.5-MoE")
    apart = load_draft(write_mtp(tmp_path / "apart", target), target).eval()
    stored = load_file(target / "model.safetensors")
    prefix = "mtp.layers.0.mlp.experts"
    each = sorted({int(n.split(".")[5]) for n in stored if n.startswith(f"{prefix}.")})
    parts = {
        part: torch.stack([stored.pop(f"{prefix}.{i}.{part}_proj.weight") for i in each])
        for part in ("gate", "up", "down")
    }
    stored[f"{prefix}.gate_up_proj"] = torch.cat([parts["gate"], parts["up"]], dim=1)
    stored[f"{prefix}.down_proj"] = parts["down"]
    save_file(stored, target / "model.safetensors", metadata={"format": "pt"})
    folder = write_mtp(tmp_path / "joined", target)
    assert f"{prefix}.gate_up_proj" in load_file(folder / "model.safetensors")
    joined = load_draft(folder, target).eval()
    torch.manual_seed(1)
    features, ids = torch.randn(9, HIDDEN), torch.randint(VOCAB, (10,))
    assert joined.propose(features, ids, 4) == apart.propose(features, ids, 4)


def edited(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    raw = json.loads((folder / "config.json").read_text())
    change(raw)
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def test_a_whole_model_that_brings_such_a_layer_may_be_a_draft_model(tmp_path: Path) -> None:
    """Small models of these families are drafts for larger ones."""
    whole = write_mtp_target(tmp_path / "small", "Qwen3.5")
    assert read_draft(whole).family == "draft_model"
    assert read_draft(write_mtp(tmp_path / "own", whole)).family == "mtp"


def test_what_is_no_single_layer_is_refused(target: Path, tmp_path: Path) -> None:
    folder = write_mtp(tmp_path / "own", target)
    edited(folder, lambda raw: raw.update(num_nextn_predict_layers=3))
    with pytest.raises(UserError, match="has 3 MTP layers"):
        read_draft(folder)
    edited(folder, lambda raw: raw.update(num_nextn_predict_layers=1, n_routed_experts=8))
    with pytest.raises(UserError, match=r"is \[4\], the config says \[8\]"):
        read_draft(folder)


def test_a_rope_that_vllm_does_not_hear_of_is_refused(tmp_path: Path) -> None:
    folder = write_mtp_target(tmp_path / "target", "DeepSeek-V3")
    edited(folder, lambda raw: raw.update(rope_interleave=False))
    with pytest.raises(UserError, match="rope_interleave false"):
        init_draft("mtp", folder)


def test_another_architectures_layer_does_not_fit(target: Path, tmp_path: Path) -> None:
    other = write_mtp_target(tmp_path / "other", "DeepSeek-V3")
    folder = write_mtp(tmp_path / "own", other)
    require_compatible(other, folder)
    with pytest.raises(UserError, match="layer: the target has glm4_moe, the draft deepseek_v3"):
        require_compatible(target, folder)


def test_a_target_without_such_a_layer_is_refused(
    tiny_target: Path, target: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="is of a llama, of which afaspec knows no MTP layer"):
        init_draft("mtp", tiny_target)
    stored = load_file(target / "model.safetensors")
    bare = tmp_path / "bare"
    bare.mkdir()
    kept = {n: t for n, t in stored.items() if not n.startswith(f"model.layers.{LAYERS}.")}
    save_file(kept, bare / "model.safetensors", metadata={"format": "pt"})
    (bare / "config.json").write_bytes((target / "config.json").read_bytes())
    with pytest.raises(UserError, match="its tensors have none"):
        init_draft("mtp", bare)


@pytest.mark.parametrize("arm", ["afa-lora", "full"])
def test_it_adapts_merges_and_serves(
    arm: Any, target: Path, tmp_path: Path, vllm_worker: VllmWorker
) -> None:
    """Acceptance offline is vLLM's, and all that did not train is as it was."""
    rows = (f'{{"prompt": "def f{i}(x, y): return x[{i}]"}}\n' for i in range(16))
    (tmp_path / "prompts.jsonl").write_text("".join(rows))
    base = write_mtp(tmp_path / "base", target)
    store = capture(
        CaptureConfig(
            target=str(target),
            prompts=str(tmp_path / "prompts.jsonl"),
            draft=str(base),
            out=tmp_path / "store",
            max_new_tokens=20,
            batch_size=8,
            dtype="float32",
            device="cpu",
        )
    )
    run = train(
        TrainConfig(
            store=store.folder,
            draft=base,
            out=tmp_path / "run",
            target=target,
            arm=arm,
            learning_rate=3e-3 if arm == "full" else 1e-2,
            steps=60,
            draft_steps=K,
            precision="fp32",
            compiled=False,
            tensorboard=False,
            eval_every=60,
        )
    )
    merged = tmp_path / "merged"
    merge(run.folder, base, merged, target)
    require_compatible(target, merged)
    before, after = load_file(base / "model.safetensors"), load_file(merged / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    if arm == "full":
        assert any(".experts." in name for name in changed)
    else:
        parts = {name.removeprefix(f"model.layers.{LAYERS}.") for name in changed}
        attention = {f"self_attn.{one}_proj.weight" for one in "qkvo"}
        shared = {f"mlp.shared_experts.{one}_proj.weight" for one in ("gate", "up", "down")}
        assert parts == {"eh_proj.weight", *attention, *shared}

    sequences = [store[i] for i in range(10)]
    prompts = [s.input_ids[~s.loss_mask].tolist() for s in sequences]
    answers = [s.input_ids[s.loss_mask].tolist() for s in sequences]
    served = vllm_worker.serve(target, merged, K, prompts, 20)
    assert "error" not in served, served
    measured = acceptance_length(prompts, answers, served["runs"])
    draft = load_draft(merged, target).eval()
    offline = offline_acceptance(draft, sequences, K, amp=False).acceptance_length
    assert measured > 1.3
    assert measured == pytest.approx(offline, rel=0.02)

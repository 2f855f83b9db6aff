"""Draft models: any causal LM of the target's vocabulary, trained and written back as it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from afaspec.checkpoints.merge import load_result
from afaspec.store.read import Sequence
from afaspec.train.config import TrainConfig
from bench.stats.offline import match_matrix
from drafts.checkpoint.family import InitOptions
from drafts.errors import UserError
from drafts.families.lm.module import LmDraft
from drafts.nn.packing import Packing
from drafts.registry import module_names, read_draft, save_draft
from drafts.tokenizer_files import copy_tokenizer
from tests.opened import (
    compare,
    engine_options,
    init_draft,
    load_draft,
    merge,
    require_compatible,
    speculative_config,
    train,
    write_like,
)
from tests.packed import alone
from tests.tiny.architectures import write_architecture
from tests.tiny.models import POSITIONS, VOCAB, write_draft, write_target, write_tokenizer
from tests.tiny.store import write_store

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,  # the least that vLLM has attention for on CPU
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": False}),
    "qwen3, tied": ("qwen3", {"tie_word_embeddings": True}),
    "gemma2, softcap": ("gemma2", {"final_logit_softcapping": 5.0, "sliding_window": 8}),
    "granite, scaled": ("granite", {"logits_scaling": 8.0, "embedding_multiplier": 2.0}),
    "cohere, scaled": ("cohere", {"logit_scale": 0.25}),
    "qwen3_moe": ("qwen3_moe", EXPERTS),
    "mistral": ("mistral", {}),
}


def write_lm(folder: Path, name: str = "llama", **changes: Any) -> Path:
    """A random causal LM of the architecture, in bf16, with the tiny target's tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, settings = ARCHITECTURES[name]
    config = AutoConfig.for_model(kind, **(SIZES | settings | changes))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    write_tokenizer(folder, config.vocab_size)
    return folder


def hf_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits: torch.Tensor = model(ids).logits
    return logits


@pytest.fixture(scope="module")
def sequence() -> torch.Tensor:
    return torch.randint(VOCAB, (24,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_row_is_what_transformers_says_next(
    name: str, tmp_path: Path, sequence: torch.Tensor
) -> None:
    folder = write_lm(tmp_path / "lm", name)
    draft = load_draft(folder).eval()
    expected = hf_logits(folder, sequence.unsqueeze(0))[0]
    first, steps = 5, 4
    with torch.no_grad():
        outputs = draft(torch.empty(24, 0), sequence, steps, alone(24, first))
        for j, output in enumerate(outputs):
            assert output.shape == (24 - 1 - first, 64)
            known = 24 - 1 - first - j  # rows whose inputs lie inside the sequence
            found = draft.logits(output, j)[:known]
            torch.testing.assert_close(found, expected[first + 1 + j :], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma2, softcap", "qwen3_moe"])
def test_rows_at_once_are_what_the_server_drafts(
    name: str, tmp_path: Path, sequence: torch.Tensor
) -> None:
    """Each row is compared where all drafts before it are the sequence's own tokens."""
    draft = load_draft(write_lm(tmp_path / "lm", name)).eval()
    start, k = 8, 4
    path = sequence[:start].tolist()
    path += draft.propose(torch.empty(start - 1, 0), sequence[:start], 12)
    ids = torch.tensor(path)
    with torch.no_grad():
        outputs = draft(torch.empty(len(ids), 0), ids, k, alone(len(ids)))
    for row in range(start - 2, len(ids) - k - 1):
        proposed = draft.propose(torch.empty(row + 1, 0), ids[: row + 2], k)
        assert proposed == [draft.best(outputs[j][row : row + 1], j) for j in range(k)]
        assert proposed == path[row + 2 : row + 2 + k]


def test_description(tmp_path: Path) -> None:
    info = read_draft(write_lm(tmp_path / "lm", "qwen3, tied"))
    assert (info.family, info.method, info.format) == ("draft_model", "draft_model", "transformers")
    assert (info.hidden_size, info.vocab_size, info.draft_vocab_size) == (64, VOCAB, VOCAB)
    assert (info.layer_ids, info.shared, info.reads) == ((), (), "nothing")
    assert (info.max_positions, info.dtype) == (POSITIONS, "bfloat16")
    assert set(module_names(info).values()) == {
        name for name, _ in load_draft(info.folder).named_parameters()
    }
    config = speculative_config(info.folder, 4)
    assert config == {
        "method": "draft_model",
        "model": str(info.folder),
        "num_speculative_tokens": 4,
    }


@pytest.mark.parametrize("name", ["llama", "qwen3, tied", "gemma2, softcap"])
def test_mixed_attention_needs_one_group_of_caches(
    name: str, tmp_path: Path, tiny_target: Path
) -> None:
    """In the draft or in the target; a draft of one layer lies in one group anyhow."""
    wanted = {"disable_hybrid_kv_cache_manager": True}
    draft = write_lm(tmp_path / "lm", name)
    assert engine_options(tiny_target, draft) == (wanted if name.startswith("gemma2") else {})
    mixed = write_architecture(tmp_path / "mixed", "Gemma 3")
    assert engine_options(mixed, draft) == wanted
    assert engine_options(mixed, write_draft(tmp_path / "eagle3")) == {}
    assert engine_options(mixed, None) == {}


@pytest.mark.parametrize("name", ["llama", "qwen3, tied", "qwen3_moe"])
def test_written_like_its_base(name: str, tmp_path: Path, sequence: torch.Tensor) -> None:
    base, copy = write_lm(tmp_path / "base", name), tmp_path / "copy"
    copy.mkdir()
    weight = "model.layers.0.self_attn.q_proj.weight"
    changed = {f"lm.{weight}": torch.zeros_like(load_file(base / "model.safetensors")[weight])}
    write_like(base, copy, changed)
    before, after = load_file(base / "model.safetensors"), load_file(copy / "model.safetensors")
    assert list(before) == list(after)
    assert [n for n in before if not torch.equal(before[n], after[n])] == [weight]
    for path in base.iterdir():
        if path.suffix != ".safetensors":
            assert path.read_bytes() == (copy / path.name).read_bytes()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_target: Path) -> tuple[Path, Path]:
    """A draft model and a store captured for it."""
    folder = tmp_path_factory.mktemp("draft-model")
    base = write_lm(folder / "base")
    return base, write_store(folder / "store", tiny_target, base)


def run(store: Path, draft: Path, out: Path, **settings: Any) -> Path:
    defaults: dict[str, Any] = {"steps": 8, "eval_every": 8, "rank": 4, "batch_size": 4}
    defaults |= {"learning_rate": 1e-2, "compiled": False, "tensorboard": False}
    train(TrainConfig(store=store, draft=draft, out=out, **(defaults | settings)))
    return out


def test_its_store_holds_no_hidden_states_of_layers(place: tuple[Path, Path]) -> None:
    manifest = json.loads((place[1] / "manifest.json").read_text())
    assert manifest["layer_ids"] == []


@pytest.mark.parametrize(
    ("arm", "name"),
    [
        ("afa-lora", "llama"),
        ("lora", "llama"),
        ("full", "llama"),
        ("full", "qwen3, tied"),
        ("afa-lora", "gemma2, softcap"),
        ("lora", "qwen3_moe"),
    ],
)
def test_trained_merged_and_loaded_by_transformers(
    arm: str,
    name: str,
    place: tuple[Path, Path],
    tiny_target: Path,
    tmp_path: Path,
    sequence: torch.Tensor,
) -> None:
    base = place[0] if name == "llama" else write_lm(tmp_path / "base", name)
    trained = run(place[1], base, tmp_path / "run", arm=arm)
    merged = tmp_path / "merged"
    parity = merge(trained, None, merged)
    assert parity.float32 <= 1e-5
    require_compatible(tiny_target, merged)

    before, after = load_file(base / "model.safetensors"), load_file(merged / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert not changed & {"lm_head.weight", "model.embed_tokens.weight"}
    if arm != "full":  # by default every linear layer but the output's; experts are none
        linear = {n for n, t in before.items() if t.dim() == 2 and ".layers." in n}
        assert changed == {n for n in linear if ".mlp." not in n or name != "qwen3_moe"}

    result = trained / ("weights" if arm == "full" else "adapter")
    adapted = load_result(load_draft(base), result)
    given = torch.empty(24, 0), sequence, 1, alone(24)
    with torch.no_grad():
        (output,) = adapted(*given)
        expected = adapted.logits(output, 0)
    found = hf_logits(merged, sequence.unsqueeze(0))[0, 1:]
    assert float((found - expected).abs().max() / expected.abs().max()) < 0.05  # bf16 weights
    best = load_draft(merged).eval()
    with torch.no_grad():
        (output,) = best(*given)
        torch.testing.assert_close(best.logits(output, 0), found, rtol=1e-4, atol=1e-4)


def test_training_teaches_it_the_target(place: tuple[Path, Path], tmp_path: Path) -> None:
    base, store = place
    trained = run(store, base, tmp_path / "run", arm="full", steps=200, eval_every=200)
    rows = [json.loads(row) for row in (trained / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < 0.5 * rows[1]["loss"]  # row 0 is the base draft's


def test_lm_head_is_trained_on_request(place: tuple[Path, Path], tmp_path: Path) -> None:
    base, store = place
    merge(run(store, base, tmp_path / "run", arm="lora", lm_head=True), None, tmp_path / "merged")
    before = load_file(base / "model.safetensors")
    after = load_file(tmp_path / "merged" / "model.safetensors")
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])


@pytest.mark.parametrize("arm", ["lora", "full"])
def test_a_tied_lm_head_is_refused(arm: str, place: tuple[Path, Path], tmp_path: Path) -> None:
    base = write_lm(tmp_path / "base", "qwen3, tied")
    with pytest.raises(UserError, match=r"ties lm\.lm_head to its embedding"):
        run(place[1], base, tmp_path / "run", arm=arm, lm_head=True)
    assert not (tmp_path / "run").exists()


def test_experts_that_transformers_joins_are_refused(
    place: tuple[Path, Path], tmp_path: Path
) -> None:
    base = write_lm(tmp_path / "base", "qwen3_moe")
    with pytest.raises(UserError, match=r"no tensor of its own for .*experts"):
        run(place[1], base, tmp_path / "run", arm="full")


def test_fresh_is_a_model_that_transformers_and_training_take(
    place: tuple[Path, Path], tiny_target: Path, tmp_path: Path, sequence: torch.Tensor
) -> None:
    draft = init_draft("draft_model", tiny_target, InitOptions(num_layers=3))
    assert isinstance(draft, LmDraft)
    folder = tmp_path / "fresh"
    folder.mkdir()
    save_draft(draft, "draft_model", folder, dtype=torch.float32)
    copy_tokenizer(tiny_target, folder)
    checks = {check.name: check for check in require_compatible(tiny_target, folder)}
    assert checks["tokenizer"].ok

    loaded = load_draft(folder).eval()
    assert isinstance(loaded, LmDraft)
    assert loaded.lm.config.num_hidden_layers == 3
    same = dict(loaded.named_parameters())
    for name, parameter in draft.named_parameters():
        assert torch.equal(parameter, same[name])
    with torch.no_grad():
        (output,) = loaded(torch.empty(24, 0), sequence, 1, alone(24))
        expected = hf_logits(folder, sequence.unsqueeze(0))[0, 1:]
        torch.testing.assert_close(loaded.logits(output, 0), expected)
    head = load_file(tiny_target / "model.safetensors")["lm_head.weight"].float()
    assert torch.equal(same["lm.lm_head.weight"], head)
    run(place[1], folder, tmp_path / "run", steps=2, eval_every=2)


def test_fresh_with_a_reduced_vocabulary_is_refused(tiny_target: Path) -> None:
    with pytest.raises(UserError, match="whole vocabulary"):
        init_draft("draft_model", tiny_target, InitOptions(kept=torch.arange(9)))


def test_offline_the_target_itself_is_right_at_every_step(tiny_target: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_target, dtype=torch.float32).eval()
    rows = []
    for start, length in ((5, 30), (9, 21)):
        prompt = torch.arange(100, 100 + start).unsqueeze(0)
        ids = model.generate(prompt, max_new_tokens=length, do_sample=False, eos_token_id=None)[0]
        mask = torch.arange(len(ids)) >= start
        nothing = torch.empty(len(ids), 0)
        rows.append(Sequence(ids, mask, nothing, nothing, prompt_index=0))
    draft = load_draft(tiny_target).eval()
    for row, matches in zip(rows, match_matrix(draft, rows, 3, amp=False), strict=True):
        drafted = matches[int(row.loss_mask.nonzero()[0]) - 1 :]
        assert drafted.shape == (len(row.input_ids) - 3 - int((~row.loss_mask).sum()), 3)
        assert drafted.all()


def broken(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def test_a_config_of_other_sizes_is_refused(tmp_path: Path) -> None:
    base = broken(write_lm(tmp_path / "lm"), hidden_size=48)
    with pytest.raises(UserError, match=r"weight is \[512, 64\], the config says \[512, 48\]"):
        read_draft(base)


def test_missing_tensors_are_refused(tmp_path: Path) -> None:
    base = write_lm(tmp_path / "lm")
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks or misshapes model\.layers\.1\.mlp\.up_proj"):
        load_draft(base)


def test_an_architecture_that_transformers_has_not_is_refused(tmp_path: Path) -> None:
    base = broken(write_lm(tmp_path / "lm"), model_type="foreign", architectures=["XForCausalLM"])
    with pytest.raises(UserError, match="transformers cannot load this draft model"):
        load_draft(base)


def test_code_in_the_checkpoint_is_never_run(tmp_path: Path) -> None:
    mapping = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    base = broken(write_lm(tmp_path / "lm"), model_type="foreign", auto_map=mapping)
    ran = tmp_path / "ran"
    (base / "evil.py").write_text(f"open({str(ran)!r}, 'w')\n")
    with pytest.raises(UserError, match="transformers cannot load this draft model"):
        load_draft(base)
    assert not ran.exists()


def test_a_quantized_draft_model_is_refused(tmp_path: Path) -> None:
    base = broken(write_lm(tmp_path / "lm"), quantization_config={"quant_method": "fp8"})
    with pytest.raises(UserError, match="is quantized"):
        load_draft(base)


def test_logits_changed_in_an_unknown_way_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_lm(tmp_path / "lm", "gemma2, softcap")
    logits = LmDraft.logits

    def uncapped(self: LmDraft, output: torch.Tensor, step: int) -> torch.Tensor:
        self.lm.config.final_logit_softcapping, cap = None, 5.0
        result = logits(self, output, step)
        self.lm.config.final_logit_softcapping = cap
        return result

    monkeypatch.setattr(LmDraft, "logits", uncapped)
    with pytest.raises(UserError, match="Gemma2ForCausalLM changes its logits"):
        load_draft(base)


def test_another_tokenizer_or_vocabulary_does_not_fit(tiny_target: Path, tmp_path: Path) -> None:
    base = write_lm(tmp_path / "lm")
    path = base / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    words = list(tokenizer["model"]["vocab"])
    first, last = words[300], words[301]
    swapped = tokenizer["model"]["vocab"]
    swapped[first], swapped[last] = swapped[last], swapped[first]
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="tokenizer: the target has 512 tokens, the draft 512"):
        require_compatible(tiny_target, base)
    path.unlink()
    assert "tokenizer" not in {check.name for check in compare(tiny_target, base)}
    shutil.rmtree(base)
    with pytest.raises(UserError, match="vocabulary: the target has 512, the draft 400"):
        require_compatible(tiny_target, write_lm(base, vocab_size=400))


WINDOWED: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("qwen3, tied", WINDOWED, "use_sliding_window"),
        ("qwen3_moe", WINDOWED, "use_sliding_window"),
        ("llama", {"is_causal": False}, "is_causal"),
        ("llama", {"rope_scaling": {"type": "su", "factor": 2.0}}, "'su'"),
    ],
)
def test_what_vllm_computes_otherwise_is_refused(
    name: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = write_lm(tmp_path / "lm", name)
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if key != "layer_types"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        read_draft(folder)


@pytest.mark.parametrize("window", [None, 5])
def test_its_window_is_the_targets(
    window: int | None, tmp_path: Path, sequence: torch.Tensor
) -> None:
    """A Mistral's own window is not what vLLM gives it, but the target's."""
    target = write_target(tmp_path / "target")
    config = json.loads((target / "config.json").read_text()) | {"sliding_window": window}
    (target / "config.json").write_text(json.dumps(config))
    folder = write_lm(tmp_path / "lm", "mistral", sliding_window=7)
    draft = load_draft(folder, target).eval()
    alike = write_lm(tmp_path / "alike", "mistral", sliding_window=window)
    with torch.no_grad():
        found = draft.logits(draft.states(sequence, Packing.of([len(sequence)])), 0)
    torch.testing.assert_close(found, hf_logits(alike, sequence.unsqueeze(0))[0])
    if window is not None:
        with pytest.raises(UserError, match="attend to 5 tokens alone"):
            load_draft(write_lm(tmp_path / "llama"), target)

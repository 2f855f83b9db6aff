"""`afaspec init`: a fresh draft of each family, and the way from it to one that is accepted."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from afaspec.checkpoints.config import InitConfig
from afaspec.checkpoints.init import frequent_tokens, next_commands
from afaspec.config import load_config
from afaspec.store.read import FeatureStore
from bench.stats.offline import offline_acceptance
from drafts.errors import UserError
from drafts.registry import FAMILIES, read_draft
from drafts.target.info import read_target
from tests.command import run_command
from tests.opened import init_checkpoint, load_draft, load_lm_head, require_compatible
from tests.tiny.architectures import write_architecture
from tests.tiny.models import write_target
from tests.tiny.store import write_store

K = 3


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, tiny_target: Path, tiny_draft: Path) -> Path:
    """A store with layers 1, 2 and 3."""
    return write_store(tmp_path_factory.mktemp("init") / "store", tiny_target, tiny_draft)


def acceptance(draft: Path, target: Path, store: Path) -> float:
    """Offline acceptance length on all of the store's sequences, in float32."""
    sequences = FeatureStore.open(store)
    module = load_draft(draft, target).eval()
    every = (sequences[i] for i in range(len(sequences)))
    return offline_acceptance(module, every, K, amp=False).acceptance_length


@pytest.mark.parametrize("family", FAMILIES)
def test_from_scratch_to_a_draft_that_is_accepted(
    family: str, target_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commands that init prints, with prompts of ours and a few short steps."""
    monkeypatch.chdir(tmp_path)
    target = target_of(family)
    code, said = run_command("init", family, "--target", target, "--out", "start")
    assert code == 0, said
    commands = [shlex.split(line)[1:] for line in said.splitlines() if line.startswith("  afaspec")]
    assert [command[0] for command in commands] == ["capture", "train", "merge"]
    capture, train, merge = commands
    (tmp_path / "prompts.jsonl").write_text(
        "".join(f'{{"prompt": "def f{i}(x, y): return x[{i}]"}}\n' for i in range(16))
    )
    capture = [part.replace("PROMPTS", "prompts.jsonl") for part in capture]
    short = ["--steps", "60", "--eval-every", "60", "--learning-rate", "3e-3", "--no-compiled"]
    train = [*train, *short, "--no-tensorboard", "--batch-size", "8", "--precision", "fp32"]
    for command in ([*capture, "--max-new-tokens", "24", "--device", "cpu"], train, merge):
        code, said = run_command(*command)
        assert code == 0, said
    before = acceptance(Path("start"), target, Path("runs/store"))
    after = acceptance(Path("runs/base-merged"), target, Path("runs/store"))
    assert after > before + 0.5
    require_compatible(target, Path("runs/base-merged"))


def start(family: str, target: Path, out: Path, **settings: object) -> Path:
    given = {"family": family, "target": target, "out": out, **settings}
    init_checkpoint(load_config(InitConfig, None, given), lambda text: None)
    return out


def test_the_vocabulary_is_what_the_responses_say(
    store: Path, tiny_target: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    config = InitConfig(
        family="eagle3", target=tiny_target, out=tmp_path / "draft", vocab=100, store=[store]
    )
    info = init_checkpoint(config, said.append)
    assert (info.draft_vocab_size, info.layer_ids) == (100, (1, 2, 3))
    sequences = FeatureStore.open(store)
    counts = torch.zeros(512, dtype=torch.long)
    for i in range(len(sequences)):
        for token, mask in zip(sequences[i].input_ids, sequences[i].loss_mask, strict=True):
            counts[token] += int(mask)
    draft = load_draft(config.out, tiny_target)
    kept = draft.target_ids()
    left = torch.ones(512, dtype=torch.bool)
    left[kept] = False
    assert counts[kept].min() >= counts[left].max()
    assert "100 of 512 tokens kept" in said[0]
    assert torch.equal(draft.lm_head.weight, load_lm_head(tiny_target)[kept].float())
    commands = next_commands(config, info, "T", [sequences])
    assert [command.split()[1] for command in commands] == ["train", "merge"]


def test_several_stores_are_counted_together_and_trained_on_alike(
    store: Path, tiny_target: Path, tiny_draft: Path, tmp_path: Path
) -> None:
    other = write_store(tmp_path / "other", tiny_target, tiny_draft, prompts=12, word="class")
    said: list[str] = []
    config = InitConfig(
        family="eagle3", target=tiny_target, out=tmp_path / "d", vocab=100, store=[store, other]
    )
    info = init_checkpoint(config, said.append)
    stores = [FeatureStore.open(folder) for folder in (store, other)]
    counts = torch.zeros(512, dtype=torch.long)
    for sequence in (*stores[0], *stores[1]):
        counts += sequence.input_ids[sequence.loss_mask].bincount(minlength=512)
    kept = load_draft(config.out, tiny_target).target_ids()
    assert torch.equal(kept, counts.argsort(descending=True, stable=True)[:100].sort().values)
    assert f"of the {counts.sum():,} response tokens in {store}, {other}" in said[0]
    train = next_commands(config, info, "T", stores)[0]
    share = len(stores[1]) / (len(stores[0]) + len(stores[1]))
    assert f"--store {store} --mix {other}={share:.3g} " in train


def test_stores_of_different_layers_are_refused(
    store: Path, tiny_target: Path, tmp_path: Path
) -> None:
    """No draft could be trained on both."""
    draft = start("eagle3", tiny_target, tmp_path / "other-draft", layer_ids="0,2,4")
    other = write_store(tmp_path / "other", tiny_target, draft)
    with pytest.raises(UserError, match=r"has the layers \[0, 2, 4\], .* has \[1, 2, 3\]"):
        start("eagle3", tiny_target, tmp_path / "out", vocab=100, store=[store, other])


def test_too_few_different_tokens_are_filled_up(
    store: Path, tiny_target: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    config = InitConfig(
        family="eagle3", target=tiny_target, out=tmp_path / "draft", vocab=511, store=[store]
    )
    stores = [FeatureStore.open(store)]
    kept = frequent_tokens(config, read_target(tiny_target), stores, said.append)
    assert len(kept.unique()) == 511
    assert "different tokens" in said[1]


def test_the_same_seed_gives_the_same_bytes(tiny_target: Path, tmp_path: Path) -> None:
    one = start("eagle3", tiny_target, tmp_path / "one", seed=5)
    two = start("eagle3", tiny_target, tmp_path / "two", seed=5)
    other = start("eagle3", tiny_target, tmp_path / "other", seed=6)
    data = [(folder / "model.safetensors").read_bytes() for folder in (one, two, other)]
    assert data[0] == data[1] != data[2]


def test_sizes_and_dtype_are_those_asked_for(tiny_target: Path, tmp_path: Path) -> None:
    draft = start(
        "eagle3", tiny_target, tmp_path / "d", layers=2, layer_ids="0,2,4", dtype="float16"
    )
    info = read_draft(draft)
    assert (info.dtype, info.layer_ids) == ("float16", (0, 2, 4))
    assert info.config["num_hidden_layers"] == 2

    config = InitConfig(family="medusa", target=tiny_target, out=tmp_path / "m", heads=2)
    heads = init_checkpoint(config)
    assert heads.max_k == 2
    assert "--draft-steps 2 " in next_commands(config, heads, "T")[1]


@pytest.mark.parametrize("family", ["eagle3", "peagle"])
def test_layers_begin_as_the_targets_last(family: str, tmp_path: Path) -> None:
    """The first one's new inputs, of the embedding, stay random; a layer computes what it did."""
    target = write_architecture(tmp_path / "target", "Llama")
    start(family, target, tmp_path / "copied")
    start(family, target, tmp_path / "random", start="random")
    draft, plain = (load_draft(tmp_path / name, target) for name in ("copied", "random"))
    stored = load_file(target / "model.safetensors")
    count, total = len(draft.layers), read_target(target).num_layers
    for i, layer in enumerate(draft.layers):
        of = f"model.layers.{total - count + i}."
        for name, value in layer.named_parameters():
            if i == 0 and name == "input_layernorm.weight":
                expected = torch.ones_like(value)  # of the embedding
            elif i == 0 and name.removeprefix("self_attn.")[0] in "qkv":
                half = value.shape[1] // 2
                unchanged = plain.layers[0].get_parameter(name)[:, :half]
                expected = torch.cat([unchanged, stored[of + name]], dim=1)
            else:
                expected = stored[of + name.replace("hidden_norm", "input_layernorm")]
            torch.testing.assert_close(value, expected, msg=lambda text, n=name: f"{n}: {text}")
    moved = draft.fc.weight - plain.fc.weight
    width = draft.config.hidden_size
    torch.testing.assert_close(moved[:, -width:], torch.eye(width))
    assert not moved[:, :-width].any()


@pytest.mark.parametrize(
    ("architecture", "settings", "why"),
    [
        ("Qwen3", {}, "not of Llama's kind: self_attn.k_norm.weight, self_attn.q_norm.weight are"),
        ("Qwen2", {}, "not of Llama's kind: self_attn.k_proj.bias, "),
        ("Phi-3", {}, "not of Llama's kind: mlp.gate_proj.weight, "),
        ("Mixtral", {}, "not of Llama's kind: "),
        ("Gemma 3", {}, "not of Llama's kind: "),
        ("Llama", {"intermediate_size": 48}, "its mlp.down_proj.weight is "),
        ("Llama", {"layers": 9}, "has [0-9] decoder layers"),
    ],
)
def test_layers_that_cannot_be_copied_begin_at_random(
    architecture: str, settings: dict[str, object], why: str, tmp_path: Path
) -> None:
    """By default with a word, and not at all where copies are asked for."""
    target = write_architecture(tmp_path / "target", architecture)
    said: list[str] = []
    given = {"family": "eagle3", "target": target, **settings}
    settled = load_config(InitConfig, None, {**given, "out": tmp_path / "default"})
    init_checkpoint(settled, said.append)
    assert re.search(f"begin at random.*{why}", said[0])
    start("eagle3", target, tmp_path / "random", start="random", **settings)
    data = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("default", "random")]
    assert data[0] == data[1]
    with pytest.raises(UserError, match=why) as refused:
        start("eagle3", target, tmp_path / "out", start="target", **settings)
    assert "--start random" in (refused.value.hint or "")
    assert not (tmp_path / "out").exists()


def test_a_draft_model_has_the_tokenizer_beside_it(tiny_target: Path, tmp_path: Path) -> None:
    draft = start("draft_model", tiny_target, tmp_path / "draft")
    name = "tokenizer.json"
    assert (draft / name).read_bytes() == (tiny_target / name).read_bytes()


@pytest.mark.parametrize(
    ("family", "settings", "complaint"),
    [
        ("eagle9", {}, "'eagle9' is unknown"),
        ("eagle3", {"vocab": 100}, "--vocab needs a feature store"),
        ("eagle3", {"vocab": 512, "store": "store"}, "the target has 512 tokens"),
        ("eagle", {"vocab": 100, "store": "store"}, "vocabulary"),
        ("draft_model", {"vocab": 100, "store": "store"}, "vocabulary"),
        ("eagle3", {"layer_ids": "1,x"}, "--layer-ids is '1,x'"),
        ("eagle3", {"layer_ids": "3,2,1"}, "--layer-ids is '3,2,1'"),
        ("eagle3", {"layer_ids": "1,2,9"}, r"layer ids: the target has 0 to 4, .* \[1, 2, 9\]"),
        ("eagle", {"layer_ids": "1,2,3"}, "reads no hidden states of inner layers"),
        ("eagle3", {"heads": 3}, "drafts any number of tokens"),
        ("medusa", {"start": "target"}, "medusa does not begin as the target's layers"),
        ("eagle3", {"start": "zero"}, "--start is 'zero'"),
        ("eagle3", {"dtype": "int8"}, "--dtype is 'int8'"),
        ("medusa", {"intermediate_size": 64}, "medusa has no MLP"),
    ],
)
def test_settings_that_do_not_fit(
    family: str,
    settings: dict[str, object],
    complaint: str,
    store: Path,
    tiny_target: Path,
    tmp_path: Path,
) -> None:
    settings = {**settings, **({"store": [store]} if "store" in settings else {})}
    with pytest.raises(UserError, match=complaint):
        start(family, tiny_target, tmp_path / "out", **settings)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["eagle3", "peagle", "eagle", "dflash", "draft_model"])
def test_a_mixture_of_experts_without_a_dense_width(family: str, tmp_path: Path) -> None:
    """It is asked for; the rope of its images and of parts of heads is not the draft's."""
    target = write_architecture(tmp_path / "target", "Qwen3.5-MoE")
    complaint = r"names no intermediate_size .* moe_intermediate_size"
    with pytest.raises(UserError, match=complaint) as refused:
        start(family, target, tmp_path / "out")
    assert "--intermediate-size" in (refused.value.hint or "")
    assert not (tmp_path / "out").exists()
    info = read_draft(start(family, target, tmp_path / "out", intermediate_size=192))
    assert info.config["intermediate_size"] == 192
    rope = info.config["rope_parameters"]
    assert rope == {"rope_type": "default", "rope_theta": 10000.0}


def test_what_the_target_does_to_its_logits_is_kept_or_named(tmp_path: Path) -> None:
    said: list[str] = []
    for name, expected in (("Gemma 2", "caps its logits at 5"), ("Phi", "adds a bias to its")):
        target = write_architecture(tmp_path / name, name)
        config = InitConfig(family="eagle", target=target, out=tmp_path / f"{name}-draft")
        init_checkpoint(config, said.append)
        assert expected in said[-1]
    target = write_architecture(tmp_path / "Granite", "Granite")
    before = len(said)
    info = init_checkpoint(
        InitConfig(family="eagle", target=target, out=tmp_path / "draft"), said.append
    )
    assert (info.config["logit_scale"], len(said)) == (0.125, before)


def test_a_store_of_another_target_is_refused(store: Path, tmp_path: Path) -> None:
    other = write_target(tmp_path / "other", seed=9)
    with pytest.raises(UserError, match="captured from another target"):
        start("eagle3", other, tmp_path / "out", vocab=100, store=[store])


def test_a_folder_with_something_in_it_is_left_alone(tiny_target: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    with pytest.raises(UserError, match="is there already"):
        start("eagle3", tiny_target, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]

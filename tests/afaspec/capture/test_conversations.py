"""Conversations through a capture: turn by turn, told what the server tells, and gone on with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from afaspec.capture.config import CaptureConfig
from afaspec.capture.plan import CapturePlan
from afaspec.store.manifest import read_manifest
from afaspec.store.read import FeatureStore
from bench.prompts.template import ChatTemplate
from drafts.errors import UserError
from tests.opened import capture, plan_capture
from tests.tiny.chat import with_template, write_digits
from tests.tiny.templates import (
    CHATML,
    CLOCK,
    DATED,
    REASONING,
    TOOLS,
    WEATHER,
    weather_call,
)

ONE, TWO, THREE = ({"role": "user", "content": f"{word}?"} for word in ("one", "two", "three"))
SAID = {"role": "assistant", "content": "recorded"}
Made = Callable[..., Path]


@pytest.fixture(scope="module")
def chat_target(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Makes a target that speaks a template and says nothing but digits, until it ends its turn."""
    base = write_digits(tmp_path_factory.mktemp("base") / "target")

    def make(template: str, *, bos: bool = False) -> Path:
        return with_template(base, tmp_path_factory.mktemp("chat") / "target", template, bos=bos)

    return make


def settings(target: Path, rows: list[dict[str, Any]], folder: Path, **more: Any) -> CaptureConfig:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {"max_new_tokens": 6, "batch_size": 2, "layer_ids": "1,2,3", "dtype": "float32"}
    return CaptureConfig(
        target=str(target), prompts=str(path), out=folder / "store", **(values | more)
    )


def texts(store: FeatureStore, plan: CapturePlan) -> list[str]:
    """The sequences as text, trained stretches in brackets, by prompt."""
    found = []
    for one in sorted(store, key=lambda one: (one.prompt_index, len(one))):
        text, inside = "", False
        for token, trained in zip(one.input_ids.tolist(), one.loss_mask.tolist(), strict=True):
            text += "[" * (trained and not inside) + "]" * (inside and not trained)
            text += plan.encoder.tokenizer.decode([token])
            inside = trained
        found.append(text + "]" * inside)
    return found


def quiet(text: str) -> None:
    pass


def test_every_turn_is_written_by_the_target_and_carried_forward(
    chat_target: Made, tmp_path: Path
) -> None:
    """The stored ids are what the server's requests hold, and greedy at every trained place."""
    from transformers import AutoModelForCausalLM

    target = chat_target(CHATML)
    rows = [
        {"messages": [ONE, SAID, TWO, SAID, THREE, SAID]},
        {"messages": [ONE, SAID, TWO]},
        {"turns": ["four?", "five?"]},
        {"messages": [THREE]},
    ]
    config = settings(target, rows, tmp_path)
    notes: list[str] = []
    plan = plan_capture(config, notes.append)
    assert "3 of 4 prompts are conversations of 7 turns in all" in notes
    store = capture(config)
    tokenizer = plan.encoder.tokenizer
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    assert len(store) == len(rows)
    asked = [[ONE, TWO, THREE], [ONE, TWO], ["four?", "five?"], [THREE]]
    for kept in store:
        said: list[dict[str, Any]] = []
        mask = [False] * len(kept)
        ids = kept.input_ids.tolist()
        with torch.no_grad():
            best = model(torch.tensor([ids])).logits[0].argmax(-1).tolist()
        for turn in asked[kept.prompt_index]:
            said.append({"role": "user", "content": turn} if isinstance(turn, str) else turn)
            text = tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
            prompt = tokenizer(text)["input_ids"]
            assert ids[: len(prompt)] == prompt
            end = next(i for i in range(len(prompt), len(ids)) if ids[i] == 2 or
                       i == len(prompt) + config.max_new_tokens - 1)  # fmt: skip
            mask[len(prompt) : end + 1] = [True] * (end + 1 - len(prompt))
            assert best[len(prompt) - 1 : end] == ids[len(prompt) : end + 1]
            answer = tokenizer.decode(ids[len(prompt) : end + 1], skip_special_tokens=True)
            said.append({"role": "assistant", "content": answer})
        assert end + 1 == len(ids)
        assert kept.loss_mask.tolist() == mask
    assert store.manifest.settings["train_turns"] == "all"
    assert store.manifest.settings["sampling"] == "neutral"

    last = capture(config.model_copy(update={"train_turns": "last", "out": tmp_path / "last"}))
    for one, other in zip(store, last, strict=True):
        assert one.input_ids.tolist() == other.input_ids.tolist()
        trained = other.loss_mask.nonzero()[:, 0]
        assert trained.tolist() == list(range(int(trained[0]), len(other)))
        assert len(trained) <= config.max_new_tokens
    with pytest.raises(UserError, match="other settings: train_turns was all, now it is last"):
        capture(config.model_copy(update={"train_turns": "last"}))


@pytest.mark.parametrize("content", [None, "", "Let me look."])
def test_calls_stay_and_the_answer_to_their_result_is_written(
    content: str | None, chat_target: Made, tmp_path: Path
) -> None:
    """The rows that lost their tools: null, empty and real content beside a call."""
    messages = [
        {"role": "user", "content": "Is it raining in Lund?"},
        {"role": "assistant", "content": content, "tool_calls": [weather_call()]},
        {"role": "tool", "tool_call_id": "c1", "content": '{"rain": false}'},
        {"role": "assistant", "content": "No, it is dry."},
    ]
    config = settings(chat_target(TOOLS), [{"tools": [WEATHER], "messages": messages}], tmp_path)
    plan = plan_capture(config, quiet)
    (written,) = texts(capture(config), plan)
    past = (
        f"<|im_start|>system\n{json.dumps(WEATHER)}\n<|im_end|>\n"
        "<|im_start|>user\nIs it raining in Lund?<|im_end|>\n<|im_start|>assistant\n"
        f'{content or ""}<call>{{"name": "weather", "arguments": {{"town": "Lund"}}}}</call>'
        '<|im_end|>\n<|im_start|>tool\n{"rain": false}<|im_end|>\n<|im_start|>assistant\n'
    )
    assert written.startswith(f"{past}[")
    assert "dry" not in written
    given = config.model_copy(
        update={"use_responses": True, "max_new_tokens": 200, "out": tmp_path / "given"}
    )
    (recorded,) = texts(capture(given), plan)
    assert recorded.replace("[", "").replace("]", "") == f"{past}No, it is dry.<|im_end|>"
    assert recorded.count("[") == 2


def test_turns_whose_past_is_told_otherwise_are_sequences_of_their_own(
    tiny_target: Path, tmp_path: Path
) -> None:
    """A template without an end of turn: the end that the model writes is not in the next prompt.
    Interrupted anywhere, the store comes out the same."""
    rows = [{"turns": ["one?", "two?", "three?"][: 1 + i % 3]} for i in range(9)]
    config = settings(tiny_target, rows, tmp_path, use_responses=False, shard_mib=0.05)
    store = capture(config)
    assert store.prompts == 9
    assert len(store) > 9
    whole = {p.name: p.read_bytes() for p in config.out.iterdir()}
    assert len(store.manifest.shards) >= 3
    for kept in range(len(store.manifest.shards)):
        folder = tmp_path / f"resumed{kept}"
        shutil.copytree(config.out, folder)
        partial = read_manifest(folder)
        partial.complete, partial.shards = False, partial.shards[:kept]
        partial.write(folder)
        capture(config.model_copy(update={"out": folder}))
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == whole


def test_the_day_of_a_store_is_kept(
    chat_target: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two captures on two days, of a template with a clock: the second goes on with the first."""
    config = settings(chat_target(CLOCK), [{"messages": [ONE]}, {"messages": [TWO]}], tmp_path)
    monkeypatch.setattr("afaspec.capture.plan.today", lambda: "2026-01-31")
    store = capture(config)
    assert store.manifest.settings["chat_date"] == "2026-01-31"
    assert "Today: 31 Jan 2026 00:00" in texts(store, plan_capture(config, quiet))[0]
    monkeypatch.setattr("afaspec.capture.plan.today", lambda: "2026-02-01")
    assert len(capture(config)) == 2
    with pytest.raises(UserError, match="chat_date was 2026-01-31, now it is 2026-02-01"):
        capture(config.model_copy(update={"chat_date": "2026-02-01"}))
    again = capture(config.model_copy(update={"overwrite": True}))
    assert again.manifest.settings["chat_date"] == "2026-02-01"


def test_what_the_template_was_told_is_kept_and_compared(chat_target: Made, tmp_path: Path) -> None:
    """The switch for thinking, with recorded answers."""
    target = chat_target(REASONING)
    row = {"messages": [{"role": "user", "content": "Is 7 prime?"}, SAID]}
    off = settings(
        target,
        [row],
        tmp_path,
        use_responses=True,
        max_new_tokens=40,
        chat_template_kwargs={"enable_thinking": False},
    )
    (text,) = texts(capture(off), plan_capture(off, quiet))
    assert text == (
        "<|im_start|>user\nIs 7 prime?<|im_end|>\n<|im_start|>assistant\n"
        "<think>\n\n</think>\n\n[recorded<|im_end|>]"
    )
    found = read_manifest(off.out).settings
    assert found["chat_template_kwargs"] == {"enable_thinking": False}
    assert found["chat_date"] is None
    chat = ChatTemplate(plan_capture(off, quiet).encoder.tokenizer)
    assert found["chat_template_sha256"] == chat.record()["chat_template_sha256"]
    on = off.model_copy(update={"chat_template_kwargs": {}})
    with pytest.raises(
        UserError, match=r"chat_template_kwargs was {'enable_thinking': False}, now"
    ):
        capture(on)
    (target / "chat_template.jinja").write_text(REASONING + " ")
    with pytest.raises(UserError, match="chat_template_sha256 was"):
        capture(off)


def test_text_that_begins_with_bos_has_one(chat_target: Made, tmp_path: Path) -> None:
    rows = [{"prompt": f"<|begin|><|user|>Add {i} and 1.<|assistant|>"} for i in range(3)]
    config = settings(chat_target(CHATML, bos=True), rows, tmp_path)
    store = capture(config)
    begin = plan_capture(config, quiet).encoder.tokenizer.bos_token_id
    for one in store:
        assert one.input_ids.tolist().count(begin) == 1
        assert int(one.input_ids[0]) == begin
    assert "chat_date" not in store.manifest.settings  # no prompt went through a template


def test_rows_that_the_template_refuses_are_listed_or_skipped(
    chat_target: Made, tmp_path: Path
) -> None:
    strict = "{% if messages|length > 1 %}{{ raise_exception('one only') }}{% endif %}" + CHATML
    system = {"role": "system", "content": "s"}
    rows = [{"messages": [system, ONE]}, {"messages": [TWO]}, {"messages": [system, THREE]}]
    config = settings(chat_target(strict), rows, tmp_path)
    with pytest.raises(UserError) as caught:
        plan_capture(config, quiet)
    assert "2 of its 3 rows cannot be used" in str(caught.value)
    assert "rows.jsonl:1: the target's chat template refused" in str(caught.value)
    assert "rows.jsonl:3" in str(caught.value)
    notes: list[str] = []
    plan = plan_capture(config.model_copy(update={"skip_bad_rows": True}), notes.append)
    assert [asked.prompt.id.rsplit(":")[-1] for asked in plan.prompts] == ["2"]
    assert any("2 of 3 prompts are bad and left out" in note for note in notes)


def test_what_is_odd_about_ends_and_beginnings_is_said(chat_target: Made, tmp_path: Path) -> None:
    notes: list[str] = []
    plan_capture(settings(chat_target(DATED), [{"messages": [ONE]}], tmp_path), notes.append)
    assert any("ends a turn with '<|eot|>', at which the target does not stop" in n for n in notes)
    config = settings(chat_target(CHATML, bos=True), [{"messages": [ONE]}], tmp_path)
    plan_capture(config, notes.append)
    assert "The chat template writes no BOS" in notes[-1]


def test_a_conversation_without_room_for_its_answers(chat_target: Made, tmp_path: Path) -> None:
    target = chat_target(CHATML)
    rows = [{"messages": [ONE, SAID, TWO, SAID, THREE]}]
    config = settings(target, rows, tmp_path, max_prompt_tokens=60)
    with pytest.raises(UserError, match=r"rows.jsonl:1: its last turn may have .* at most 60"):
        plan_capture(config, quiet)
    cut = config.model_copy(update={"truncate_prompts": True})
    kept = texts(capture(cut), plan_capture(cut, quiet))
    assert all(text.startswith("<|im_start|>user\n") for text in kept)
    assert kept[-1].count("three?") == 1

"""Conversations: the order of their turns, the prompts of later turns, and the room they need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.prompts.conversation import Turns, schedule, unit_name, units
from bench.prompts.encode import encode_prompts, make_encoder
from bench.prompts.rows import Prompt, as_conversation
from bench.prompts.template import ChatTemplate
from drafts.errors import UserError

NEW = 8


def test_a_block_goes_turn_by_turn() -> None:
    blocks = schedule([1, 0, 2, 0, 1], 3)
    assert blocks == [[[0, 1, 2], [0, 2], [2]], [[3, 4], [4]]]
    order = list(units(blocks))
    assert order == [(0, 0), (1, 0), (2, 0), (0, 1), (2, 1), (2, 2), (3, 0), (4, 0), (4, 1)]
    assert [unit_name("a", turn) for turn in (0, 1)] == ["a", "a turn 2"]


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_recorded_answers_give_way_to_the_arms_own() -> None:
    said = [message("system", "s"), message("user", "q1"), message("assistant", "a1"),
            message("user", "q2")]  # fmt: skip
    replayed = as_conversation(Prompt("p", said, answer=message("assistant", "a2")))
    assert (replayed.messages, replayed.turns, replayed.answer) == (said[:2], ("q2",), None)


@pytest.mark.parametrize("roles", [["user"], ["user", "assistant", "tool"], ["user", "user"]])
def test_what_cannot_be_replayed_stays(roles: list[str]) -> None:
    prompt = Prompt("p", [message(role, "x") for role in roles])
    assert as_conversation(prompt) is prompt


@pytest.fixture
def tokenizer(tiny_target: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_target)


def turns_of(tokenizer: Any, room: int = 256, *, truncate: bool = False) -> Turns:
    prompts = [
        Prompt("a", [message("user", "one")], turns=("two", "three")),
        Prompt("b", text="plain text"),
    ]
    encoder = make_encoder(
        ChatTemplate(tokenizer), max_positions=room + 1, new_tokens=1, truncate=truncate
    )
    return Turns(encode_prompts(prompts, encoder), encoder, max_tokens=NEW)


def test_later_prompts_hold_the_answers(tokenizer: Any) -> None:
    turns = turns_of(tokenizer)
    assert turns.later == [2, 0]
    answers = [tokenizer("def f", add_special_tokens=False)["input_ids"] + [0]]
    ids, cut = turns.prompt(0, answers)
    assert tokenizer.decode(ids) == (
        "<|user|>\none\n<|assistant|>\ndef f\n<|user|>\ntwo\n<|assistant|>\n"
    )
    assert not cut
    answers.append(tokenizer("import", add_special_tokens=False)["input_ids"])
    last = tokenizer.decode(turns.prompt(0, answers)[0])
    assert last.endswith("two\n<|assistant|>\nimport\n<|user|>\nthree\n<|assistant|>\n")


def test_without_a_template_messages_are_joined(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    answer = tokenizer("def f", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(turns_of(tokenizer).prompt(0, [answer])[0]) == "one\ndef f\ntwo"


def test_later_turns_count_for_the_room(tokenizer: Any) -> None:
    answer = [0] * NEW
    needed = len(turns_of(tokenizer).prompt(0, [answer] * 2)[0])
    assert turns_of(tokenizer).longest >= needed + 2 * NEW
    with pytest.raises(UserError, match=r"a: its last turn may have .* expected at most 40"):
        turns_of(tokenizer, room=40)


def test_a_conversation_that_grows_too_long_loses_its_oldest_turns(tokenizer: Any) -> None:
    turns = turns_of(tokenizer, room=40, truncate=True)
    assert turns.longest == 40
    long = tokenizer("def f(x): return x", add_special_tokens=False)["input_ids"]
    ids, cut = turns.prompt(0, [long, long])
    assert cut
    assert len(ids) <= 40
    assert tokenizer.decode(ids).endswith("<|user|>\nthree\n<|assistant|>\n")
    assert tokenizer.decode(ids).startswith("<|user|>\n")  # and not in the middle of a turn

"""Conversations: the order of their turns, the prompts of later turns, and the room they need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.prompts.conversation import Turns, schedule, unit_name, units
from bench.prompts.encode import EncodedPrompt, encode_prompts
from bench.prompts.rows import Prompt, as_conversation
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


def conversations(tokenizer: Any, room: int = 256, **options: Any) -> list[EncodedPrompt]:
    prompts = [
        Prompt("a", [message("user", "one")], turns=("two", "three")),
        Prompt("b", text="plain text"),
    ]
    return encode_prompts(prompts, tokenizer, max_positions=room, **options)


def test_later_prompts_hold_the_answers(tokenizer: Any) -> None:
    turns = Turns(conversations(tokenizer), tokenizer, room=256, max_tokens=NEW)
    assert turns.later == [2, 0]
    answers = [tokenizer("def f", add_special_tokens=False)["input_ids"] + [0]]
    assert tokenizer.decode(turns.prompt(0, answers)) == (
        "<|user|>\none\n<|assistant|>\ndef f\n<|user|>\ntwo\n<|assistant|>\n"
    )
    answers.append(tokenizer("import", add_special_tokens=False)["input_ids"])
    last = tokenizer.decode(turns.prompt(0, answers))
    assert last.endswith("two\n<|assistant|>\nimport\n<|user|>\nthree\n<|assistant|>\n")


def test_without_a_template_messages_are_joined(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    turns = Turns(conversations(tokenizer), tokenizer, room=256, max_tokens=NEW)
    answer = tokenizer("def f", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(turns.prompt(0, [answer])) == "one\ndef f\ntwo"


def test_later_turns_count_for_the_room(tokenizer: Any) -> None:
    prompts = conversations(tokenizer)
    answer = [0] * NEW
    needed = len(Turns(prompts, tokenizer, room=256, max_tokens=NEW).prompt(0, [answer] * 2))
    assert Turns(prompts, tokenizer, room=256, max_tokens=NEW).longest >= needed + 2 * NEW
    with pytest.raises(UserError, match=r"a: its last turn may have .* expected at most 40"):
        Turns(prompts, tokenizer, room=40, max_tokens=NEW)
    assert Turns(prompts, tokenizer, room=40, max_tokens=NEW, truncate=True).longest == 40

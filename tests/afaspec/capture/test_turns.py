"""Recorded conversations as sequences: what is stored is what the template makes of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afaspec.capture.turns import (
    Kept,
    Turn,
    joined,
    recorded_text,
    recorded_turns,
    to_generate,
)
from bench.prompts.encode import Encoder, make_encoder
from bench.prompts.rows import Message, Prompt
from bench.prompts.template import ChatTemplate
from drafts.errors import UserError
from tests.tiny.templates import (
    CHATML,
    CLOCK,
    DATED,
    REASONING,
    TOOLS,
    WEATHER,
    chat_tokenizer,
    weather_call,
)

DAY = "2026-01-31"


def encoder_of(template: str | None, *, bos: bool = False, **told: Any) -> Encoder:
    chat = ChatTemplate(chat_tokenizer(template, bos=bos, end="<|endoftext|>"), told, DAY)
    return make_encoder(chat, max_positions=1 << 20)


def kept_of(
    prompt: Prompt, encoder: Encoder, train: Any = "all", limit: int = 1 << 20
) -> list[Kept]:
    dialogue = encoder.dialogue(prompt, replay=True)
    ends = [encoder.tokenizer.eos_token_id]
    if dialogue is None:
        return joined(recorded_text(prompt, encoder, ends, limit), train)
    return joined(recorded_turns(dialogue, encoder, ends, limit, cut=prompt.cut), train)


def prompt_of(messages: list[Message], **more: Any) -> Prompt:
    """A prompt as a row of these messages gives it."""
    if messages[-1]["role"] == "assistant":
        return Prompt("rows:1", messages[:-1], answer=messages[-1], **more)
    return Prompt("rows:1", messages, **more)


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str | None, **more: Any) -> Message:
    return {"role": "assistant", "content": content, **more}


def marked(kept: Kept, encoder: Encoder) -> str:
    """A sequence as text, its trained stretches in brackets."""
    text, inside = "", False
    for token, trained in zip(kept.ids, kept.mask, strict=True):
        text += "[" * (trained and not inside) + "]" * (inside and not trained)
        text += encoder.tokenizer.decode([token])
        inside = trained
    return text + "]" * inside


def test_every_turn_of_the_assistant_is_trained_or_the_last() -> None:
    said = [user("one"), assistant("A"), user("two"), assistant("B")]
    encoder = encoder_of(CHATML)
    (kept,) = kept_of(prompt_of(said), encoder)
    assert marked(kept, encoder) == (
        "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n[A<|im_end|>]\n"
        "<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n[B<|im_end|>]"
    )
    (last,) = kept_of(prompt_of(said), encoder, "last")
    assert last.ids == kept.ids
    assert sum(last.mask) == 2
    assert last.mask[-2:] == [True, True]


def test_an_answer_to_nobody_and_a_question_without_answer_are_not_trained() -> None:
    said = [assistant("Hello."), user("one"), assistant("A"), user("two")]
    encoder = encoder_of(CHATML)
    (kept,) = kept_of(prompt_of(said), encoder)
    assert marked(kept, encoder) == (
        "<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\none<|im_end|>\n"
        "<|im_start|>assistant\n[A<|im_end|>]"
    )


def test_calls_are_trained_and_their_results_are_not() -> None:
    for content in (None, "", "Let me look."):
        said = [
            user("Is it raining in Lund?"),
            assistant(content, tool_calls=[weather_call()]),
            {"role": "tool", "tool_call_id": "c1", "content": '{"rain": false}'},
            assistant("No, it is dry."),
        ]
        encoder = encoder_of(TOOLS)
        (kept,) = kept_of(prompt_of(said, tools=[WEATHER]), encoder)
        call = '<call>{"name": "weather", "arguments": {"town": "Lund"}}</call><|im_end|>'
        assert marked(kept, encoder).endswith(
            "<|im_start|>user\nIs it raining in Lund?<|im_end|>\n<|im_start|>assistant\n"
            f'[{content or ""}{call}]\n<|im_start|>tool\n{{"rain": false}}<|im_end|>\n'
            "<|im_start|>assistant\n[No, it is dry.<|im_end|>]"
        )
        dialogue = encoder.dialogue(prompt_of(said, tools=[WEATHER]), replay=True)
        assert dialogue is not None
        assert dialogue.asked == (1, 3)
        assert to_generate(dialogue).asked == (3,)  # the call stays, since its result follows


def test_a_past_that_the_template_tells_otherwise_begins_a_new_sequence() -> None:
    """Reasoning is left out of earlier turns: each turn is stored as the server saw it."""
    said = [user("one"), assistant("A", reasoning_content="why"), user("two"), assistant("B")]
    encoder = encoder_of(REASONING)
    first, second = kept_of(prompt_of(said), encoder)
    assert marked(first, encoder) == (
        "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n"
        "[<think>\nwhy\n</think>\n\nA<|im_end|>]"
    )
    assert marked(second, encoder) == (
        "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
        "<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n[B<|im_end|>]"
    )


def test_thinking_that_is_switched_off_is_part_of_the_prompt() -> None:
    """The template asks with an empty thought that it does not write of a recorded answer."""
    encoder = encoder_of(REASONING, enable_thinking=False)
    (kept,) = kept_of(prompt_of([user("Is 7 prime?"), assistant("No.")]), encoder)
    assert marked(kept, encoder) == (
        "<|im_start|>user\nIs 7 prime?<|im_end|>\n<|im_start|>assistant\n"
        "<think>\n\n</think>\n\n[No.<|im_end|>]"
    )
    thought = [user("Is 7 prime?"), assistant("Yes.", reasoning_content="no divisor")]
    with pytest.raises(UserError, match=r"rows:1: its recorded answer does not follow .*</think>"):
        kept_of(prompt_of(thought), encoder)


def test_an_open_thought_without_reasoning_is_refused() -> None:
    switch = "{% if enable_thinking is defined and not enable_thinking %}"
    opening = REASONING.replace(switch, "{% if true %}").replace(
        "<think>\n\n</think>\n\n{% endif %}", "<think>\n{% endif %}"
    )
    encoder = encoder_of(opening)
    said = [user("Is 7 prime?"), assistant("Yes.", reasoning_content="no divisor")]
    (kept,) = kept_of(prompt_of(said), encoder)
    assert marked(kept, encoder).endswith(
        "<|im_start|>assistant\n<think>\n[no divisor\n</think>\n\nYes.<|im_end|>]"
    )
    with pytest.raises(UserError, match="rows:1: its recorded answer does not follow"):
        kept_of(prompt_of([user("Is 7 prime?"), assistant("Yes.")]), encoder)


@pytest.mark.parametrize(
    ("source", "answer", "lost"),
    [
        (CHATML, assistant("Yes.", reasoning_content="no divisor"), "reasoning_content"),
        (CHATML.replace("{{ m['content'] }}", "{{ m['content'][:9] }}"),
         assistant("A long answer."), "content"),
        (CHATML, assistant("Look:", tool_calls=[weather_call()]), "tool_calls"),
    ],
)  # fmt: skip
def test_an_answer_that_the_template_cuts_is_refused(
    source: str, answer: Message, lost: str
) -> None:
    with pytest.raises(UserError, match=f"rows:1: .* leaves out the {lost} of its recorded"):
        kept_of(prompt_of([user("Is 7?"), answer]), encoder_of(source))


def test_an_answer_that_a_limit_ended_has_no_end() -> None:
    encoder = encoder_of(CHATML)
    (kept,) = kept_of(prompt_of([user("one"), assistant("A and")], cut=True), encoder)
    assert marked(kept, encoder).endswith("<|im_start|>assistant\n[A and]")
    (text,) = kept_of(Prompt("a", text="def f", response="(x):", cut=True), encoder)
    assert marked(text, encoder) == "def f[(x):]"
    (whole,) = kept_of(Prompt("a", text="def f", response="(x):"), encoder)
    assert marked(whole, encoder) == "def f[(x):<|endoftext|>]"


def test_answers_are_cut_to_the_limit_and_what_follows_is_not_trained() -> None:
    said = [user("one"), assistant("A B C D E F G H"), user("two"), assistant("B")]
    encoder = encoder_of(CHATML)
    (kept,) = kept_of(prompt_of(said), encoder, limit=3)
    assert marked(kept, encoder).count("<|im_end|>]") == 1
    assert sum(kept.mask) == 3 + 2
    assert "A B C D E F G H<|im_end|>\n" in marked(kept, encoder).replace("[", "").replace("]", "")


def test_where_the_template_has_no_end_the_models_own_ends_each_turn() -> None:
    said = [user("one"), assistant("A"), user("two"), assistant("B")]
    encoder = encoder_of(CLOCK)
    first, second = kept_of(prompt_of(said), encoder)
    today = "<|user|>Today: 31 Jan 2026 00:00\n"
    assert marked(first, encoder) == f"{today}<|user|>one<|assistant|>[A<|endoftext|>]"
    assert marked(second, encoder) == (
        f"{today}<|user|>one<|assistant|>A<|user|>two<|assistant|>[B<|endoftext|>]"
    )


def test_turns_that_continue_are_one_sequence() -> None:
    turns = [Turn([1, 2], [3]), Turn([1, 2, 3, 4], [5, 6]), Turn([1, 9], [7])]
    assert joined(turns) == [
        Kept([1, 2, 3, 4, 5, 6], [False, False, True, False, True, True]),
        Kept([1, 9, 7], [False, False, True]),
    ]
    assert joined(turns, "last") == [Kept([1, 9, 7], [False, False, True])]
    assert joined(turns[:2], "last") == [
        Kept([1, 2, 3, 4, 5, 6], [False] * 4 + [True, True]),
    ]


# What follows writes the templates down a second time, in Python, and drives them with drawn chats.

words = st.text(
    st.characters(codec="utf-8", exclude_characters="<>|{}"), min_size=1, max_size=20
).map(str.strip).filter(bool)  # fmt: skip
Piece = tuple[str, bool]  # text, and whether it is trained


def chatml(said: list[Message]) -> list[list[Piece]]:
    pieces: list[Piece] = []
    for message in said:
        trained = message["role"] == "assistant"
        pieces += [(f"<|im_start|>{message['role']}\n", False)]
        pieces += [(f"{message['content']}<|im_end|>", trained), ("\n", False)]
    return [pieces[:-1]]


def dated(said: list[Message]) -> list[list[Piece]]:
    pieces: list[Piece] = [
        ("<|begin|><|header|>system<|/header|>\n\nToday: 31 Jan 2026<|eot|>", False)
    ]
    for message in said:
        trained = message["role"] == "assistant"
        pieces += [(f"<|header|>{message['role']}<|/header|>\n\n", False)]
        pieces += [(f"{message['content']}<|eot|>", trained)]
    return [pieces]


def reasoning(said: list[Message]) -> list[list[Piece]]:
    """A new sequence after every turn that was thought about: the next one has it without."""
    found: list[list[Piece]] = []
    new, past = True, ""
    for message in said:
        head, thought = f"<|im_start|>{message['role']}\n", message.get("reasoning_content")
        tail = f"{message['content']}<|im_end|>"
        if message["role"] == "assistant":
            if new:
                found.append([(past, False)])
                seen = past
            found[-1] += [(past[len(seen) :] + head, False)]
            shown = f"<think>\n{thought}\n</think>\n\n{tail}" if thought else tail
            found[-1] += [(shown, True)]
            new, seen = bool(thought), past + head + tail
        past += f"{head}{tail}\n"
    return found


def with_tools(said: list[Message]) -> list[list[Piece]]:
    import json

    told = f"<|im_start|>system\n{json.dumps(WEATHER)}\n<|im_end|>\n"
    pieces: list[Piece] = [(told, False)]
    for message in said:
        trained = message["role"] == "assistant"
        calls = "".join(
            f'<call>{{"name": "weather", "arguments": {call["function"]["arguments"]}}}</call>'
            for call in message.get("tool_calls", [])
        )
        pieces += [(f"<|im_start|>{message['role']}\n", False)]
        pieces += [(f"{message['content'] or ''}{calls}<|im_end|>", trained), ("\n", False)]
    return [pieces[:-1]]


@st.composite
def chats(draw: st.DrawFn, *, thoughts: bool = False, calls: bool = False) -> list[Message]:
    said: list[Message] = []
    if draw(st.booleans()):
        said.append({"role": "system", "content": draw(words)})
    for _ in range(draw(st.integers(1, 4))):
        said.append(user(draw(words)))
        if calls and draw(st.booleans()):
            town = draw(st.text("abcXYZ", max_size=5))
            call = weather_call(f'{{"town": "{town}"}}')
            said.append(assistant(draw(st.none() | words), tool_calls=[call]))
            said.append({"role": "tool", "tool_call_id": "c1", "content": draw(words)})
        thought = draw(st.none() | words) if thoughts else None
        said.append(assistant(draw(words), **({"reasoning_content": thought} if thought else {})))
    return said


def expected(pieces: list[Piece], encoder: Encoder) -> Kept:
    """Ids of the whole text, and a mask by the places of its characters."""
    text = "".join(part for part, _ in pieces)
    trained = [flag for part, flag in pieces for _ in part]
    found = encoder.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    # A token of a part of a character has the character's place.
    return Kept(list(found["input_ids"]), [trained[start] for start, _ in found["offset_mapping"]])


STYLES: dict[str, tuple[str, Any, st.SearchStrategy[list[Message]]]] = {
    "ChatML": (CHATML, chatml, chats()),
    "BOS and date": (DATED, dated, chats()),
    "reasoning": (REASONING, reasoning, chats(thoughts=True)),
    "tools": (TOOLS, with_tools, chats(calls=True)),
}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("bos", [False, True], ids=["", "tokenizer begins with BOS"])
def test_what_is_stored_is_what_the_template_makes(style: str, bos: bool) -> None:
    source, written, strategy = STYLES[style]
    encoder = encoder_of(source, bos=bos)
    tools = [WEATHER] if style == "tools" else None

    @settings(max_examples=150, deadline=None)
    @given(strategy)
    def check(said: list[Message]) -> None:
        kept = kept_of(prompt_of(said, tools=tools), encoder)
        assert kept == [expected(pieces, encoder) for pieces in written(said)]

    check()


def prompts_of(kept: list[Kept]) -> Iterator[tuple[list[int], list[int]]]:
    """Prompt and answer of each trained stretch."""
    for one in kept:
        start = None
        for i, trained in enumerate([*one.mask, False]):
            if trained and start is None:
                start = i
            elif not trained and start is not None:
                yield one.ids[:start], one.ids[start:i]
                start = None


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=12), min_size=2,
                max_size=6).filter(lambda texts: all(text.strip() for text in texts)))  # fmt: skip
def test_each_turn_is_asked_as_the_server_asks_it(texts: list[str]) -> None:
    """Whatever white space and whatever tokens meet at the borders of a message."""
    texts = texts[: len(texts) // 2 * 2]
    said = [(user, assistant)[i % 2](text) for i, text in enumerate(texts)]
    encoder = encoder_of(CHATML)
    found = list(prompts_of(kept_of(prompt_of(said), encoder)))
    assert len(found) == len(said) // 2
    for turn, (prompt, answer) in enumerate(found):
        plain = encoder.tokenizer.apply_chat_template(
            said[: 2 * turn + 1], add_generation_prompt=True, tokenize=False
        )
        assert prompt == encoder.tokenizer(plain, add_special_tokens=False)["input_ids"]
        assert encoder.tokenizer.decode(answer) == f"{texts[2 * turn + 1]}<|im_end|>"

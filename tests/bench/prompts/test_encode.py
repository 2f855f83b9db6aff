"""Prompts as token ids: one BOS, the chat template, and cuts that keep a conversation whole."""

from __future__ import annotations

from typing import Any

import pytest

from bench.prompts.encode import EncodedPrompt, encode_prompts, make_encoder
from bench.prompts.rows import Prompt
from bench.prompts.template import ChatTemplate
from drafts.errors import UserError
from tests.tiny.templates import CHATML, DATED, TOOLS, WEATHER, chat_tokenizer

DAY = "2026-01-31"


def encode(prompts: list[Prompt], tokenizer: Any, **options: Any) -> list[EncodedPrompt]:
    encoder = make_encoder(ChatTemplate(tokenizer, date=DAY), **{"max_positions": 256, **options})
    return encode_prompts(prompts, encoder)


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def test_conversations_go_through_the_chat_template() -> None:
    tokenizer = chat_tokenizer(CHATML)
    prompts = [Prompt("a", [user("hello")]), Prompt("b", text="hello")]
    chat, plain = encode(prompts, tokenizer)
    expected = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(chat.input_ids) == expected
    assert tokenizer.decode(plain.input_ids) == "hello"
    (always,) = encode(prompts[1:], tokenizer, chat="always")
    assert always.input_ids == chat.input_ids
    (never,) = encode(prompts[:1], tokenizer, chat="never")
    assert never.input_ids == plain.input_ids


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize(
    ("prompt", "template"),
    [
        (Prompt("plain", text="Add 1."), CHATML),
        (Prompt("begins with it", text="<|begin|><|user|>Add 1.<|assistant|>"), CHATML),
        (Prompt("template writes it", [user("Add 1.")]), DATED),
        (Prompt("template does not", [user("Add 1.")]), CHATML),
        (Prompt("long plain", text="<|begin|>" + "one two three " * 90), CHATML),
        (Prompt("long chat", [user("one two three " * 90)]), DATED),
        (Prompt("document", text="one two three " * 40, head_tokens=20), CHATML),
    ],
    ids=lambda value: value.id if isinstance(value, Prompt) else "",
)
def test_one_bos_and_never_two(prompt: Prompt, template: str, bos: bool) -> None:
    """A tokenizer puts one before plain text; of a conversation the template decides, as in vLLM's
    server."""
    tokenizer = chat_tokenizer(template, bos=bos)
    (encoded,) = encode([prompt], tokenizer, truncate=True)
    has = "<|begin|>" in (prompt.text or "") or (template == DATED if prompt.messages else bos)
    begin = tokenizer.bos_token_id
    assert encoded.input_ids.count(begin) == has
    assert (encoded.input_ids[0] == begin) == has


def test_an_end_that_the_tokenizer_adds_is_no_part_of_a_prompt() -> None:
    from tokenizers import processors

    tokenizer = chat_tokenizer(CHATML)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A <|im_end|>",
        special_tokens=[("<|begin|>", tokenizer.bos_token_id), ("<|im_end|>", 2)],
    )
    try:
        assert tokenizer("x")["input_ids"][-1] == 2
        (encoded,) = encode([Prompt("a", text="x")], tokenizer)
        assert tokenizer.decode(encoded.input_ids) == "<|begin|>x"
    finally:
        tokenizer.backend_tokenizer.post_processor = None


def test_documents_give_their_head() -> None:
    tokenizer = chat_tokenizer(CHATML)
    text = "def function(argument):\n" * 30
    prompt = Prompt("a", text=text, head_tokens=16)
    (encoded,) = encode([prompt], tokenizer)
    head = tokenizer(text)["input_ids"][:16]
    assert encoded.input_ids == head
    (asked,) = encode([prompt], tokenizer, chat="always")
    assert tokenizer.decode(asked.input_ids) == (
        f"<|im_start|>user\n{tokenizer.decode(head)}<|im_end|>\n<|im_start|>assistant\n"
    )


def test_over_long_plain_prompts_are_refused_or_keep_bos_and_their_tail() -> None:
    text = "a b c d e f g h " * 40
    for bos in (False, True):
        tokenizer = chat_tokenizer(CHATML, bos=bos)
        ids = tokenizer(text)["input_ids"]
        for options, room in [({"max_positions": 64, "new_tokens": 16}, 48),
                              ({"max_prompt_tokens": 10}, 10)]:  # fmt: skip
            with pytest.raises(UserError, match=rf"rows:7: .* expected at most {room} "):
                encode([Prompt("rows:7", text=text)], tokenizer, **options)
            (kept,) = encode([Prompt("rows:7", text=text)], tokenizer, truncate=True, **options)
            assert kept.input_ids == ids[:bos] + ids[bos - room :]


def test_a_cut_conversation_keeps_bos_system_and_its_last_turn() -> None:
    tokenizer = chat_tokenizer(DATED, bos=True)
    messages = [{"role": "system", "content": "Be brief."}]
    for i in range(6):
        messages += [user(f"Question {i}?"), {"role": "assistant", "content": f"Answer {i}."}]
    asked = [Prompt("rows:3", [*messages, user("And now?")])]
    with pytest.raises(UserError, match=r"rows:3: the prompt has .* expected at most 110"):
        encode(asked, tokenizer, max_prompt_tokens=110)
    (kept,) = encode(asked, tokenizer, max_prompt_tokens=110, truncate=True)
    text = tokenizer.decode(kept.input_ids)
    assert len(kept.input_ids) <= 110
    assert text.startswith(
        "<|begin|><|header|>system<|/header|>\n\nToday: 31 Jan 2026<|eot|>"
        "<|header|>system<|/header|>\n\nBe brief.<|eot|><|header|>user<|/header|>\n\nQuestion "
    )
    assert text.endswith("And now?<|eot|><|header|>assistant<|/header|>\n\n")
    assert "Question 0" not in text
    assert "Answer 5" in text


def test_a_single_message_that_is_too_long_loses_its_first_words() -> None:
    tokenizer = chat_tokenizer(DATED)
    system = {"role": "system", "content": "Be brief."}
    long = Prompt("a", [system, user(" ".join(map(str, range(200))))])
    (kept,) = encode([long], tokenizer, max_prompt_tokens=90, truncate=True)
    text = tokenizer.decode(kept.input_ids)
    assert 80 <= len(kept.input_ids) <= 90
    assert "Be brief." in text
    assert text.endswith("198 199<|eot|><|header|>assistant<|/header|>\n\n")
    with pytest.raises(UserError, match=r"a: the prompt has .* even without all that can be cut"):
        encode([long], tokenizer, max_prompt_tokens=20, truncate=True)


def test_tools_are_for_a_template() -> None:
    tools = Prompt("rows:1", [user("Rain?")], tools=[WEATHER])
    (encoded,) = encode([tools], chat_tokenizer(TOOLS))
    assert "Weather of a town" in chat_tokenizer(TOOLS).decode(encoded.input_ids)
    with pytest.raises(UserError, match="rows:1: has tools, which only a chat template"):
        encode([tools], chat_tokenizer(TOOLS), chat="never")
    with pytest.raises(UserError, match=r'rows:1: .* template leaves out "tools"'):
        encode([tools], chat_tokenizer(CHATML))

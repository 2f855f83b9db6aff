"""Prompts as token ids of one target, each with room for its answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bench.prompts.rows import Message, Prompt
from drafts.errors import UserError

Chat = Literal["auto", "always", "never"]


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt's token ids and, where its row gave an answer, that answer's token ids.

    Where the conversation goes on, `messages` are those that the ids were made of, and `turns`
    what the user says later.
    """

    id: str
    input_ids: list[int]
    response_ids: list[int] | None = None
    category: str | None = None
    messages: list[Message] | None = None
    turns: tuple[str, ...] = ()
    root: int | None = None  # the prompt's own


def encode_prompts(
    prompts: Sequence[Prompt],
    tokenizer: Any,
    *,
    max_positions: int,
    max_prompt_tokens: int | None = None,
    new_tokens: int = 1,
    truncate: bool = False,
    chat: Chat = "auto",
) -> list[EncodedPrompt]:
    """Tokenise `prompts` with the target's tokenizer and its chat template.

    A prompt may have `max_prompt_tokens`, or what `max_positions` leaves beside `new_tokens`. A
    longer one is a `UserError`; with `truncate` its last tokens are kept. Answers end with the
    tokenizer's end token and are cut to `new_tokens`. `chat`: "auto" uses the template for
    conversations, "always" for plain prompts too, "never" joins messages as plain text.
    """
    room = prompt_room(max_positions, new_tokens, max_prompt_tokens)
    plain, templated = _texts(prompts, tokenizer, chat)
    ids = _tokenize(tokenizer, plain, special=True) | _tokenize(tokenizer, templated, special=False)
    answers = {i: text for i, p in enumerate(prompts) if (text := _answer_text(p)) is not None}
    answer_ids = _tokenize(tokenizer, answers, special=False)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    encoded = []
    for i, prompt in enumerate(prompts):
        tokens, answer = ids[i], answer_ids.get(i)
        if prompt.head_tokens is not None and len(tokens) > prompt.head_tokens:
            tokens, answer = tokens[: prompt.head_tokens], tokens[prompt.head_tokens :]
        elif answer is not None:
            answer = answer if prompt.cut else [*answer, *end]
        if not tokens:
            raise UserError(
                "the prompt has no tokens; expected at least one",
                where=prompt.id,
                hint="repair or remove this row",
            )
        if len(tokens) > room:
            if not truncate:
                raise _too_long(prompt.id, len(tokens), room, max_positions, new_tokens)
            tokens = tokens[-room:]
        cut = answer[:new_tokens] if answer is not None else None
        messages = prompt.messages if prompt.turns else None
        encoded.append(
            EncodedPrompt(
                prompt.id, tokens, cut, prompt.category, messages, prompt.turns, prompt.root
            )
        )
    return encoded


def prompt_room(max_positions: int, new_tokens: int, max_prompt_tokens: int | None = None) -> int:
    """The most tokens that a prompt may have. Raises `UserError` where none are left."""
    room = max_positions - new_tokens
    if max_prompt_tokens is not None:
        room = min(room, max_prompt_tokens)
    if room < 1:
        raise UserError(
            f"{new_tokens} new tokens leave no room for a prompt: the target has {max_positions} "
            "positions",
            hint="lower --max-new-tokens",
        )
    return room


def encode_history(messages: list[Message], tokenizer: Any, where: str) -> list[int]:
    """Token ids of a conversation that holds answers already, ready for the next one.

    Through the target's chat template; without one its messages are joined by line ends.
    """
    if getattr(tokenizer, "chat_template", None):
        text, special = _apply_template(where, messages, tokenizer, True), False
    else:
        text, special = _joined(messages), True
    return _tokenize(tokenizer, {0: text}, special=special)[0]


def _texts(
    prompts: Sequence[Prompt], tokenizer: Any, chat: Chat
) -> tuple[dict[int, str], dict[int, str]]:
    """Prompt texts by index: plain ones, and those that the chat template has made."""
    plain: dict[int, str] = {}
    templated: dict[int, str] = {}
    has_template = bool(getattr(tokenizer, "chat_template", None))
    for i, prompt in enumerate(prompts):
        messages = prompt.messages
        if messages is None and chat == "always":
            messages = [{"role": "user", "content": prompt.text or ""}]
        if messages is None:
            plain[i] = prompt.text or ""
        elif chat == "never" or (chat == "auto" and not has_template and len(messages) == 1):
            plain[i] = _joined(messages)
        else:
            given = {"tools": prompt.tools, **(prompt.template_kwargs or {})}
            templated[i] = _apply_template(prompt.id, messages, tokenizer, has_template, **given)
    return plain, templated


def _answer_text(prompt: Prompt) -> str | None:
    return prompt.answer["content"] if prompt.answer else prompt.response


def _joined(messages: list[Message]) -> str:
    return "\n".join(message["content"] or "" for message in messages)


def _apply_template(
    where: str, messages: list[Message], tokenizer: Any, has_template: bool, **given: Any
) -> str:
    if not has_template:
        raise UserError(
            "is a conversation, but the target's tokenizer has no chat template",
            where=where,
            hint='give rows with "prompt" or "text", or --chat never',
        )
    try:
        return str(
            tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False, **given
            )
        )
    except Exception as error:  # templates are programs: they raise what they like
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(
            f"the target's chat template refused this conversation ({error}); its roles: {roles}",
            where=where,
            hint="change the order of its messages to what the template expects",
        ) from error


def _tokenize(tokenizer: Any, texts: dict[int, str], *, special: bool) -> dict[int, list[int]]:
    if not texts:
        return {}
    ids = tokenizer(list(texts.values()), add_special_tokens=special, verbose=False)["input_ids"]
    return dict(zip(texts, ids, strict=True))


def _too_long(where: str, found: int, room: int, positions: int, new: int) -> UserError:
    limit = "as --max-prompt-tokens says"
    if room == positions - new:
        limit = f"the target has {positions:,} positions and {new:,} are kept for new tokens"
    return UserError(
        f"the prompt has {found:,} tokens, expected at most {room:,} ({limit})",
        where=where,
        hint="--truncate-prompts keeps its last tokens; or remove this row",
    )

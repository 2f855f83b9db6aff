"""One row: the shapes it may have, and what is wrong with it when it has none."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from bench.prompts.formats.faults import kind_of, shortened, text_of, wrong
from bench.prompts.formats.logs import ASKED, is_cut, refuse_unread, template_kwargs, unwrapped
from bench.prompts.formats.messages import OTHER_MEDIA, parsed, read_messages, read_tools
from bench.prompts.rows import Message, Prompt, passages, root_of, root_of_text

CONVERSATIONS = ("messages", "conversations", "conversation")
RESPONSES = ("response", "completion", "output", "answer", "canonical_solution")
PROMPT_IDS, RESPONSE_IDS = "prompt_token_ids", "response_token_ids"
SYSTEMS = ("system", "system_prompt", "system_message")
SHAPES = (
    '{"messages": [{"role": "user", "content": "..."}]}, {"prompt": "...", "response": "..."}, '
    '{"turns": ["..."]}, {"question": "...", "answer": "..."} or {"text": "..."}'
)


def parse_row(
    row: Any, where: str, seen: Counter[str], *, prompt_tokens: int, seed: int
) -> list[Prompt]:
    """The prompts of one row: one, or several passages of a long text. `UserError` if malformed."""
    if not isinstance(row, dict):
        raise wrong(f"found {kind_of(row)}", f"an object such as {SHAPES}", where)
    row = unwrapped(row, where)
    refuse_unread(row, where)
    if media := [name for name in OTHER_MEDIA if row.get(name)]:
        raise wrong(f'has "{media[0]}"', "text alone", where)
    prompt = _tokens(row, where) or _plain(row, where) or _conversation(row, where, seen)
    if prompt is None and "text" in row:
        text = text_of(row["text"], '"text"', where)
        return passages(
            text,
            where,
            prompt_tokens=prompt_tokens,
            seed=seed,
            category=_category(row),
        )
    if prompt is None:
        keys = ", ".join(sorted(map(str, row))) or "no keys"
        raise wrong(f"found a row with {shortened(keys)}", f"one of {SHAPES}", where)
    return [replace(prompt, category=_category(row), cut=is_cut(row))]


def _tokens(row: dict[str, Any], where: str) -> Prompt | None:
    """A row of token ids, as `serve --collect --keep-ids` writes them; None for another."""
    if PROMPT_IDS not in row or any(row.get(name) for name in ASKED):
        return None
    ids, answer = (_ids(row, name, where) for name in (PROMPT_IDS, RESPONSE_IDS))
    if not ids:
        raise wrong(f'"{PROMPT_IDS}" is empty', "token ids", where)
    root = row.get("root")
    key = root if isinstance(root, str) and root else " ".join(map(str, ids))
    return Prompt(where, ids=ids, response_ids=answer, split_key=key)


def _ids(row: dict[str, Any], name: str, where: str) -> tuple[int, ...]:
    ids = row.get(name) or []
    if not isinstance(ids, list):
        raise wrong(f'"{name}" is {kind_of(ids)}', "a list of token ids", where)
    if odd := [one for one in ids if type(one) is not int or one < 0]:
        raise wrong(f'"{name}" has {shortened(repr(odd[0]))} in it', "token ids alone", where)
    return tuple(ids)


def _plain(row: dict[str, Any], where: str) -> Prompt | None:
    """A row whose prompt is text; None for another. One with a system prompt is a conversation."""
    if "prompt" not in row or any(row.get(name) for name in CONVERSATIONS):
        return None
    given = row["prompt"]
    one = isinstance(given, list) and len(given) == 1 and isinstance(given[0], str)
    text = given[0] if one else given
    if isinstance(parsed(text), list) and not isinstance(text, str):
        if all(isinstance(message, dict) for message in text) and text:
            return None  # TRL's conversational prompt
        kinds = kind_of(text[0]) if text else "nothing"
        raise wrong(f'"prompt" is a list of {kinds}', "text or messages", where)
    text = text_of(text, '"prompt"', where)
    if _system(row) or _tools(row, where):
        return None
    response = _response(row, where)
    if isinstance(response, list):
        raise wrong('"prompt" is text and its answer is not', "both as text or messages", where)
    return Prompt(where, text=text, response=response, split_key=root_of_text(text))


def _conversation(row: dict[str, Any], where: str, seen: Counter[str]) -> Prompt | None:
    """A row that is a conversation in any of its shapes; None for another."""
    later: tuple[str, ...] = ()
    responses: tuple[str, ...] = RESPONSES
    if name := next((name for name in CONVERSATIONS if row.get(name) is not None), None):
        messages = read_messages(row[name], f'"{name}"', where, seen)
        responses = ("response", "completion")  # an `answer` may be a mark to grade by
    elif isinstance(row.get("prompt"), list):
        messages = read_messages(row["prompt"], '"prompt"', where, seen)
    elif "turns" in row:
        turns = row["turns"]
        if not isinstance(turns, list) or not turns:
            raise wrong(f'"turns" is {kind_of(turns)}', "a list with at least one string", where)
        first, *rest = [text_of(turn, f'"turns"[{i}]', where) for i, turn in enumerate(turns)]
        messages, later, responses = [_user(first)], tuple(rest), ()
    elif asked := next((k for k in ("prompt", "question", "instruction") if k in row), None):
        messages = [*_history(row, where), _user(_question(row, asked, where))]
    elif name := next((name for name in CONVERSATIONS if name in row), None):
        raise wrong(f'"{name}" is {kind_of(row[name])}', "a list of messages", where)
    else:
        return None
    messages = _with_system(messages, _system(row), where, seen)
    messages = _with_answer(messages, _response(row, where, responses), where, seen)
    answer = messages.pop() if messages[-1]["role"] == "assistant" else None
    if not any(message["role"] == "user" for message in messages):
        raise wrong("has no user message to answer", "a user message", where)
    return Prompt(
        where,
        messages=messages,
        tools=_tools(row, where),
        answer=answer,
        split_key=root_of(messages),
        turns=later,
        template_kwargs=template_kwargs(row, where),
    )


def _tools(row: dict[str, Any], where: str) -> list[dict[str, Any]] | None:
    return read_tools(row.get("tools") or row.get("functions"), where)


def _question(row: dict[str, Any], name: str, where: str) -> str:
    """The question, or Alpaca's instruction with its input."""
    asked = text_of(row[name], f'"{name}"', where)
    for beside in ("input", "context"):
        more = row.get(beside)
        if not isinstance(more, str) or not more.strip():
            continue
        if name != "instruction":
            raise wrong(f'has "{beside}" beside "{name}"', "all of it in one text", where)
        return f"{asked}\n\n{more}"
    return asked


def _history(row: dict[str, Any], where: str) -> list[Message]:
    """The earlier turns of an instruction: pairs of what was said and answered."""
    messages: list[Message] = []
    for i, pair in enumerate(row.get("history") or []):
        if not isinstance(pair, list) or len(pair) != 2:
            raise wrong(f'"history"[{i}] is {kind_of(pair)}', "a question and its answer", where)
        said, answered = (text_of(text, f'"history"[{i}]', where) for text in pair)
        messages += [_user(said), {"role": "assistant", "content": answered}]
    return messages


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _system(row: dict[str, Any]) -> str | None:
    """The system prompt that stands beside what is asked, if it says anything."""
    found = (row[name] for name in SYSTEMS if isinstance(row.get(name), str))
    return next((text for text in found if text.strip()), None)


def _with_system(
    messages: list[Message], system: str | None, where: str, seen: Counter[str]
) -> list[Message]:
    if system is None:
        return messages
    first = messages[0]
    if first["role"] not in ("system", "developer"):
        seen["rows with a system prompt beside the conversation, now its first message"] += 1
        return [{"role": "system", "content": system}, *messages]
    if first["content"] != system:
        raise wrong("has two system prompts", "one", where)
    return messages


def _with_answer(
    messages: list[Message], answer: Any, where: str, seen: Counter[str]
) -> list[Message]:
    """The messages with the answer that the row gives beside them: text or messages."""
    if answer is None:
        return messages
    if isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer}]
    said = read_messages(answer, "its answer", where, seen)
    if said[-1]["role"] != "assistant":
        raise wrong("its answer is not the assistant's", "a message of the assistant", where)
    if messages[-1]["role"] == "assistant":
        if messages[-1] != said[-1]:
            raise wrong("has two answers", "one", where)
        return messages
    return [*messages, *said]


def _response(row: dict[str, Any], where: str, names: tuple[str, ...] = RESPONSES) -> Any:
    """The row's answer: text, or a list of messages."""
    for name in names:
        value = row.get(name)
        if isinstance(value, dict):
            return [value]
        if isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
            return value
        if value is not None:
            return text_of(value, f'"{name}"', where)
    return None


def _category(row: dict[str, Any]) -> str | None:
    category = row.get("category")
    return category if isinstance(category, str) else None

"""One row of a prompts file: the shapes it may have, and what is wrong with it when it has none."""

from __future__ import annotations

import gzip
import json
import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from drafts.errors import UserError

Message = dict[str, Any]
ROLES = ("system", "developer", "user", "assistant", "tool")
RESPONSE_KEYS = ("response", "completion", "answer", "canonical_solution")
SHAPES = (
    '{"messages": [{"role": "user", "content": "..."}]}, {"prompt": "...", "response": "..."}, '
    '{"turns": ["..."]}, {"question": "...", "answer": "..."} or {"text": "..."}'
)
CHARS_PER_TOKEN = 4  # a rough rate: only sizes passages, never counts tokens
PASSAGES_PER_TEXT = 8


@dataclass(frozen=True)
class Prompt:
    """What the target is asked: either chat `messages` or plain `text`.

    `id` says where it came from (`file:line`). `messages` are as a chat template takes them (role,
    content, which is text or None, tool_calls, tool_call_id, name, reasoning_content), up to the
    last recorded answer; earlier turns of the assistant stand inside. `tools` are what its template
    is told of functions, `template_kwargs` what its row says to the template beside them. `answer`
    is the recorded last message of a conversation, `response` the recorded answer to a `text`;
    `cut` says that a length limit ended it, so that it has no end of its own. With `head_tokens`,
    the first so many tokens of `text` are the prompt and the rest is its true continuation (source
    files, documents). `split_key` is the text that decides on the train or eval side. `turns` are
    what the user says later, each after an answer to what came before.
    """

    id: str
    messages: list[Message] | None = None
    tools: list[dict[str, Any]] | None = None
    text: str | None = None
    response: str | None = None
    answer: Message | None = None
    cut: bool = False
    category: str | None = None
    head_tokens: int | None = None
    split_key: str = ""
    turns: tuple[str, ...] = ()
    template_kwargs: dict[str, Any] | None = None


def read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (`file:line`, value) for each line that is not blank. Reads .gz too."""
    number = 0
    opened: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}:{number}", decode_line(line, f"{path}:{number}")
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise UserError(
            "is not a whole gzip file",
            where=f"{path}:{number + 1}",
            hint="fetch it again, or give it unpacked",
        ) from None


def decode_line(line: bytes, where: str) -> Any:
    """The value of one line of JSONL. `UserError` if it is none."""
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(
            f"found byte 0x{line[error.start]:02x} at column {error.start + 1}, expected UTF-8",
            where=where,
            hint="save the file as UTF-8",
        ) from None
    except json.JSONDecodeError as error:
        found = line.decode().strip()
        raise UserError(
            f"is not valid JSON ({error.msg} at column {error.colno}); found {_short(found)}, "
            "expected one JSON object on each line",
            where=where,
            hint="repair or remove this line",
        ) from None


def parse_row(row: Any, where: str, *, prompt_tokens: int, seed: int) -> list[Prompt]:
    """The prompts of one row: one, or several passages of a long text. `UserError` if malformed."""
    if not isinstance(row, dict):
        raise _wrong(f"found {_kind(row)}", f"an object such as {SHAPES}", where)
    category = row.get("category")
    category = category if isinstance(category, str) else None
    if "messages" in row:
        return [_from_messages(row["messages"], where, category)]
    if "turns" in row:
        turns = row["turns"]
        if not isinstance(turns, list) or not turns:
            raise _wrong(f'"turns" is {_kind(turns)}', "a list with at least one string", where)
        first, *later = [_string(turn, f'"turns"[{i}]', where) for i, turn in enumerate(turns)]
        return [replace(_ask(first, where, None, category), turns=tuple(later))]
    if "prompt" in row:
        text = _string(row["prompt"], '"prompt"', where)
        response = _response(row, where)
        return [Prompt(where, text=text, response=response, category=category, split_key=text)]
    if "question" in row:
        question = _string(row["question"], '"question"', where)
        return [_ask(question, where, _response(row, where), category)]
    if "text" in row:
        text = _string(row["text"], '"text"', where)
        return passages(text, where, prompt_tokens=prompt_tokens, seed=seed, category=category)
    keys = ", ".join(sorted(map(str, row))) or "no keys"
    raise _wrong(f"found a row with {_short(keys)}", f"one of {SHAPES}", where)


def as_conversation(prompt: Prompt) -> Prompt:
    """A recorded conversation from its start: the later user messages become `turns`.

    The answers that it recorded between them are left out, for whoever is measured writes them.
    Anything but plain alternation (tool messages, two user messages in a row) stays as it is.
    """
    messages = prompt.messages or []
    first = next((i for i, message in enumerate(messages) if message["role"] == "user"), 0)
    opening, later = messages[: first + 1], messages[first + 1 :]
    roles = [message["role"] for message in later]
    if not later or roles != ["assistant", "user"] * (len(roles) // 2):
        return prompt
    turns = (*(message["content"] for message in later[1::2]), *prompt.turns)
    return replace(prompt, messages=opening, turns=turns, answer=None)


def passages(
    text: str, where: str, *, prompt_tokens: int, seed: int, category: str | None = None
) -> list[Prompt]:
    """Cut a long text into passages that start at line starts; the offsets come from `seed`."""
    window = 4 * CHARS_PER_TOKEN * prompt_tokens
    count = min(PASSAGES_PER_TEXT, len(text) // window)
    name = where.rsplit("/", 1)[-1]  # not the folder: the offsets must not depend on it
    rng = random.Random(f"{seed}:{name}:{len(text)}")
    starts = {0} if count == 0 else set()
    for i in range(count):
        first, last = i * len(text) // count, (i + 1) * len(text) // count
        position = rng.randrange(first, first + (last - first) // 2)
        line = text.rfind("\n", 0, position) + 1
        starts.add(line if line >= first or i == 0 else position)
    key = split_key(text)
    found = []
    for start in sorted(starts):
        label = f"{where}:{text.count(chr(10), 0, start) + 1}"
        passage = text[start : start + window]
        if passage.strip():
            found.append(
                Prompt(
                    label,
                    text=passage,
                    category=category,
                    head_tokens=prompt_tokens,
                    split_key=key,
                )
            )
    return found


def split_key(text: str) -> str:
    """The first 200 characters past licence and comment lines: alike for near-copies of a file."""
    marks = ("//", "/*", "*", "# ")
    lines = (line for line in text[:20_000].splitlines() if line.strip())
    body = "\n".join(line for line in lines if not line.lstrip().startswith(marks))
    return (body or text)[:200]


def _from_messages(messages: Any, where: str, category: str | None) -> Prompt:
    if not isinstance(messages, list) or not messages:
        raise _wrong(f'"messages" is {_kind(messages)}', "a list of messages", where)
    clean = []
    for i, message in enumerate(messages):
        name = f'"messages"[{i}]'
        if not isinstance(message, dict):
            raise _wrong(f"{name} is {_kind(message)}", "an object with role and content", where)
        role = message.get("role")
        if role not in ROLES:
            raise _wrong(f"{name} has the role {_short(repr(role))}", " or ".join(ROLES), where)
        clean.append({"role": role, "content": _string(message.get("content"), name, where)})
    answer = clean.pop() if clean[-1]["role"] == "assistant" else None
    if not any(message["role"] == "user" for message in clean):
        raise _wrong('"messages" has no user message to answer', "a user message", where)
    key = "\n".join(message["content"] for message in clean)
    return Prompt(where, messages=clean, answer=answer, category=category, split_key=key)


def _ask(question: str, where: str, response: str | None, category: str | None) -> Prompt:
    messages = [{"role": "user", "content": question}]
    answer = None if response is None else {"role": "assistant", "content": response}
    return Prompt(where, messages=messages, answer=answer, category=category, split_key=question)


def _response(row: dict[str, Any], where: str) -> str | None:
    for key in RESPONSE_KEYS:
        if row.get(key) is not None:
            return _string(row[key], f'"{key}"', where)
    return None


def _string(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise _wrong(f"{name} is {_kind(value)}", "text", where)
    if not value.strip():
        raise _wrong(f"{name} is empty", "some text", where)
    return value


def _wrong(found: str, expected: str, where: str) -> UserError:
    return UserError(
        f"{found}; expected {expected}", where=where, hint="repair or remove this line"
    )


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    names |= {int: "a number", float: "a number", type(None): "null"}
    empty = isinstance(value, (list, dict, str)) and not value
    return ("empty: " if empty else "") + names.get(type(value), type(value).__name__)


def _short(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else f"{text[:limit]}..."

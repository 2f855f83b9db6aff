"""The record of a prompt, whatever row or file it came from, and what is made of texts."""

from __future__ import annotations

import hashlib
import random
import re
from dataclasses import dataclass, replace
from typing import Any

Message = dict[str, Any]  # see `bench.prompts.formats.messages`

CHARS_PER_TOKEN = 4  # a rough rate: only sizes passages, never counts tokens
PASSAGES_PER_TEXT = 8
ROOTS = 1 << 63  # their number; a store keeps them as int64
# Where the usual chat templates begin an answer: what stands before is the conversation's root.
ANSWER_BEGINS = re.compile(
    r"<\|im_start\|>assistant|<\|start_header_id\|>assistant|<\|assistant\|>|<\|Assistant\|>"
    r"|<｜Assistant｜>|<start_of_turn>model|<\|start\|>assistant|\[/INST\]|<\|CHATBOT_TOKEN\|>"
    r"|^(?:ASSISTANT|Assistant|### Response|### Assistant):",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Prompt:
    """What the target is asked: chat `messages`, plain `text`, or token `ids`.

    `id` says where it came from (`file:line`). `messages` are as a chat template takes them (role,
    content, which is text or None, tool_calls, tool_call_id, name, reasoning_content), up to the
    last recorded answer; earlier turns of the assistant stand inside. `tools` are what its template
    is told of functions, `template_kwargs` what its row says to the template beside them. `answer`
    is the recorded last message of a conversation, `response` the recorded answer to a `text`;
    `cut` says that a length limit ended it, so that it has no end of its own. With `head_tokens`,
    the first so many tokens of `text` are the prompt and the rest is its true continuation (source
    files, documents). `response_ids` is the recorded answer to `ids`, its end token included.
    `split_key` is the text that decides on the train or eval side. `turns` are what the user says
    later, each after an answer to what came before.
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
    ids: tuple[int, ...] | None = None
    response_ids: tuple[int, ...] = ()

    @property
    def root(self) -> int:
        """A number below `ROOTS` for where it begins; all that begins alike has the same."""
        key = " ".join(self.split_key.split())
        digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
        return int(digest[:16], 16) >> 1


def root_of(messages: list[Message]) -> str:
    """Where a conversation begins: its messages up to the user's first, however it goes on."""
    users = (i for i, message in enumerate(messages) if message["role"] == "user")
    return "\n".join(message["content"] or "" for message in messages[: next(users, 0) + 1])


def root_of_text(text: str) -> str:
    """The same of a prompt that a chat template has made: all before its first answer."""
    found = ANSWER_BEGINS.search(text)
    return text[: found.start()] if found and found.start() else text


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

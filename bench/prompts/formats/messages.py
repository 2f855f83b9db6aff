"""Chat messages as logs and datasets write them, made into what a chat template takes.

A message is a dict with `role` (system, developer, user, assistant or tool), `content` (text, or
None beside tool calls), and where it has them `tool_calls`, `tool_call_id`, `name` and
`reasoning_content`. The arguments of a tool call stay as they were written, text or object.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from bench.prompts.formats.faults import kind_of, shortened, text_of, wrong
from bench.prompts.rows import Message

ROLES = ("system", "developer", "user", "assistant", "tool")
ALIASES = {
    **{role: role for role in ROLES},
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "bot", "chatbot", "chatgpt", "model", "ai"), "assistant"),
    **dict.fromkeys(
        ("function", "observation", "ipython", "tool_response", "function_response"), "tool"
    ),
    **dict.fromkeys(("function_call", "tool_call"), "call"),
}
MAY_BE_EMPTY = ("system", "developer", "tool")
TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text"}
REASONING = ("reasoning_content", "reasoning", "thinking")
# What only a model that sees or hears takes, and what a template would be told of elsewhere.
OTHER_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
NOT_IN_A_MESSAGE = (*OTHER_MEDIA, "tools", "functions", "documents")


def read_messages(value: Any, name: str, where: str, seen: Counter[str]) -> list[Message]:
    """The messages of a list, by role and content or by from and value (ShareGPT).

    A speaker whose name is no role, such as a model's, is taken for the assistant where it is the
    assistant's turn, and counted in `seen`. Raises `UserError` for what no template takes.
    """
    value = parsed(value)
    if not isinstance(value, list) or not value:
        raise wrong(f"{name} is {kind_of(value)}", "a list of messages", where)
    messages: list[Message] = []
    for i, raw in enumerate(value):
        previous = messages[-1]["role"] if messages else None
        messages.append(_message(raw, f"{name}[{i}]", where, previous, seen))
    return messages


def read_tools(value: Any, where: str) -> list[dict[str, Any]] | None:
    """What a row says of functions, as a chat template takes them; None for none."""
    value = parsed(value)
    if value in (None, "", [], {}):
        return None
    if not isinstance(value, list):
        raise wrong(f'"tools" is {kind_of(value)}', "a list of functions", where)
    return [_tool(parsed(tool), f'"tools"[{i}]', where) for i, tool in enumerate(value)]


def parsed(value: Any) -> Any:
    """`value`, or what it holds where it is the text of a JSON list or object."""
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _message(raw: Any, name: str, where: str, previous: str | None, seen: Counter[str]) -> Message:
    if not isinstance(raw, dict):
        raise wrong(f"{name} is {kind_of(raw)}", "an object with role and content", where)
    for key in NOT_IN_A_MESSAGE:
        if raw.get(key):
            raise wrong(f'{name} has "{key}"', "text alone, and functions beside messages", where)
    role = _role(raw, name, where, previous, seen)
    content = _content(raw.get("content", raw.get("value")), name, where)
    calls = raw.get("tool_calls") or raw.get("function_call") or None
    if role == "call":
        role, content, calls = "assistant", None, content
    message: Message = {"role": role, "content": content}
    if calls is not None:
        calls = parsed(calls)
        calls = calls if isinstance(calls, list) else [calls]
        message["tool_calls"] = [_call(parsed(call), name, where) for call in calls]
    for key in ("tool_call_id", "name"):
        if isinstance(raw.get(key), str):
            message[key] = raw[key]
    reasoning = next((raw[key] for key in REASONING if raw.get(key)), None)
    if reasoning is not None:
        message["reasoning_content"] = text_of(reasoning, f"the reasoning of {name}", where)
    if role in MAY_BE_EMPTY and content is None:
        raise wrong(f"{name} ({role}) has no content", "text", where)
    if role not in MAY_BE_EMPTY and not (role == "assistant" and calls):
        text_of(content, name, where)
    return message


def _role(
    raw: dict[str, Any], name: str, where: str, previous: str | None, seen: Counter[str]
) -> str:
    """One of `ROLES`, or "call" for a turn that is a call of a function."""
    given = raw.get("role", raw.get("from"))
    written = given.strip() if isinstance(given, str) else ""
    role = ALIASES.get(written.lower())
    if role is not None:
        return role
    if "role" not in raw and written and previous in ("user", "tool"):
        seen[f"turns from {written!r}, which is no role, taken for the assistant's"] += 1
        return "assistant"
    raise wrong(f"{name} has the role {shortened(repr(given))}", " or ".join(ROLES), where)


def _content(value: Any, name: str, where: str) -> str | None:
    """Text, with the text parts of a list joined as vLLM joins them: by line ends."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise wrong(f"{name} is {kind_of(value)}", "text", where)
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part if isinstance(part, str) else None
        if kind in TEXT_PARTS:
            text = part.get(TEXT_PARTS[kind])
        if not isinstance(text, str):
            found = repr(kind) if kind else kind_of(part)
            raise wrong(f"{name} has a part of the type {found}", "parts of text", where)
        texts.append(text)
    return "\n".join(texts)


def _call(call: Any, name: str, where: str) -> dict[str, Any]:
    """A tool call as OpenAI writes it, from that or from its function alone."""
    if isinstance(call, dict) and "function" not in call and "name" in call:
        call = {"function": {key: call[key] for key in ("name", "arguments") if key in call}}
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise wrong(
            f"{name} calls {shortened(repr(call))}",
            'a function: {"function": {"name": "...", "arguments": ...}}',
            where,
        )
    if call.get("type") not in (None, "function"):
        raise wrong(f"{name} calls a tool of the type {call['type']!r}", "function", where)
    own = {"id": call["id"]} if call.get("id") else {}
    return {**own, "type": "function", "function": function}


def _tool(tool: Any, name: str, where: str) -> dict[str, Any]:
    if isinstance(tool, dict) and tool.get("type") not in (None, "function"):
        raise wrong(f"{name} is of the type {tool['type']!r}", "function", where)
    if isinstance(tool, dict) and "function" not in tool and "input_schema" not in tool:
        tool = {"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}}
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise wrong(
            f"{name} is {shortened(repr(tool))}",
            'a function: {"type": "function", "function": {"name": "...", "parameters": ...}}',
            where,
        )
    return {"type": "function", **tool}

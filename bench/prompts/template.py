"""Conversations as text, by the target's chat template, told what vLLM's server tells it.

What a template is given, as vLLM 0.32 gives it (`vllm/renderers`): no content as empty text, the
arguments of calls as objects, reasoning under both of its names, content as a list of parts where
the template reads nothing else, a developer's message as the system's where it knows no developer.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property, lru_cache
from typing import Any

from bench.prompts.rows import Message
from drafts.errors import UserError, first_line

MARK = "§answer§"  # no template writes it by itself
OURS = {  # what a template is told by the conversation and by the tokenizer's own method
    "add_generation_prompt", "chat_template", "continue_final_message", "conversation", "messages",
    "padding", "return_assistant_tokens_mask", "return_dict", "return_tensors", "strftime_now",
    "tokenize", "tokenizer_kwargs", "tools", "truncation",
}  # fmt: skip


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template with what it is told beside messages and tools.

    `kwargs` are further variables (a switch for thinking, say); `date` is what its clock says, in
    ISO format. Raises `UserError` for variables that the template does not read.
    """

    tokenizer: Any
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    date: str | None = None

    def __post_init__(self) -> None:
        for name in self.kwargs:
            if name not in self._variables:
                reads = ", ".join(sorted(self._variables)) or "nothing that can be given"
                raise UserError(
                    f"--chat-template-kwargs has {name!r}, which the target's chat template does "
                    f"not read; it reads {reads}",
                    hint="correct the name, or leave it out",
                )

    @cached_property
    def source(self) -> str:
        """All that the tokenizer has of templates, as text; empty where it has none."""
        found = getattr(self.tokenizer, "chat_template", None)
        return found if isinstance(found, str) else json.dumps(found) if found else ""

    @property
    def has_clock(self) -> bool:
        """Whether what it makes may change from day to day."""
        return "strftime_now" in self.source

    def record(self) -> dict[str, Any]:
        """What decides, beside the messages, what it makes: for stores and reports."""
        return {
            "chat_template_sha256": hashlib.sha256(self.source.encode()).hexdigest(),
            "chat_template_kwargs": dict(self.kwargs),
            "chat_date": self.date if self.has_clock else None,
        }

    def text(
        self,
        messages: Sequence[Message],
        where: str,
        *,
        ask: bool,
        tools: list[dict[str, Any]] | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as text; with `ask` it ends where the assistant begins to write.

        `kwargs` are the row's own variables, which win; those that the template does not read are
        passed over, as a server does. Raises `UserError` where it refuses the conversation.
        """
        if not self.source:
            raise UserError(
                "is a conversation, but the target's tokenizer has no chat template",
                where=where,
                hint='give rows with "prompt" or "text", or --chat never',
            )
        served = [self._served(message, where) for message in messages]
        if not self._knows_developer and any(m["role"] == "developer" for m in served):
            served = _without_developer(served)
        try:
            return self._render(served, ask, tools, kwargs or {})
        except Exception as error:  # templates are programs: they raise what they like
            roles = ", ".join(message["role"] for message in messages)
            raise UserError(
                f"the target's chat template refused this conversation ({first_line(error)}); "
                f"its roles: {roles}",
                where=where,
                hint="change the order of its messages to what the template expects",
            ) from error

    def require_all_read(
        self,
        messages: Sequence[Message],
        where: str,
        *,
        tools: list[dict[str, Any]] | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Raise `UserError` where the template leaves out what somebody said, a call, or tools."""

        def made(changed: Sequence[Message], told: list[dict[str, Any]] | None) -> str | None:
            try:
                return self.text(changed, where, ask=True, tools=told, kwargs=kwargs)
            except UserError:  # it minds the change, so it reads what was changed
                return None

        whole = made(messages, tools)
        lost = None
        if tools and made(messages, None) == whole:
            lost = '"tools"'
        for i, message in enumerate(messages):
            said = (message["content"] or "").strip()
            calls = message.get("tool_calls")
            if calls:
                change: Message = {"tool_calls": [_renamed(call) for call in calls]}
            elif message["role"] != "assistant" and said and said not in (whole or said):
                change = {"content": MARK}
            else:
                continue
            if made([*messages[:i], {**message, **change}, *messages[i + 1 :]], tools) == whole:
                lost = f"{next(iter(change))} of message {i + 1} ({message['role']})"
        if lost:
            raise UserError(
                f"the target's chat template leaves out {lost}, so that the model would not see it",
                where=where,
                hint="use the template that the model is served with (chat_template.jinja in its "
                "folder), or remove it from the row",
            )

    @cached_property
    def closing(self) -> str:
        """What follows an assistant's content: the end of its turn and, it may be, a line end."""
        asked = [{"role": "user", "content": "."}, {"role": "assistant", "content": MARK}]
        try:
            return self.text(asked, "", ask=False).rpartition(MARK)[2]
        except UserError:
            return ""

    @cached_property
    def user_turn(self) -> tuple[str, str]:
        """What stands before a user's first words, and what follows them up to the answer.

        Raises `UserError` where there is no template, or one that shows no user's words.
        """
        where = str(getattr(self.tokenizer, "name_or_path", "the target"))
        said = self.text([{"role": "user", "content": MARK}], where, ask=True)
        before, found, after = said.partition(MARK)
        if not found:
            raise UserError(
                "its chat template leaves out what a user says",
                where=where,
                hint="use the template that the model is served with (chat_template.jinja in its "
                "folder)",
            )
        return before, after

    @cached_property
    def end_id(self) -> int | None:
        """The special token that ends an assistant's turn, None where the template writes none."""
        special = set(self.tokenizer.all_special_ids)
        ids = self.tokenizer(self.closing, add_special_tokens=False)["input_ids"]
        return next((token for token in ids if token in special), None)

    def _render(
        self,
        messages: list[Message],
        ask: bool,
        tools: list[dict[str, Any]] | None,
        kwargs: Mapping[str, Any],
    ) -> str:
        own = {name: value for name, value in kwargs.items() if name in self._variables}
        told = {**self.kwargs, **own}
        if self.date is not None:
            told["strftime_now"] = datetime.fromisoformat(self.date).strftime
        made = self.tokenizer.apply_chat_template(
            messages, tools=tools or None, add_generation_prompt=ask, tokenize=False, **told
        )
        return str(made)

    def _served(self, message: Message, where: str) -> Message:
        served = {key: value for key, value in message.items() if value is not None}
        content = message.get("content") or ""
        served["content"] = [{"type": "text", "text": content}] if self._parts_alone else content
        if not served.get("tool_calls"):
            served.pop("tool_calls", None)
        else:
            served["tool_calls"] = [_parsed(call, where) for call in served["tool_calls"]]
        if "reasoning_content" in served:
            served["reasoning"] = served["reasoning_content"]
        return served

    @cached_property
    def _parts_alone(self) -> bool:
        """Whether it reads content as a list of parts and would lose plain text."""

        def shown(content: Any) -> bool:
            try:
                return MARK in self._render([{"role": "user", "content": content}], True, None, {})
            except Exception:  # as above
                return False

        return not shown(MARK) and shown([{"type": "text", "text": MARK}])

    @cached_property
    def _knows_developer(self) -> bool:
        return "'developer'" in self.source or '"developer"' in self.source

    @cached_property
    def _variables(self) -> set[str]:
        """The names that it reads, that it does not set itself, and that are free to be given."""
        import jinja2.ext
        import jinja2.meta

        found = getattr(self.tokenizer, "chat_template", None) or ""
        environment = jinja2.Environment(extensions=[jinja2.ext.loopcontrols])
        names: set[str] = set()
        for source in [found] if isinstance(found, str) else found.values():
            plain = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", source)  # transformers' own tag
            try:
                names |= jinja2.meta.find_undeclared_variables(environment.parse(plain))
            except jinja2.TemplateSyntaxError as error:
                raise UserError(
                    f"the target's chat template is not valid Jinja: {first_line(error)}",
                    where=getattr(self.tokenizer, "name_or_path", None),
                    hint="fetch the target's tokenizer files again",
                ) from None
        return names - OURS - {"raise_exception", *self.tokenizer.special_tokens_map}


@lru_cache(maxsize=1)
def today() -> str:
    """The day on which this process first asked, in ISO format: one for all of a run."""
    return datetime.now().date().isoformat()


def _parsed(call: dict[str, Any], where: str) -> dict[str, Any]:
    """A call whose arguments are an object, as templates expect them."""
    function = dict(call["function"])
    given = function.get("arguments") or {}
    try:
        arguments = json.loads(given) if isinstance(given, str) else given
    except json.JSONDecodeError:
        arguments = None
    if not isinstance(arguments, dict):
        raise UserError(
            f"the arguments of the call to {function.get('name')!r} are no JSON object: {given!r}",
            where=where,
            hint="repair or remove this row",
        )
    return {**call, "function": {**function, "arguments": arguments}}


def _renamed(call: dict[str, Any]) -> dict[str, Any]:
    return {**call, "function": {**call["function"], "name": MARK}}


def _without_developer(messages: list[Message]) -> list[Message]:
    """The developer's messages as the system's, all of which are then one, at the start."""
    instructing = ("system", "developer")
    rest = [message for message in messages if message["role"] not in instructing]
    told = [_plain(message["content"]) for message in messages if message["role"] in instructing]
    return [{"role": "system", "content": "\n\n".join(filter(None, told))}, *rest]


def _plain(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content)

"""Prompts as token ids of one target, each with room for its answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from bench.prompts.formats.collect import usable
from bench.prompts.rows import Message, Prompt
from bench.prompts.template import ChatTemplate
from drafts.errors import UserError

Chat = Literal["auto", "always", "never"]
INSTRUCTING = ("system", "developer")  # roles that stay when old turns are dropped


@dataclass(frozen=True)
class Dialogue:
    """A conversation with the places in `script` (from 0, rising) that the target answers.

    What stands in `script` at those places was recorded, or is empty. `tools` and `kwargs` are
    what its row tells the template; a `plain` one is joined by line ends instead.
    """

    id: str
    script: tuple[Message, ...]
    asked: tuple[int, ...]
    tools: list[dict[str, Any]] | None = None
    kwargs: Mapping[str, Any] | None = None
    plain: bool = False

    def history(self, answers: Sequence[str]) -> list[Message]:
        """All that is said before the next answer, with `answers` where the first ones belong."""
        said = list(self.script[: self.asked[len(answers)]])
        for place, answer in zip(self.asked, answers, strict=False):
            said[place] = {"role": "assistant", "content": answer}
        return said

    def sketch(self) -> list[str]:
        """Answers to all turns but the last, as recorded or, where nothing was, a mere point."""
        return [self.script[place]["content"] or "." for place in self.asked[:-1]]


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt's token ids. Where more turns come, they are asked by `dialogue`."""

    id: str
    input_ids: list[int]
    category: str | None = None
    dialogue: Dialogue | None = None
    root: int | None = None  # the prompt's own

    @property
    def later(self) -> int:
        """The number of turns after the first."""
        return len(self.dialogue.asked) - 1 if self.dialogue else 0


@dataclass(frozen=True)
class Fitted:
    """A prompt as it is asked: its ids, its text, and the messages that were left of it."""

    ids: list[int]
    text: str
    messages: list[Message]


@dataclass(frozen=True)
class Encoder:
    """Prompts as the target's token ids, at most `room` of them, through its chat `template`.

    `chat`: "auto" uses the template for conversations, "always" for plain prompts too, "never"
    joins messages as plain text. A longer prompt is a `UserError`; with `truncate` a conversation
    loses its oldest turns and then the start of its oldest message, never the system's, and a plain
    text loses its start. `limit` says in errors where `room` comes from.
    """

    template: ChatTemplate
    room: int
    truncate: bool = False
    chat: Chat = "auto"
    limit: str = field(default="", compare=False)

    @property
    def tokenizer(self) -> Any:
        return self.template.tokenizer

    def dialogue(self, prompt: Prompt, *, replay: bool = False) -> Dialogue | None:
        """The prompt as a conversation, None for a plain text.

        The target answers after what is recorded, and after each of the later `turns`; with
        `replay` at every recorded turn of the assistant that follows a user's message, too. Raises
        `UserError` where the template leaves out what the prompt holds.
        """
        messages = prompt.messages
        if prompt.ids is not None or (messages is None and self.chat != "always"):
            return None
        if messages is None:
            text = prompt.text or ""
            if prompt.head_tokens is not None:
                ids = self.ids(text, begin=False)[: prompt.head_tokens]
                text = self.tokenizer.decode(ids)
            messages = [{"role": "user", "content": text}]
        answer = prompt.answer
        if answer is None and prompt.response is not None:
            answer = {"role": "assistant", "content": prompt.response}
        empty: Message = {"role": "assistant", "content": None}
        script, asked = [*messages, answer or empty], [len(messages)]
        for turn in prompt.turns:
            script += [{"role": "user", "content": turn}, empty]
            asked.append(len(script) - 1)
        if replay:
            roles = [message["role"] for message in messages]
            first = roles.index("user") if "user" in roles else len(roles)
            asked = [i for i in range(first, len(roles)) if roles[i] == "assistant"] + asked
        alone = self.chat == "auto" and not self.template.source and len(messages) == 1
        found = Dialogue(
            prompt.id,
            tuple(script),
            tuple(asked),
            prompt.tools,
            prompt.template_kwargs,
            plain=self.chat == "never" or alone,
        )
        self._require_read(found)
        return found

    def ask(self, dialogue: Dialogue, answers: Sequence[str] = ()) -> Fitted:
        """The prompt of the turn after `answers`."""
        return self.fit(dialogue, dialogue.history(answers))

    def fit(self, dialogue: Dialogue, messages: list[Message]) -> Fitted:
        """`messages` of the dialogue as a prompt, cut to the room where that is allowed."""
        fitted = self._made(dialogue, messages)
        found = len(fitted.ids)
        while len(fitted.ids) > self.room:
            if not self.truncate:
                raise self._too_long(dialogue.id, found)
            messages = _shorter(fitted.messages) or self._clipped(dialogue, fitted)
            fitted = self._made(dialogue, messages)
        return fitted

    def fit_plain(self, ids: list[int], where: str) -> list[int]:
        """Token ids of a plain text, cut to the room where that is allowed."""
        if not ids:
            raise UserError(
                "the prompt has no tokens; expected at least one",
                where=where,
                hint="repair or remove this row",
            )
        if len(ids) > self.room:
            if not self.truncate:
                raise self._too_long(where, len(ids))
            kept = ids[:1] if ids[0] in (self.tokenizer.bos_token_id, *self.begin) else []
            ids = [*kept, *ids[len(ids) - self.room + len(kept) :]]
        return ids

    def plain(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt that is no conversation, as many as there are."""
        if prompt.ids is not None:
            return list(prompt.ids)
        return self.ids(prompt.text or "", begin=True)[: prompt.head_tokens]

    def ids(self, text: str, *, begin: bool) -> list[int]:
        """Token ids of `text`; with `begin` after what the tokenizer begins a text with, once."""
        found = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ids = [int(token) for token in found]
        if begin and ids[: len(self.begin)] != self.begin:
            ids = [*self.begin, *ids]
        return ids

    @cached_property
    def begin(self) -> list[int]:
        """What the tokenizer puts before a text: a BOS, or nothing."""
        whole, bare = (
            list(self.tokenizer("a", add_special_tokens=special)["input_ids"])
            for special in (True, False)
        )
        starts = (i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
        return [int(token) for token in whole[: next(starts, 0)]]

    def _require_read(self, dialogue: Dialogue) -> None:
        if not dialogue.plain:
            said = dialogue.history(dialogue.sketch())
            self.template.require_all_read(
                said, dialogue.id, tools=dialogue.tools, kwargs=dialogue.kwargs
            )
        elif dialogue.tools or any(message.get("tool_calls") for message in dialogue.script):
            raise UserError(
                "has tools, which only a chat template can tell the model",
                where=dialogue.id,
                hint="use a target with a chat template and --chat auto, or remove this row",
            )

    def _made(self, dialogue: Dialogue, messages: list[Message]) -> Fitted:
        if dialogue.plain:
            text = "\n".join(message["content"] or "" for message in messages)
            return Fitted(self.ids(text, begin=True), text, messages)
        text = self.template.text(
            messages, dialogue.id, ask=True, tools=dialogue.tools, kwargs=dialogue.kwargs
        )
        return Fitted(self.ids(text, begin=False), text, messages)

    def _clipped(self, dialogue: Dialogue, fitted: Fitted) -> list[Message]:
        """Its messages, the oldest that may be cut without its first words."""
        messages, over = fitted.messages, len(fitted.ids) - self.room
        for i, message in enumerate(messages):
            words = self.ids(message["content"] or "", begin=False)
            if message["role"] in INSTRUCTING or len(words) <= over:
                continue
            text = self.tokenizer.decode(words[over:], skip_special_tokens=False)
            if text.strip() and len(text) < len(message["content"]):
                return [*messages[:i], {**message, "content": text}, *messages[i + 1 :]]
        raise self._too_long(dialogue.id, len(fitted.ids), "even without all that can be cut")

    def _too_long(self, where: str, found: int, how: str = "") -> UserError:
        return UserError(
            f"the prompt has {found:,} tokens{', ' + how if how else ''}, expected at most "
            f"{self.room:,} ({self.limit or 'as --max-prompt-tokens says'})",
            where=where,
            hint="remove this row"
            if how
            else "--truncate-prompts keeps its last tokens, and the system's text; or remove this "
            "row",
        )


def make_encoder(
    template: ChatTemplate,
    *,
    max_positions: int,
    max_prompt_tokens: int | None = None,
    new_tokens: int = 1,
    truncate: bool = False,
    chat: Chat = "auto",
) -> Encoder:
    """An encoder whose prompts may have `max_prompt_tokens`, or what `max_positions` leaves beside
    `new_tokens`. Raises `UserError` where it leaves none."""
    room = max_positions - new_tokens
    limit = f"the target has {max_positions:,} positions and {new_tokens:,} are kept for new tokens"
    if max_prompt_tokens is not None and max_prompt_tokens < room:
        room, limit = max_prompt_tokens, ""
    if room < 1:
        raise UserError(
            f"{new_tokens} new tokens leave no room for a prompt: the target has {max_positions} "
            "positions",
            hint="lower --max-new-tokens",
        )
    return Encoder(template, room, truncate, chat, limit)


def encode_prompts(
    prompts: Sequence[Prompt],
    encoder: Encoder,
    source: str = "",
    *,
    skip_bad: bool = False,
    note: Callable[[str], None] | None = None,
) -> list[EncodedPrompt]:
    """The prompts that are asked first; what comes later in a conversation is in `dialogue`.

    Of a recorded conversation everything is history, its last answer apart. Passages of documents
    are cut to their first tokens. Raises one `UserError` for all that cannot be asked, unless they
    are to be skipped.
    """

    def encode(prompt: Prompt) -> EncodedPrompt:
        dialogue = encoder.dialogue(prompt)
        if dialogue is None:
            ids = encoder.fit_plain(encoder.plain(prompt), prompt.id)
        else:
            ids = encoder.ask(dialogue).ids
        return EncodedPrompt(prompt.id, ids, prompt.category, dialogue, prompt.root)

    return usable(prompts, encode, source, skip=skip_bad, note=note)


def _shorter(messages: list[Message]) -> list[Message] | None:
    """Without the oldest turn: a user's message and all up to the next. None for the last turn."""
    starts = [i for i, message in enumerate(messages) if message["role"] == "user"]
    if len(starts) < 2:
        return None
    kept = [message for message in messages[: starts[1]] if message["role"] in INSTRUCTING]
    return [*kept, *messages[starts[1] :]]

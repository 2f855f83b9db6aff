"""Turns of a conversation as the server meets them, and the sequences that are kept of them.

Every turn is a request of its own: what was said so far, through the chat template, and an answer.
A turn whose prompt begins with all that came before goes on with the same sequence; one whose
template tells the past otherwise (without its reasoning, say) begins a new one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from bench.prompts.encode import Dialogue, Encoder, Fitted
from bench.prompts.rows import Message, Prompt
from bench.prompts.template import MARK
from drafts.errors import UserError

TrainTurns = Literal["all", "last"]
WRITE_ANEW = "let the target write: no --use-responses"


@dataclass(frozen=True)
class Turn:
    """One request: token ids of its prompt and of its answer."""

    prompt: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Kept:
    """A sequence for the store: token ids [n], and whether the assistant wrote each in a turn that
    is trained."""

    ids: list[int] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)


def joined(turns: Sequence[Turn], train: TrainTurns = "all") -> list[Kept]:
    """The sequences that hold `turns`, each as the server saw it; of "last" the last turn alone."""
    if train == "last":
        turns = turns[-1:]
    found: list[Kept] = []
    for turn in turns:
        if not found or turn.prompt[: len(found[-1].ids)] != found[-1].ids:
            found.append(Kept())
        kept = found[-1]
        new = turn.prompt[len(kept.ids) :]
        kept.ids.extend([*new, *turn.answer])
        kept.mask.extend([False] * len(new) + [True] * len(turn.answer))
    return found


def to_generate(dialogue: Dialogue) -> Dialogue:
    """The dialogue with only those turns that the target can answer by itself.

    A recorded call whose result follows stays as it was: an answer without that call would have
    nothing to do with the result.
    """
    last = len(dialogue.script) - 1
    asked = tuple(
        place
        for place in dialogue.asked
        if place == last or dialogue.script[place + 1]["role"] != "tool"
    )
    return replace(dialogue, asked=asked)


def recorded_turns(
    dialogue: Dialogue, encoder: Encoder, ends: Sequence[int], limit: int, *, cut: bool
) -> list[Turn]:
    """The turns of a conversation with the answers that it has, each of at most `limit` tokens.

    `ends` are the tokens that end an answer; `cut` says that the last one was ended by a limit.
    Raises `UserError` for an answer that the template does not make into what the model wrote.
    """
    turns = []
    for place in dialogue.asked:
        message = dialogue.script[place]
        if not (message["content"] or message.get("tool_calls")):
            continue  # never answered
        asked = encoder.fit(dialogue, list(dialogue.script[:place]))
        open_end = cut and place == dialogue.asked[-1]
        ids = _answer(dialogue, asked, message, encoder, ends, open_end)
        turns.append(Turn(asked.ids, ids[:limit]))
    return turns


def recorded_text(prompt: Prompt, encoder: Encoder, ends: Sequence[int], limit: int) -> list[Turn]:
    """The turn of a plain text or of token ids: its response, or what follows its first tokens in a
    document."""
    if prompt.ids is not None:
        answer = list(prompt.response_ids)
        return [Turn(encoder.fit_plain(list(prompt.ids), prompt.id), answer[:limit])] * bool(answer)
    text = prompt.text or ""
    ids = encoder.ids(text, begin=True)
    head = ids[: prompt.head_tokens]
    if prompt.head_tokens is not None:
        answer = ids[prompt.head_tokens :]
    elif prompt.response:
        answer = _after(encoder, text, ids, prompt.response)
        answer = answer if prompt.cut else ended(answer, ends)
    else:
        answer = []
    return [Turn(encoder.fit_plain(head, prompt.id), answer[:limit])] if answer else []


def ended(ids: list[int], ends: Sequence[int]) -> list[int]:
    """`ids` with an end token behind them, unless they have one."""
    if not ends or (ids and ids[-1] in ends):
        return ids
    return [*ids, ends[0]]


def _after(encoder: Encoder, prompt: str, ids: list[int], answer: str) -> list[int]:
    """Token ids of `answer` behind a prompt of the text and `ids`, cut as the tokenizer cuts both
    together where it leaves the prompt's own tokens whole."""
    together = encoder.ids(prompt + answer, begin=True)
    bare = encoder.ids(prompt + answer, begin=False)
    for whole in (together, bare):
        if whole[: len(ids)] == ids:
            return whole[len(ids) :]
    return encoder.ids(answer, begin=False)


def _answer(
    dialogue: Dialogue,
    asked: Fitted,
    message: Message,
    encoder: Encoder,
    ends: Sequence[int],
    cut: bool,
) -> list[int]:
    """Token ids of a recorded answer with the end of its turn, as the model would write them."""
    if dialogue.plain:
        answer = _after(encoder, asked.text, asked.ids, message["content"] or "")
        return answer if cut else ended(answer, ends)
    template = encoder.template
    text = _written(dialogue, asked, message, encoder)
    if cut:  # nothing but its own words
        said = (message["content"] or "").strip()
        return _after(encoder, asked.text, asked.ids, text[: text.rfind(said) + len(said)])
    if template.end_id is None and template.closing:
        text = text.removesuffix(template.closing) + template.closing.rstrip()
    ids = _after(encoder, asked.text, asked.ids, text)
    own = {*ends} if template.end_id is None else {*ends, template.end_id}
    last = max((i for i, token in enumerate(ids) if token in own), default=-1)
    if last >= 0 and not encoder.tokenizer.decode(ids[last + 1 :]).strip():
        return ids[: last + 1]
    return ids if template.closing.strip() else ended(ids, ends)


def _written(dialogue: Dialogue, asked: Fitted, message: Message, encoder: Encoder) -> str:
    """What the template makes of an answer, from where the prompt leaves off."""

    def whole(answer: Message) -> str:
        return encoder.template.text(
            [*asked.messages, answer],
            dialogue.id,
            ask=False,
            tools=dialogue.tools,
            kwargs=dialogue.kwargs,
        )

    text = whole(message)
    content = re.sub(r"(?s).*</think>", "", message["content"] or "").strip()
    reasoning = (message.get("reasoning_content") or "").strip()
    if text.startswith(asked.text):
        written = text[len(asked.text) :]
    else:  # the prompt opens more than the template writes of an answer: an empty thought, say
        header = _common(asked.text, whole({"role": "assistant", "content": MARK}))
        written = text[len(header) :].lstrip()
        closed = _closed(asked.text[len(header) :])
        if not (closed and text.startswith(header) and written.startswith(content)) or reasoning:
            raise UserError(
                "its recorded answer does not follow what the chat template asks for it with "
                f"({asked.text[-40:]!r})",
                where=dialogue.id,
                hint=f"give --chat-template-kwargs as the model was served, or {WRITE_ANEW}",
            )
    parts = [("content", content), ("reasoning_content", reasoning)]
    parts += [("tool_calls", c["function"]["name"]) for c in message.get("tool_calls") or []]
    for name, said in parts:
        if said not in written:
            raise UserError(
                f"the target's chat template leaves out the {name} of its recorded answer",
                where=dialogue.id,
                hint=f"use the template that the model is served with, or {WRITE_ANEW}",
            )
    return written


def _common(one: str, other: str) -> str:
    """What both texts begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return one[: next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))]


def _closed(text: str) -> bool:
    """Whether all that `text` opens as <name> is closed again."""
    return all(f"</{name}>" in text for name in re.findall(r"<(\w+)>", text))

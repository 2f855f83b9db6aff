"""Conversations turn by turn: what runs together, and the prompts that later turns have.

A later turn is asked as a chat client asks it: with all that was said before, where the answers
are the arm's own, as text, put through the target's chat template. So two arms whose answers to
one turn differ have different prompts at the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from bench.prompts.encode import EncodedPrompt, encode_history
from drafts.errors import UserError

# An answer's text may take more tokens than were generated: other pieces, or bytes of no text.
SLACK = 2

Batches = list[list[int]]
Unit = tuple[int, int]  # number of the conversation, number of the turn, both from 0


def schedule(later: Sequence[int], size: int) -> list[Batches]:
    """Blocks of `size` conversations, each as batches: batch t has those that have a turn t.

    `later` is the number of turns after the first, by conversation.
    """
    blocks = []
    for start in range(0, len(later), size):
        block = range(start, min(start + size, len(later)))
        most = max(later[i] for i in block)
        blocks.append([[i for i in block if later[i] >= turn] for turn in range(most + 1)])
    return blocks


def units(blocks: Sequence[Batches]) -> Iterator[Unit]:
    """What is measured, in its order: every turn of every conversation."""
    for batches in blocks:
        for turn, batch in enumerate(batches):
            for conversation in batch:
                yield conversation, turn


def unit_name(conversation: str, turn: int) -> str:
    """How a turn is called in reports: the first like its conversation."""
    return conversation if turn == 0 else f"{conversation} turn {turn + 1}"


class Turns:
    """The later turns of a run's conversations, as prompts of one target.

    `later` has their number by conversation; `longest` is the most tokens that any prompt of the
    run may have. `room` and `max_tokens` (of an answer) are in tokens. Raises `UserError` for a
    conversation whose last turn may not fit, unless `truncate`.
    """

    def __init__(
        self,
        prompts: Sequence[EncodedPrompt],
        tokenizer: Any,
        *,
        room: int,
        max_tokens: int,
        truncate: bool = False,
    ):
        self._prompts, self._tokenizer = prompts, tokenizer
        self.later = [len(prompt.turns) for prompt in prompts]
        self.longest = max(len(prompt.input_ids) for prompt in prompts)
        for prompt in prompts:
            if not prompt.turns:
                continue
            bare = len(self._encode(prompt, ["."] * len(prompt.turns)))
            answers = len(prompt.turns) * max_tokens
            if bare + answers > room and not truncate:
                raise UserError(
                    f"its last turn may have {bare + answers:,} tokens with the answers before it, "
                    f"expected at most {room:,}",
                    where=prompt.id,
                    hint="lower --max-tokens; or --truncate-prompts keeps the last tokens",
                )
            self.longest = max(self.longest, min(room, bare + SLACK * answers))

    def prompt(self, conversation: int, answers: Sequence[list[int]]) -> list[int]:
        """Token ids of the turn after `answers` (token ids of the arm's own), however long."""
        texts = [self._tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]
        return self._encode(self._prompts[conversation], texts)

    def _encode(self, prompt: EncodedPrompt, answers: Sequence[str]) -> list[int]:
        assert prompt.messages is not None
        messages = list(prompt.messages)
        for answer, turn in zip(answers, prompt.turns, strict=False):
            messages.append({"role": "assistant", "content": answer})
            messages.append({"role": "user", "content": turn})
        return encode_history(messages, self._tokenizer, prompt.id)

"""Conversations turn by turn: what runs together, and the prompts that later turns have.

A later turn is asked as a chat client asks it: with all that was said before, where the answers
are the arm's own, as text, put through the target's chat template. So two arms whose answers to
one turn differ have different prompts at the next.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

from bench.prompts.encode import Dialogue, EncodedPrompt, Encoder
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
    run may have. `max_tokens` (of an answer) is in tokens. Raises `UserError` for a conversation
    whose last turn may not fit, unless the encoder may cut it.
    """

    def __init__(self, prompts: Sequence[EncodedPrompt], encoder: Encoder, *, max_tokens: int):
        self._prompts, self._encoder = prompts, encoder
        self.later = [prompt.later for prompt in prompts]
        self.longest = max(len(prompt.input_ids) for prompt in prompts)
        for prompt in prompts:
            if prompt.dialogue and prompt.later:
                bare = require_room(prompt.dialogue, encoder, max_tokens)
                self.longest = max(
                    self.longest, min(encoder.room, bare + SLACK * prompt.later * max_tokens)
                )

    def prompt(self, conversation: int, answers: Sequence[list[int]]) -> tuple[list[int], bool]:
        """Token ids of the turn after `answers` (token ids of the arm's own), and whether the
        conversation had to lose its oldest part."""
        dialogue = self._prompts[conversation].dialogue
        assert dialogue is not None
        fitting = replace(self._encoder, room=self.longest, truncate=True)
        said = [self._encoder.tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]
        fitted = fitting.ask(dialogue, said)
        return fitted.ids, fitted.messages != dialogue.history(said)


def require_room(dialogue: Dialogue, encoder: Encoder, max_tokens: int) -> int:
    """Tokens of a dialogue's last prompt with answers of a token each.

    Raises `UserError` where it may not fit with answers of `max_tokens`, unless the encoder may
    cut it.
    """
    unlimited = replace(encoder, room=sys.maxsize)
    bare = len(unlimited.ask(dialogue, ["."] * (len(dialogue.asked) - 1)).ids)
    most = bare + (len(dialogue.asked) - 1) * max_tokens
    if most > encoder.room and not encoder.truncate:
        raise UserError(
            f"its last turn may have {most:,} tokens with the answers before it, expected at most "
            f"{encoder.room:,}",
            where=dialogue.id,
            hint="lower --max-tokens; or --truncate-prompts drops the oldest turns",
        )
    return bare

"""What a reader should know beside the figures: said before a run where it is known, and after."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from bench.records.arms import Arm
from bench.records.progress import Note
from drafts.checkpoint.info import DraftInfo
from drafts.target.info import TargetInfo
from serving.sampling import defaults_words

IN_TURN = (
    "The arms ran one after another: what changed on the machine meanwhile is in their differences "
    "of speed, and in no interval"
)


@dataclass(frozen=True)
class PastPositions:
    """Answers of one round that went past the positions that a draft has.

    `tokens` of `of` answer tokens, in `requests` of the requests, came after position `positions`.
    """

    positions: int
    tokens: int
    of: int
    requests: int

    @property
    def words(self) -> str:
        """How many, and what that means for the figures."""
        return (
            f"{self.tokens:,} of {self.of:,} answer tokens of a round ({self.requests} requests) "
            f"came past the draft's {self.positions:,} positions. {THERE}"
        )

    def as_json(self) -> dict[str, Any]:
        """The fields and the words."""
        return {**asdict(self), "words": self.words}


# What vLLM chooses by itself, and may choose otherwise for a draft than without one.
ENGINE = (
    "model_runner", "async_scheduling", "attention_backend", "compilation_mode", "dtype", "threads",
)  # fmt: skip

# vLLM's V1 runner proposes nothing there, its V2 runner goes on drafting.
THERE = "There vLLM drafts nothing, which acceptance does not count and speed does, or drafts badly"


def foreseen(arm: Arm, target: TargetInfo | None, longest: int, max_tokens: int) -> list[str]:
    """What is known of an arm before the run, whose longest prompt has `longest` tokens."""
    found = []
    positions = positions_of(arm)
    if positions is not None and positions < longest + max_tokens:
        found.append(
            f"{arm.label}: the draft has {positions:,} positions, and the longest prompt "
            f"({longest:,} tokens) with an answer of {max_tokens:,} goes past them. {THERE}"
        )
    if target is not None and (defaults := defaults_words(target.folder)):
        found.append(
            f"{defaults[0].upper()}{defaults[1:]}. A vLLM server applies that to requests that do "
            "not say otherwise; here all do, and sampling is neutral but for the temperature"
        )
    return found


def unequal(engines: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """In what the engines of the arms, by label, differ beside their drafts: a sentence each."""
    found = []
    for name in ENGINE:
        by_value: dict[str, list[str]] = {}
        for label, engine in engines.items():
            if engine.get(name) is not None:
                by_value.setdefault(str(engine[name]), []).append(label)
        if len(by_value) > 1:
            parts = "; ".join(f"{value}: {', '.join(arms)}" for value, arms in by_value.items())
            found.append(
                f"The engines are not alike in their {name.replace('_', ' ')} ({parts}), which "
                "may change speed by itself"
            )
    return found


def tell(note: Note, found: Mapping[str, Iterable[str]]) -> None:
    """Tell `note` what is known of the arms by name, each sentence once."""
    for sentence in dict.fromkeys(sentence for of_arm in found.values() for sentence in of_arm):
        note(f"Warning: {sentence}.")


def past_positions(arm: Arm, lengths: Iterable[tuple[int, int]]) -> PastPositions | None:
    """What went past the draft's positions; None where nothing did or they are not known.

    `lengths` are the tokens of each request's prompt and answer.
    """
    positions, known = positions_of(arm), list(lengths)
    if positions is None:
        return None
    past = [min(answer, max(0, prompt + answer - positions)) for prompt, answer in known]
    if not any(past):
        return None
    total = sum(answer for _, answer in known)
    return PastPositions(positions, sum(past), total, sum(tokens > 0 for tokens in past))


def positions_of(arm: Arm) -> int | None:
    """The positions that the arm's draft has; None where there is no limit or it is unknown."""
    return arm.draft.max_positions if isinstance(arm.draft, DraftInfo) else None

"""What the arms of a run gave: outputs, times and counters, as plain data."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from bench.records.acceptance import Acceptance, Counts
from bench.records.arms import Arm
from bench.records.speeds import DECODE, Speed
from serving.engine.engine import Generation
from serving.metrics import SpecCounters


@dataclass(frozen=True)
class Answer:
    """What came back for one job. Times are seconds since the start of the block.

    `intended` is when it should have been sent and `sent` when it was; `chunks` are the arrivals of
    the pieces that carried tokens (with speculation, several tokens a piece). `token_ids`,
    `counters` and `prompt_tokens` are None where the server does not report them. `counted_by` says
    where `tokens` comes from: the server's `usage`, its token `ids`, or a `tokenizer` that read the
    text again (end tokens are not in a text); None where nobody could count. `answered` is when the
    first piece of the answer came, behind any reasoning; `retried` counts attempts after the first.
    A failed one has an `error`.
    """

    intended: float
    sent: float
    chunks: Sequence[float] = ()
    tokens: int = 0
    text: str = ""
    token_ids: Sequence[int] | None = None
    counters: SpecCounters | None = None
    error: str | None = None
    prompt_tokens: int | None = None
    counted_by: Literal["usage", "ids", "tokenizer"] | None = "usage"
    answered: float | None = None
    retried: int = 0

    def __post_init__(self) -> None:
        """Numbers in arrays take a fifth of what lists of them do, and a run has millions."""
        object.__setattr__(self, "chunks", array("d", self.chunks))
        if self.token_ids is not None:
            object.__setattr__(self, "token_ids", array("i", self.token_ids))

    @property
    def ttft(self) -> float:
        """Seconds until the first piece."""
        return self.chunks[0] - self.intended

    @property
    def e2e(self) -> float:
        """Seconds until the last piece."""
        return self.chunks[-1] - self.intended


@dataclass(frozen=True)
class Block:
    """All answers of one block of an arm, in the order of the jobs.

    `wall_seconds` runs from the start to the end of the last answer; `cpu_seconds` is what this
    process spent on its cores in that time.
    """

    wall_seconds: float
    cpu_seconds: float
    answers: list[Answer]


@dataclass
class ArmRun:
    """What one arm gave: per round and prompt its output, per round and timing unit its times.

    A timing unit is a prompt, or a whole block where several requests run at once. `tokens` and
    `seconds` are those of `speed`: of the decode phase, unless it is a server's. `kept` are each
    prompt's tokens after the first, those of all its answers in a round together. `inputs` are
    the first round's prompts as this arm had them, `cut` counts the later turns of all rounds that
    had to lose the oldest of the conversation to fit.
    """

    arm: Arm
    engine: dict[str, Any] = field(default_factory=dict)
    outputs: list[list[Sequence[int]]] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    seconds: list[list[float]] = field(default_factory=list)
    prefill_seconds: list[list[float]] = field(default_factory=list)
    counters: list[list[SpecCounters | None]] = field(default_factory=list)
    kept: list[list[int]] = field(default_factory=list)
    speed: Speed = DECODE
    inputs: list[list[int]] = field(default_factory=list)
    cut: int = 0

    def add(self, round_index: int, generation: Generation, concurrency: int) -> None:
        """Append one block of prompts to a round."""
        tables: list[list[list[Any]]] = [
            self.outputs,
            self.tokens,
            self.seconds,
            self.prefill_seconds,
            self.counters,
            self.kept,
        ]
        for table in tables:
            if len(table) == round_index:
                table.append([])
        requests = generation.requests
        self.outputs[round_index] += [r.output_ids for r in requests]
        self.prefill_seconds[round_index] += [r.prefill_seconds for r in requests]
        self.counters[round_index] += [r.counters for r in requests]
        decoded = [len(r.output_ids) - 1 for r in requests]
        self.kept[round_index] += decoded
        if concurrency == 1:
            self.tokens[round_index] += decoded
            self.seconds[round_index] += [r.decode_seconds for r in requests]
        else:
            self.tokens[round_index].append(sum(decoded))
            self.seconds[round_index].append(generation.decode_seconds)

    def acceptance(self, k: int) -> Acceptance | None:
        """Counts per prompt over all rounds; None without speculation."""
        rounds = [
            Acceptance.from_counters([c for c in row if c is not None], k)
            for row in self.counters
            if None not in row
        ]
        if not rounds:
            return None
        return Acceptance(
            sum(r.drafts_per_prompt for r in rounds),  # type: ignore[arg-type]
            sum(r.accepted_per_prompt for r in rounds),  # type: ignore[arg-type]
            sum(r.drafted for r in rounds),  # type: ignore[arg-type]
        )

    @property
    def lengths(self) -> list[tuple[int, int]]:
        """Tokens of each prompt and its answer, of the first round."""
        pairs = zip(self.inputs, self.outputs[0], strict=True)
        return [(len(prompt), len(answer)) for prompt, answer in pairs]

    @property
    def repeatable(self) -> bool:
        """Whether every round gave the same output."""
        return all(outputs == self.outputs[0] for outputs in self.outputs)


@dataclass
class Series:
    """One arm's raw numbers: lists by round, then prompt (`wave_seconds`: wave).

    `tokens` and `seconds` are those of a request's decode phase, which starts at its first token;
    `wave_seconds` run from a wave's first token to its last. The counters are zero without a draft.
    """

    tokens: list[list[int]] = field(default_factory=list)
    seconds: list[list[float]] = field(default_factory=list)
    wave_seconds: list[list[float]] = field(default_factory=list)
    drafts: list[list[int]] = field(default_factory=list)
    drafted: list[list[int]] = field(default_factory=list)
    accepted: list[list[list[int]]] = field(default_factory=list)

    @property
    def steps(self) -> Counts:
        """[rounds, prompts]: steps of the target after the first token.

        A step without a draft yields one token (n-gram often has none to propose); the last step
        of an answer may yield tokens that are cut off.
        """
        accepted = np.array([[sum(row) for row in rows] for rows in self.accepted])
        return np.maximum(np.array(self.drafts), np.array(self.tokens) - accepted)

    def acceptance(self) -> Acceptance:
        """Counts per prompt over all rounds."""
        return Acceptance(
            np.array(self.drafts).sum(axis=0),
            np.array(self.accepted).sum(axis=0),
            np.array(self.drafted).sum(axis=0),
        )

"""Is greedy output with speculation the output without it? And where not, was it a near-tie?

Speculation verifies several tokens in one forward pass, so its matrices have other shapes and its
bf16 sums other roundings than one-token decoding. Where the target's two best tokens are closer
than that rounding noise, either may come out. Nothing is assumed about the noise: it is measured
on the engine without a draft, as the disagreement between two computations of the same logits,
one-token decoding and a prefill over the same text. It is measured where nothing is judged: on
prompts whose outputs are all the same and, where those are too few for a quantile, at the other
positions of those that differ. A near-tie is a gap within the `QUANTILE` of that noise: a largest
value would grow with every position that is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from serving.engine.engine import Generation

TOP = 20  # log-probabilities asked of vLLM, its default limit
NOISE_PROMPTS = 8  # prompts that differ nowhere and serve to measure the noise
QUANTILE = 0.999  # of the noise: a gap within it is a near-tie
ENOUGH = 1000  # positions for that quantile
EXAMINED = 32  # prompts with a difference that are looked at, at most

Row = Sequence[tuple[int, float]]


class Engine(Protocol):
    """What is asked of the engine without a draft: in process or, over HTTP, a server's."""

    def generate(
        self,
        prompt_token_ids: list[list[int]],
        max_tokens: int,
        *,
        ignore_eos: bool = False,
        logprobs: int | None = None,
    ) -> Generation:
        """Outputs with the most probable tokens of every position."""
        ...

    def score(
        self, prompt_token_ids: list[int], output_ids: list[int], top: int
    ) -> list[list[tuple[int, float]]]:
        """The same from one prefill over the whole text."""
        ...


@dataclass(frozen=True)
class Difference:
    """The first position at which an arm's output leaves the output without speculation.

    `gap` is the target's log-probability of its own token minus that of the arm's token, in nats,
    by one-token decoding (`gap`) and by prefill (`gap_prefill`); None where the arm's token is not
    among the best 20 or where the output has ended. `near_tie`: the gap is within measured noise;
    None where nobody looked.
    `text_none` and `text_arm` are the two tokens as text.
    """

    prompt: str
    position: int
    token_none: int | None
    token_arm: int | None
    gap: float | None = None
    gap_prefill: float | None = None
    logprobs: dict[str, float] | None = None
    near_tie: bool | None = None
    text_none: str | None = None
    text_arm: str | None = None


@dataclass(frozen=True)
class Noise:
    """How far two computations of the same top-two gap disagree, in nats, over `positions`.

    `limit` is the `QUANTILE` of it, up to which a gap is a near-tie.
    """

    positions: int
    median: float
    p99: float
    max: float
    limit: float


def first_difference(prompt: str, none: Sequence[int], arm: Sequence[int]) -> Difference | None:
    """Where two outputs of one prompt part, or None if they are equal."""
    for position in range(max(len(none), len(arm))):
        left = none[position] if position < len(none) else None
        right = arm[position] if position < len(arm) else None
        if left != right:
            return Difference(prompt, position, left, right)
    return None


def explain(
    engine: Engine,
    prompts: dict[str, list[int]],
    outputs: dict[str, list[int]],
    differences: dict[str, list[Difference]],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[dict[str, list[Difference]], Noise | None]:
    """Measure the gap at each arm's differences, and the noise, on the engine without a draft.

    `prompts` and `outputs` (without speculation) are token ids by prompt id. Of more than
    `EXAMINED` prompts that differ somewhere, that many are examined, evenly chosen.
    """
    differing = {difference.prompt for found in differences.values() for difference in found}
    if not differing:
        return differences, None
    others = [prompt for prompt in prompts if prompt not in differing]
    chosen = [*evenly(sorted(differing), EXAMINED), *evenly(others, NOISE_PROMPTS)]
    decoded, prefilled = {}, {}
    for done, prompt in enumerate(chosen):
        progress(done, len(chosen))
        decoded[prompt] = _decode(engine, prompts[prompt], outputs[prompt])
        prefilled[prompt] = engine.score(prompts[prompt], outputs[prompt], TOP)
    progress(len(chosen), len(chosen))
    return judge(differences, decoded, prefilled)


def evenly(names: Sequence[str], most: int) -> list[str]:
    """At most so many of the names, from all along their order."""
    count = min(most, len(names))
    return [names[i * len(names) // count] for i in range(count)]


def with_texts(
    differences: Mapping[str, Sequence[Difference]], target: Path
) -> dict[str, list[Difference]]:
    """The differences with their tokens as text, by the target's tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(target)

    def text(token: int | None) -> str | None:
        return None if token is None else str(tokenizer.decode([token]))

    return {
        arm: [
            replace(found, text_none=text(found.token_none), text_arm=text(found.token_arm))
            for found in rows
        ]
        for arm, rows in differences.items()
    }


def judge(
    differences: Mapping[str, Sequence[Difference]],
    decoded: Mapping[str, Sequence[Row]],
    prefilled: Mapping[str, Sequence[Row]],
) -> tuple[dict[str, list[Difference]], Noise | None]:
    """Fill in the differences' gaps and verdicts from log-probabilities by prompt and position."""
    judged = {(found.prompt, found.position) for rows in differences.values() for found in rows}
    differing = {prompt for prompt, _ in judged}
    pairs: list[tuple[Row, Row]] = []
    for name in sorted(decoded, key=lambda name: name in differing):
        if name in differing and len(pairs) >= ENOUGH:
            break
        rows = enumerate(zip(decoded[name], prefilled[name], strict=False))
        pairs += [pair for position, pair in rows if (name, position) not in judged]
    noise = measure_noise(pairs)

    def measured(found: Difference) -> Difference:
        if found.prompt not in decoded:
            return found
        return _explain(found, decoded[found.prompt], prefilled[found.prompt], noise)

    return {arm: [measured(found) for found in rows] for arm, rows in differences.items()}, noise


def measure_noise(pairs: Iterable[tuple[Row, Row]]) -> Noise | None:
    """The noise from pairs of (decoded, prefilled) log-probabilities of the same position."""
    disagreements = []
    for decoded, prefilled in pairs:
        (first, first_value), (second, second_value) = decoded[:2]
        twin = gap_between(prefilled, first, second)
        if twin is not None:
            disagreements.append(abs(first_value - second_value - twin))
    if not disagreements:
        return None
    return Noise(
        positions=len(disagreements),
        median=float(np.median(disagreements)),
        p99=float(np.quantile(disagreements, 0.99)),
        max=float(max(disagreements)),
        limit=float(np.quantile(disagreements, QUANTILE)),
    )


def gap_between(row: Row, left: int | None, right: int | None) -> float | None:
    """Log-probability of `left` minus that of `right`; None if either is not listed."""
    values = dict(row)
    if left not in values or right not in values:
        return None
    return values[left] - values[right]


def _decode(engine: Engine, prompt: list[int], output: list[int]) -> list[Row]:
    """Log-probabilities while decoding again, as far as it repeats the output it gave before."""
    repeat = engine.generate([prompt], len(output), ignore_eos=True, logprobs=TOP).requests[0]
    difference = first_difference("", output, repeat.output_ids)
    rows: list[Row] = list(repeat.logprobs or [])
    return rows if difference is None else rows[: difference.position]


def _explain(
    found: Difference, decoded: Sequence[Row], prefilled: Sequence[Row], noise: Noise | None
) -> Difference:
    def row_of(rows: Sequence[Row]) -> Row:
        return rows[found.position] if found.position < len(rows) else []

    gap = gap_between(row_of(decoded), found.token_none, found.token_arm)
    gap_prefill = gap_between(row_of(prefilled), found.token_none, found.token_arm)
    measured = gap if gap is not None else gap_prefill
    values = dict(row_of(decoded) or row_of(prefilled))
    tokens = {"none": found.token_none, "arm": found.token_arm}
    return replace(
        found,
        gap=gap,
        gap_prefill=gap_prefill,
        logprobs={name: values[token] for name, token in tokens.items() if token in values},
        near_tie=noise is not None and measured is not None and abs(measured) <= noise.limit,
    )

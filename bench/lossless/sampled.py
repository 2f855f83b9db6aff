"""At temperature > 0: does speculation leave the target's distribution alone?

A few prompts are continued many times by each engine, with another seed each time. The first token
comes from the prefill; those after it went through drafting and verification, and are tested: the
engine without a draft tells the exact chances of every next token after the prefix that came, and
`bench.lossless.token_test` asks whether the tokens that came were drawn by them. No second sample
is needed for comparison, which makes this about twice as sharp as comparing frequencies with and
without.
The engine without a draft draws samples too, as a control: where it fails its own test, the
chances are wrong, and nobody is judged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from bench.lossless.token_test import Draws, chance, chi_squares, power, smallest_found
from bench.records.config import BenchConfig
from serving.engine.shared import Engine

ALPHA = 0.01  # how often a sound sampler may fail
TOP = 20  # tokens whose chances are asked of vLLM, its default limit
STATED_BIAS = 0.05  # total variation for which the power is stated
PROMPTS = 4
CALL = 64  # requests per call, for progress

Prefix = tuple[int, ...]
Row = Sequence[tuple[int, float]]


@dataclass(frozen=True)
class DistributionTest:
    """What the test found for one arm.

    `samples` requests of `prompts` prompts gave `tokens` tested tokens, at the positions 1 to
    `positions` after the first. `passed`: the p-value is at least `alpha`; None where the engine
    without a draft fails too (`control_p_value`), or where there was too little data to find even
    the largest bias (`detects` is None). `power`: how likely a bias of 0.05 is found at
    least, and `detects`: the bias that is found in 9 of 10 cases (None: not even the largest), both
    in total variation towards the most probable token.
    """

    p_value: float
    control_p_value: float
    passed: bool | None
    power: float
    detects: float | None
    samples: int
    tokens: int
    prompts: int
    positions: int
    alpha: float = ALPHA

    @property
    def words(self) -> str:
        """The finding and its power, in a sentence or two."""
        if self.passed is None and self.control_p_value >= self.alpha:
            return (
                "Whether the sampled output follows the target's distribution cannot be told: "
                f"{self.tokens:,} tokens from {self.samples:,} samples are not enough data to find "
                "even a large bias. More --samples may."
            )
        if self.passed is None:
            return (
                "Whether the sampled output follows the target's distribution could not be judged: "
                f"the engine without a draft fails the test too (p = {self.control_p_value:.2g})."
            )
        data = f"{self.tokens:,} tokens from {self.samples:,} samples (p = {self.p_value:.2g})"
        if not self.passed:
            return f"The sampled output does not follow the target's distribution: {data}."
        assert self.detects is not None  # else it has not passed
        return (
            f"No deviation of {self.detects:.2f} or more from the target's distribution was found "
            f"in the sampled output: {data}. One of that size (in total variation, towards likely "
            "tokens) would have been found in 9 of 10 cases, a smaller one less often."
        )

    def as_json(self) -> dict[str, Any]:
        """The fields and the words."""
        return {**asdict(self), "words": self.words}


@dataclass(frozen=True)
class Sampling:
    """The requests of a test: each of `requests` is continued by `positions` + 1 tokens.

    `positions` beyond k + 1 tell nothing new.
    """

    requests: list[list[int]]
    prompts: int
    positions: int
    seed: int = 0


def plan_sampling(
    prompts: Sequence[list[int]], samples: int, positions: int, seed: int = 0
) -> Sampling:
    """`samples` requests that go through a few of the prompts (token ids), evenly taken."""
    chosen = [prompts[i] for i in _evenly(len(prompts), PROMPTS)]
    requests = [chosen[i % len(chosen)] for i in range(samples)]
    return Sampling(requests, len(chosen), positions, seed)


def sampling_of(config: BenchConfig, prompts: Sequence[list[int]]) -> Sampling | None:
    """How the drafted arms of a run are tested; None without samples, temperature or a `none`."""
    plain = any(arm.draft is None for arm in config.arms)
    positions = min(config.most_k + 1, config.max_tokens - 1)
    if not plain or config.temperature == 0 or config.samples == 0 or positions < 1:
        return None
    return plan_sampling(prompts, config.samples, positions, config.seed)


def draw(
    engine: Engine,
    plan: Sampling,
    number: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[list[int]]:
    """What an engine, at a temperature > 0 and with seeds by its `number`, writes for each."""
    outputs: list[list[int]] = []
    for start in range(0, len(plan.requests), CALL):
        progress(start, len(plan.requests))
        batch = plan.requests[start : start + CALL]
        seeds = [_seed(plan.seed, number, start + i) for i in range(len(batch))]
        generation = engine.generate(batch, plan.positions + 1, ignore_eos=True, seeds=seeds)
        outputs += [request.output_ids for request in generation.requests]
    progress(len(plan.requests), len(plan.requests))
    return outputs


def judge_samples(
    none: Engine,
    control: list[list[int]],
    drawn: Mapping[str, list[list[int]]],
    plan: Sampling,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, DistributionTest]:
    """Test what drafted engines drew, by their names.

    `none`, which has no draft and `sampling_logprobs`, says by what chances they should have;
    `control` is what it drew itself. All have the same target and temperature.
    """
    pairs = {name: _after_prefixes(plan, outputs) for name, outputs in drawn.items()}
    of_none = _after_prefixes(plan, control)
    prefixes = {prefix for found in (of_none, *pairs.values()) for prefix, _ in found}
    chances = _chances(none, sorted(prefixes), progress)
    control_p = chance(chi_squares(gather(of_none, chances)))
    return {
        name: judge(
            gather(found, chances), control_p, len(plan.requests), plan.prompts, plan.positions
        )
        for name, found in pairs.items()
    }


def _after_prefixes(plan: Sampling, outputs: list[list[int]]) -> list[tuple[Prefix, int]]:
    return [
        ((*prompt, *output[:at]), output[at])
        for prompt, output in zip(plan.requests, outputs, strict=True)
        for at in range(1, len(output))
    ]


def gather(pairs: Iterable[tuple[Prefix, int]], chances: Mapping[Prefix, Row]) -> Draws:
    """Group drawn tokens by the prefix they came after.

    `chances` has each prefix's most probable tokens, best first, with their probabilities.
    """
    places = {prefix: place for place, prefix in enumerate(chances)}
    width = max(map(len, chances.values()), default=0)
    counts, table = np.zeros((len(places), width + 1)), np.zeros((len(places), width + 1))
    ranks = []
    for place, row in enumerate(chances.values()):
        ranks.append({token: rank for rank, (token, _) in enumerate(row)})
        table[place, : len(row)] = [probability for _, probability in row]
        table[place, -1] = max(0.0, 1 - table[place].sum())
    for prefix, token in pairs:
        place = places[prefix]
        counts[place, ranks[place].get(token, width)] += 1
    used = counts.sum(axis=1) > 0
    return Draws(counts[used], table[used])


def judge(
    draws: Draws, control_p: float, samples: int, prompts: int, positions: int
) -> DistributionTest:
    """What `draws` of one arm show, beside the p-value of the engine without a draft."""
    tests = chi_squares(draws)
    p_value = chance(tests)
    detects = smallest_found(tests, draws, ALPHA)
    passed: bool | None = p_value >= ALPHA
    if control_p < ALPHA or (passed and detects is None):
        passed = None
    return DistributionTest(
        p_value=p_value,
        control_p_value=control_p,
        passed=passed,
        power=power(tests, draws, STATED_BIAS, ALPHA),
        detects=detects,
        samples=samples,
        tokens=int(draws.counts.sum()),
        prompts=prompts,
        positions=positions,
    )


def _chances(
    engine: Engine,
    prefixes: Sequence[Prefix],
    progress: Callable[[int, int], None],
) -> dict[Prefix, Row]:
    """The most probable next tokens after each prefix, best first, with probabilities."""
    rows: dict[Prefix, Row] = {}
    for start in range(0, len(prefixes), CALL):
        progress(start, len(prefixes))
        batch = prefixes[start : start + CALL]
        generation = engine.generate([list(p) for p in batch], 1, ignore_eos=True, logprobs=TOP)
        for prefix, request in zip(batch, generation.requests, strict=True):
            assert request.logprobs is not None
            rows[prefix] = [(token, float(np.exp(v))) for token, v in request.logprobs[0][:TOP]]
    progress(len(prefixes), len(prefixes))
    return rows


def _evenly(count: int, wanted: int) -> list[int]:
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, wanted))})


def _seed(seed: int, engine: int, request: int) -> int:
    return int(np.random.SeedSequence([seed, engine, request]).generate_state(1)[0])

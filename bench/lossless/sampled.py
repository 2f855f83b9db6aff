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


def compare_samples(
    config: BenchConfig,
    engines: Mapping[str, Engine],
    prompts: Sequence[list[int]],
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> dict[str, DistributionTest]:
    """The tests of a run's drafted arms; none without samples, temperature or a `none` arm."""
    none = next((arm.name for arm in config.arms if arm.draft is None), None)
    positions = min(config.k + 1, config.max_tokens - 1)
    if none is None or config.temperature == 0 or config.samples == 0 or positions < 1:
        return {}
    return compare_distributions(
        engines[none],
        {arm.name: engines[arm.name] for arm in config.arms if arm.draft is not None},
        prompts,
        samples=config.samples,
        positions=positions,
        seed=config.seed,
        progress=lambda done, total: progress("testing the distribution", done, total),
    )


def compare_distributions(
    none: Engine,
    drafted: Mapping[str, Engine],
    prompts: Sequence[list[int]],
    *,
    samples: int,
    positions: int,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, DistributionTest]:
    """Test every drafted engine, `samples` requests each; results by the engines' names.

    All engines need the same target, a temperature > 0 and room for `positions` + 1 tokens after
    each prompt; `none` has no draft and `sampling_logprobs`. `positions` beyond k + 1 tell nothing
    new. `prompts` are token ids, of which a few are taken evenly.
    """
    chosen = [prompts[i] for i in _evenly(len(prompts), PROMPTS)]
    requests = [chosen[i % len(chosen)] for i in range(samples)]
    engines: dict[str | None, Engine] = {None: none}
    engines.update(drafted)
    total, done = len(requests) * len(engines), 0
    outputs: dict[str | None, list[list[int]]] = {name: [] for name in engines}
    for start in range(0, samples, CALL):
        batch = requests[start : start + CALL]
        for number, (name, engine) in enumerate(engines.items()):
            progress(done, total)
            seeds = [_seed(seed, number, start + i) for i in range(len(batch))]
            generation = engine.generate(batch, positions + 1, ignore_eos=True, seeds=seeds)
            outputs[name] += [request.output_ids for request in generation.requests]
            done += len(batch)
    drawn = {
        name: [
            ((*prompt, *output[:at]), output[at])
            for prompt, output in zip(requests, of_engine, strict=True)
            for at in range(1, len(output))
        ]
        for name, of_engine in outputs.items()
    }
    prefixes = {prefix for pairs in drawn.values() for prefix, _ in pairs}
    chances = _chances(none, sorted(prefixes), done, progress)
    control = gather(drawn.pop(None), chances)
    control_p = chance(chi_squares(control))
    return {
        name: judge(gather(drawn[name], chances), control_p, samples, len(chosen), positions)
        for name in drafted
    }


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
    done: int,
    progress: Callable[[int, int], None],
) -> dict[Prefix, Row]:
    """The most probable next tokens after each prefix, best first, with probabilities."""
    rows: dict[Prefix, Row] = {}
    for start in range(0, len(prefixes), CALL):
        progress(done + start, done + len(prefixes))
        batch = prefixes[start : start + CALL]
        generation = engine.generate([list(p) for p in batch], 1, ignore_eos=True, logprobs=TOP)
        for prefix, request in zip(batch, generation.requests, strict=True):
            assert request.logprobs is not None
            rows[prefix] = [(token, float(np.exp(v))) for token, v in request.logprobs[0][:TOP]]
    progress(done + len(prefixes), done + len(prefixes))
    return rows


def _evenly(count: int, wanted: int) -> list[int]:
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, wanted))})


def _seed(seed: int, engine: int, request: int) -> int:
    return int(np.random.SeedSequence([seed, engine, request]).generate_state(1)[0])

"""A sound sampler passes the distribution test, a broken one does not; and the test's own rates."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from bench.lossless.sampled import (
    ALPHA,
    DistributionTest,
    draw,
    gather,
    judge,
    judge_samples,
    plan_sampling,
)
from bench.lossless.token_test import Draws, chance, chi_squares, power, smallest_found
from drafts.target.info import read_target
from serving.engine.engine import EngineProcess, EngineSettings
from tests.opened import drafter

K, SAMPLES, TEMPERATURE = 3, 192, 0.5
PROMPTS = [[7, 300, 21, 9], list(range(100, 120))]

# A plugin for vLLM: while the flag file is there, a draft token that the target gives the chance p
# is accepted with the chance 1.5 p / q (at most 1) instead of p / q.
PLUGIN = """
import os

def register():
    from vllm.v1.sample import rejection_sampler
    original = rejection_sampler.generate_uniform_probs

    def biased(*arguments):
        return original(*arguments) / (1.5 if os.path.exists({flag!r}) else 1.0)

    rejection_sampler.generate_uniform_probs = biased
"""


@dataclass(frozen=True)
class Engines:
    """An engine without a draft, and one whose sampler is broken while the flag file exists."""

    none: EngineProcess
    drafted: EngineProcess
    flag: Path


@pytest.fixture(scope="module")
def engines(tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    """The draft is the target itself, drafting greedily: it always proposes the likeliest token."""
    folder = tmp_path_factory.mktemp("plugin")
    flag = folder / "biased"
    (folder / "biased_sampler.py").write_text(PLUGIN.format(flag=str(flag)))
    record = folder / "biased_sampler-1.0.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: biased-sampler\nVersion: 1.0\n")
    (record / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nbiased_sampler = biased_sampler:register\n"
    )
    started: list[EngineProcess] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", str(folder))
        try:
            for draft in (None, tiny_target):
                settings = EngineSettings(
                    read_target(tiny_target), drafter(draft), k=K, temperature=TEMPERATURE,
                    max_model_len=64, enforce_eager=True, batch=32, cache_gib=0.1,
                    sampling_logprobs=True,
                )  # fmt: skip
                started.append(EngineProcess(settings, wait=False))
            for engine in started:
                engine.wait_ready()
            yield Engines(started[0], started[1], flag)
        finally:
            for engine in started:
                engine.close()


def measured(engines: Engines) -> DistributionTest:
    plan = plan_sampling(PROMPTS, SAMPLES, K + 1)
    control, drawn = draw(engines.none, plan, 0), draw(engines.drafted, plan, 1)
    return judge_samples(engines.none, control, {"draft": drawn}, plan)["draft"]


def test_a_broken_acceptance_rule_is_found(engines: Engines) -> None:
    sound = measured(engines)
    engines.flag.touch()
    try:
        broken = measured(engines)
    finally:
        engines.flag.unlink()
    assert sound.passed is True
    assert sound.p_value > ALPHA
    assert sound.detects is not None
    assert sound.detects < 0.1
    assert broken.passed is False
    assert broken.p_value < 1e-6
    assert broken.control_p_value == sound.control_p_value > ALPHA
    assert (sound.samples, sound.tokens) == (SAMPLES, SAMPLES * (K + 1))


def test_seeds_decide_the_samples(engines: Engines) -> None:
    def outputs(seeds: list[int] | None, prompts: list[list[int]]) -> list[list[int]]:
        answer = engines.none.generate(prompts, 8, ignore_eos=True, seeds=seeds)
        return [request.output_ids for request in answer.requests]

    same = [PROMPTS[0]] * 2
    first, second = outputs([1, 2], same)
    assert first != second
    assert outputs([2, 1], same) == [second, first]
    assert outputs(None, PROMPTS) == outputs(None, PROMPTS)


def made(generator: np.random.Generator, share: float = 0.0, draws: int = 600) -> Draws:
    """Draws after prefixes of which a few are common, `share` of them the likeliest token."""
    sizes = np.array([150, 80, 40, 20, 10, *[1] * (draws - 300)])
    chances = -np.sort(-generator.dirichlet(np.full(24, 0.3), len(sizes)), axis=1)
    chances = np.column_stack([chances[:, :20], chances[:, 20:].sum(axis=1)])
    chances /= chances.sum(axis=1, keepdims=True)
    shifted = (1 - share) * chances
    shifted[:, 0] += share
    return Draws(generator.multinomial(sizes, shifted).astype(float), chances)


def test_false_alarms_are_as_rare_as_stated() -> None:
    generator = np.random.default_rng(1)
    values = np.array([chance(chi_squares(made(generator))) for _ in range(500)])
    assert (values < 0.05).mean() <= 0.05 + 0.02  # two standard errors
    assert (values < ALPHA).mean() <= ALPHA + 0.01


def test_the_stated_power_is_reached() -> None:
    generator = np.random.default_rng(2)
    sound = made(generator)
    tests = chi_squares(sound)
    detects = smallest_found(tests, sound, ALPHA)
    assert detects is not None
    assert power(tests, sound, detects, ALPHA) == pytest.approx(0.9)
    room = float(np.average(1 - sound.chances[:, 0], weights=sound.sizes))
    found = [chance(chi_squares(made(generator, share=detects / room))) < ALPHA for _ in range(200)]
    assert np.mean(found) > 0.8


def test_a_favour_for_particular_tokens_is_found_after_common_prefixes() -> None:
    """Over ranks it evens out: a token of each prefix, drawn by its chances, comes too often."""
    generator = np.random.default_rng(3)
    chances = -np.sort(-generator.dirichlet(np.full(21, 1.0), 8), axis=1)
    found = 0
    for _ in range(40):
        favoured = np.eye(21)[
            [generator.choice(20, p=row[:20] / row[:20].sum()) for row in chances]
        ]
        counts = generator.multinomial(200, 0.85 * chances + 0.15 * favoured).astype(float)
        found += chance(chi_squares(Draws(counts, chances))) < ALPHA
    assert found >= 36


def test_certain_tokens_leave_nothing_to_test() -> None:
    draws = Draws(np.array([[50.0, 0.0, 0.0]]), np.array([[1.0, 0.0, 0.0]]))
    assert chi_squares(draws) == []
    assert chance([]) == 1.0
    assert smallest_found([], draws, ALPHA) is None


@pytest.mark.parametrize("draws", [1, 2])
def test_too_little_data_is_no_verdict(draws: int) -> None:
    """`--samples 1`: nothing could have been found, so that nothing was is no news."""
    chances = made(np.random.default_rng(3)).chances[:draws]
    few = Draws(np.eye(draws, chances.shape[1]), chances)  # one draw after each prefix
    found = judge(few, 0.5, samples=draws, prompts=1, positions=1)
    assert (found.passed, found.detects) == (None, None)
    assert "cannot be told" in found.words
    assert "not enough data" in found.words
    many = judge(made(np.random.default_rng(3)), 0.5, samples=600, prompts=1, positions=1)
    assert many.passed is True
    failed = judge(made(np.random.default_rng(3)), ALPHA / 2, samples=600, prompts=1, positions=1)
    assert failed.passed is None
    assert "fails the test too" in failed.words


def test_draws_are_grouped_by_prefix() -> None:
    rows = {(1,): [(7, 0.6), (8, 0.3)], (1, 7): [(9, 0.5)], (2,): [(3, 1.0)]}
    draws = gather([((1,), 8), ((1,), 5), ((1, 7), 9), ((1,), 8)], rows)
    assert draws.counts.tolist() == [[0, 2, 1], [1, 0, 0]]
    np.testing.assert_allclose(draws.chances, [[0.6, 0.3, 0.1], [0.5, 0.0, 0.5]])

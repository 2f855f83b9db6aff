"""The step-cost model gets the costs back that made the times, and knows what it cannot know."""

from __future__ import annotations

import numpy as np
import pytest

from bench.sweep.step_time import Setting, fit

COSTS = np.array([7e-3, 4e-4, 2e-3, 1.5e-3, 1e-4])


def eagle(requests: float, k: int) -> Setting:
    return Setting(requests, k, k, "eagle")


def seconds(setting: Setting) -> float:
    """The formula of `bench.sweep.step_time`, written out once more."""
    b, d = setting.requests, setting.drafted
    time = COSTS[0] + COSTS[1] * b * (1 + d)
    if setting.shape:
        time += COSTS[2] + COSTS[3] * (setting.passes - 1) + COSTS[4] * b * d
    return float(time)


GRID = [Setting(1), Setting(4), *(eagle(b, k) for b in (1, 4) for k in (1, 3))]


def test_exact_times_give_the_exact_costs() -> None:
    model = fit(GRID, [seconds(s) for s in GRID])
    np.testing.assert_allclose(model.coefficients, COSTS, rtol=1e-6)
    assert np.abs(model.residuals).max() < 1e-6
    for unseen in (eagle(2, 2), eagle(4, 5), eagle(8, 3), Setting(2)):
        assert model.knows(unseen)
        assert model.cost(unseen).seconds == pytest.approx(seconds(unseen), rel=1e-6)


GRAPHS = (1, 2, 4, *range(8, 65, 8))  # vLLM's own choice for 64 tokens


@pytest.mark.parametrize(
    ("requests", "k", "computed"),
    [
        (1, 0, 1), (3, 0, 4), (5, 0, 8), (60, 0, 64), (100, 0, 100),  # none beyond the last
        (1, 3, 4), (3, 3, 16), (5, 3, 24),
        (1, 4, 5), (2, 4, 10), (5, 4, 25), (6, 4, 35),  # raised to multiples of 5
        (2.5, 0, 3), (5.25, 3, 24), (4.5, 3, 20), (0.5, 3, 4),  # of two whole numbers the mean
    ],
)  # fmt: skip
def test_a_step_is_filled_up_to_the_next_graph(requests: float, k: int, computed: float) -> None:
    assert Setting(requests, k, k, "eagle", GRAPHS).computed == pytest.approx(computed)
    assert Setting(requests, k, k, "eagle").computed == requests * (1 + k)


def test_a_staircase_is_foretold_by_the_graphs_that_make_it() -> None:
    """At 17 requests and k = 2 a device of graphs computes 72 tokens' worth for 51."""
    sizes = (1, 2, 4, 8, 16, 24, 48, 72, 96, 192)

    def time(s: Setting) -> float:
        filled = Setting(s.requests, s.drafted, s.passes, s.shape, sizes)
        extra = seconds(Setting(s.requests, s.drafted, s.passes, s.shape)) - COSTS[1] * s.tokens
        return float(extra + COSTS[1] * filled.computed)

    loads, ks = (1, 4, 9, 16, 33), (1, 3)
    plain = [Setting(b) for b in loads] + [eagle(b, k) for b in loads for k in ks]
    times = [time(s) for s in plain]
    graphed = [Setting(s.requests, s.drafted, s.passes, s.shape, sizes) for s in plain]
    asked = eagle(17, 2)
    known = Setting(asked.requests, asked.drafted, asked.passes, asked.shape, sizes)
    assert fit(graphed, times).cost(known).seconds == pytest.approx(time(asked), rel=1e-6)
    assert abs(fit(plain, times).cost(asked).seconds / time(asked) - 1) > 0.05


def test_noise_of_one_percent_stays_small_where_nothing_was_measured() -> None:
    generator = np.random.default_rng(0)
    worst = []
    for _ in range(50):
        model = fit(GRID, [seconds(s) * generator.normal(1, 0.01) for s in GRID])
        unseen = [eagle(2, 2), eagle(1, 5), eagle(4, 5), Setting(2)]
        worst.append(max(abs(model.cost(s).seconds / seconds(s) - 1) for s in unseen))
        assert (model.coefficients >= 0).all()
    assert np.median(worst) < 0.02
    assert max(worst) < 0.06


def test_leaving_one_out_tells_a_model_that_does_not_hold() -> None:
    """A step that costs twice as much at one setting is no plane any more."""
    grid = [*GRID, eagle(2, 2), eagle(2, 4), Setting(2)]
    good = fit(grid, [seconds(s) for s in grid])
    bent = fit(grid, [seconds(s) * (2 if s == eagle(2, 4) else 1) for s in grid])
    assert np.abs(good.left_out).max() < 1e-6
    assert np.abs(bent.left_out).max() > 0.3


def test_one_concurrency_tells_other_k_but_neither_other_loads_nor_other_targets() -> None:
    alone = [s for s in GRID if s.requests == 1]
    model = fit(alone, [seconds(s) for s in alone])
    assert model.knows(eagle(1, 2))
    assert model.cost(eagle(1, 2)).seconds == pytest.approx(seconds(eagle(1, 2)), rel=1e-6)
    assert not model.knows(eagle(4, 2))
    assert not model.knows(Setting(4))
    assert not model.knows(eagle(1, 2), target_scale=4)
    assert model.knows(Setting(1), target_scale=4)


def test_one_k_does_not_tell_another() -> None:
    once = [Setting(1), Setting(4), eagle(1, 3), eagle(4, 3)]
    model = fit(once, [seconds(s) for s in once])
    assert model.knows(eagle(2, 3))
    assert not model.knows(eagle(1, 5))


def test_a_draft_of_another_shape_is_unknown() -> None:
    model = fit(GRID, [seconds(s) for s in GRID])
    assert not model.knows(Setting(1, 3, 1, "dflash"))


def test_loads_that_hardly_differ_tell_nothing_of_others() -> None:
    """Such are the mean loads of waves whose requests end at different steps."""
    near = [Setting(4), eagle(3.9, 1), eagle(3.95, 3), eagle(3.93, 2)]
    model = fit(near, [seconds(s) for s in near])
    assert not model.knows(eagle(1, 2))
    assert model.knows(eagle(3.94, 2))


def test_drafts_with_costs_of_their_own_are_fitted_together() -> None:
    parallel = [Setting(b, k, 1, "dflash") for b in (1, 4) for k in (2, 4)]
    grid = [*GRID, *parallel]

    def time(s: Setting) -> float:
        if s.shape == "dflash":
            return seconds(Setting(s.requests, s.drafted)) + 5e-3 + 2e-4 * s.requests * s.drafted
        return seconds(s)

    model = fit(grid, [time(s) for s in grid])
    for unseen in (Setting(2, 3, 1, "dflash"), eagle(2, 2)):
        assert model.cost(unseen).seconds == pytest.approx(time(unseen), rel=1e-6)

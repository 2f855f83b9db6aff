"""The rule for learning rates: ties, edges, and where it stops."""

from __future__ import annotations

import pytest

from afaspec.compare.config import TuningConfig
from afaspec.compare.plan import Choice, best_rate, choose

GRID = [1e-3, 3e-3, 9e-3]


def settle(lengths: dict[float, float], rule: TuningConfig) -> tuple[Choice, list[float]]:
    """Try what the rule asks for until it is content; the choice, and the rates in that order."""
    tries: dict[float, float] = {}
    order: list[float] = []
    while (choice := choose(GRID, tries, rule)).rate is None:
        for rate in choice.untried:
            order.append(rate)
            tries[rate] = lengths[rate]
    return choice, order


def test_the_best_inside_the_grid_is_taken_and_nothing_else_is_tried() -> None:
    choice, order = settle({1e-3: 2.0, 3e-3: 2.5, 9e-3: 2.2}, TuningConfig())
    assert (choice.rate, choice.at_edge, order) == (3e-3, False, GRID)


def test_a_tie_goes_to_the_smaller_rate() -> None:
    assert best_rate({1e-3: 1.0, 3e-3: 1.991, 9e-3: 2.0}, tie=0.005) == 3e-3
    assert best_rate({1e-3: 1.0, 3e-3: 1.989, 9e-3: 2.0}, tie=0.005) == 9e-3


@pytest.mark.parametrize(
    ("lengths", "expected", "added"),
    [
        ({1e-3: 2.0, 3e-3: 2.1, 9e-3: 2.2, 2.7e-2: 2.1}, 9e-3, [2.7e-2]),
        ({1e-3: 2.0, 3e-3: 2.1, 9e-3: 2.2, 2.7e-2: 2.4, 8.1e-2: 2.3}, 2.7e-2, [2.7e-2, 8.1e-2]),
        ({1e-3: 2.4, 3e-3: 2.1, 9e-3: 2.0, 3.33e-4: 2.1}, 1e-3, [3.33e-4]),
    ],
)
def test_the_grid_grows_where_its_edge_is_best(
    lengths: dict[float, float], expected: float, added: list[float]
) -> None:
    choice, order = settle(lengths, TuningConfig())
    assert (choice.rate, choice.at_edge) == (expected, False)
    assert order == [*GRID, *added]


def test_growth_has_a_limit_and_says_so() -> None:
    rising = {rate: 2 + i / 10 for i, rate in enumerate([*GRID, 2.7e-2, 8.1e-2])}
    choice, order = settle(rising, TuningConfig(extensions=2))
    assert (choice.rate, choice.at_edge, len(order)) == (8.1e-2, True, 5)
    choice, order = settle(rising, TuningConfig(extensions=0))
    assert (choice.rate, choice.at_edge, len(order)) == (9e-3, True, 3)


def test_one_rate_is_taken_untried() -> None:
    assert choose([5e-4], {}, TuningConfig()) == Choice(5e-4)

"""Ranks by gradient: the budget is kept, and wide where the gradient has many directions."""

from __future__ import annotations

import torch

from afaspec.rank_allocation import allocate_ranks


def of_values(out: int, width: int, values: list[float]) -> torch.Tensor:
    """A matrix with these singular values."""
    torch.manual_seed(0)
    U = torch.linalg.qr(torch.randn(out, len(values)))[0]
    V = torch.linalg.qr(torch.randn(width, len(values)))[0]
    return U @ torch.diag(torch.tensor(values)) @ V.T


def test_directions_go_where_they_are_worth_most() -> None:
    gradients = {
        "rich": of_values(20, 20, [9.0, 8.0, 7.0, 6.0]),
        "poor": of_values(20, 20, [5.0, 0.1, 0.1, 0.1]),
    }
    assert allocate_ranks(gradients, 2) == {"rich": 3, "poor": 1}


def test_a_wide_layer_has_to_be_worth_its_parameters() -> None:
    gradients = {
        "wide": of_values(20, 300, [2.0, 2.0, 2.0, 2.0]),
        "narrow": of_values(20, 20, [1.0, 1.0, 1.0, 1.0]),
    }
    ranks = allocate_ranks(gradients, 2)
    assert ranks["narrow"] > ranks["wide"] >= 1


def test_the_budget_is_never_exceeded() -> None:
    torch.manual_seed(1)
    shapes = {"a": (30, 50), "b": (10, 70), "c": (64, 64)}
    gradients = {name: torch.randn(shape) for name, shape in shapes.items()}
    for rank in (1, 2, 5, 8):
        ranks = allocate_ranks(gradients, rank)
        spent = sum(ranks[name] * sum(shape) for name, shape in shapes.items())
        budget = rank * sum(sum(shape) for shape in shapes.values())
        assert budget - max(sum(s) for s in shapes.values()) < spent <= budget
        assert min(ranks.values()) >= 1

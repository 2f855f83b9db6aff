"""Draws from a vocabulary: distributed as asked, by the seed alone."""

import pytest
import torch
from scipy.stats import chisquare

from afaspec.capture.generate import BLOCK, draw


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("vocab", [7, BLOCK, 2 * BLOCK + 5])
def test_tokens_are_drawn_as_often_as_they_are_likely(vocab: int) -> None:
    """A token that cannot be drawn lies in each vocabulary, and a whole block in the longest."""
    probabilities = torch.softmax(2 * torch.randn(vocab, generator=seeded(1)), dim=0)
    probabilities[3] = 0
    if vocab > 2 * BLOCK:
        probabilities[BLOCK : 2 * BLOCK] = 0
    probabilities /= probabilities.sum()
    tokens = draw(probabilities.expand(40_000, vocab), seeded())

    seen = torch.bincount(tokens, minlength=vocab)
    assert len(seen) == vocab, "a token outside of the vocabulary"
    possible = probabilities > 0
    assert not seen[~possible].any()
    expected = 40_000 * probabilities[possible].double()
    expected *= 40_000 / expected.sum()
    assert chisquare(seen[possible].numpy(), expected.numpy()).pvalue > 0.001


def test_rows_have_their_own_distribution_and_the_seed_decides() -> None:
    certain = torch.tensor([5, BLOCK, 2 * BLOCK + 1])
    rows = torch.nn.functional.one_hot(certain, 3 * BLOCK).float()
    assert torch.equal(draw(rows, seeded()), certain)

    flat = torch.full((8, 3 * BLOCK), 1 / (3 * BLOCK))
    assert torch.equal(draw(flat, seeded()), draw(flat, seeded()))
    assert not torch.equal(draw(flat, seeded()), draw(flat, seeded(1)))

"""Temperatures are spread over drafted tokens as vLLM's own kernel should.

That engines draw by the target's distribution after the repair is in tests/bench/test_distribution.
"""

from __future__ import annotations

import torch

from serving.engine.sampler import spread


def test_values_are_repeated_for_each_requests_tokens() -> None:
    ends = torch.tensor([2, 2, 5], dtype=torch.int32)  # two tokens, none, three
    temperatures = torch.tensor([0.7, 0.5, 0.0])
    assert (
        spread(temperatures, ends, 5, 0, 1).tolist() == torch.tensor([0.7, 0.7, 1, 1, 1]).tolist()
    )
    top_k = torch.tensor([4, 5, 6], dtype=torch.int32)
    found = spread(top_k, ends, 5)
    assert found.tolist() == [4, 4, 6, 6, 6]
    assert found.dtype == torch.int32

"""Ranks by layer: adapters are wider where the gradient of the frozen weights says most."""

from __future__ import annotations

import heapq

import torch
from torch import Tensor


def allocate_ranks(gradients: dict[str, Tensor], rank: int) -> dict[str, int]:
    """Ranks by layer that cost no more parameters than `rank` in every layer, and at least 1 each.

    Directions are bought one by one: always the one whose squared singular value of its layer's
    gradient [out, in] is largest for the in + out parameters that it costs.
    """
    costs = {name: sum(gradient.shape) for name, gradient in gradients.items()}
    worth = {
        name: (torch.linalg.svdvals(g.float()) ** 2 / costs[name]).tolist()
        for name, g in gradients.items()
    }
    ranks = dict.fromkeys(gradients, 1)
    left = (rank - 1) * sum(costs.values())
    heap = [(-worth[name][1], name) for name in ranks if len(worth[name]) > 1]
    heapq.heapify(heap)
    while heap:
        _, name = heapq.heappop(heap)
        if costs[name] > left:
            continue
        left -= costs[name]
        ranks[name] += 1
        if ranks[name] < len(worth[name]):
            heapq.heappush(heap, (-worth[name][ranks[name]], name))
    return ranks

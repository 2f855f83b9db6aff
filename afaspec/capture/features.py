"""The hidden states that drafts read: from a batched forward of the target without its lm_head, or
kept as the target writes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from drafts.errors import UserError

FINAL = -1  # beside layer ids: the states after the final norm
States = tuple[Tensor, Tensor]  # of n tokens: hidden [n, layers * d] and final [n, d], bf16, on CPU


@torch.inference_mode()
def features(
    model: Any, sequences: Sequence[Sequence[int]], layer_ids: Sequence[int], max_tokens: int
) -> Iterator[States]:
    """Yield the states of each sequence.

    Layer id i is the residual stream after i layers (0: the embeddings; never normed); final is
    after the final norm. At most `max_tokens` padded tokens go through the model at a time.
    """
    for group in _groups(sequences, max_tokens):
        width = max(map(len, group))
        tokens = torch.zeros(len(group), width, dtype=torch.long)
        for row, ids in enumerate(group):
            tokens[row, : len(ids)] = torch.tensor(ids)
        # Right padding needs no mask: with causal attention no token sees what follows it.
        with tapped(model, layer_ids) as states:
            model.get_decoder()(input_ids=tokens.to(model.device), use_cache=False)
            hidden, final = _side_by_side(states, layer_ids)
        for row, ids in enumerate(group):
            yield hidden[row, : len(ids)].clone(), final[row, : len(ids)].clone()


def _side_by_side(states: dict[int, Tensor], layer_ids: Sequence[int]) -> States:
    """What `tapped` found, [rows, n, ...]."""
    final = states[FINAL]
    stacked = torch.cat([states[i] for i in layer_ids] or [final[..., :0]], dim=-1)
    return stacked.to("cpu", torch.bfloat16), final.to("cpu", torch.bfloat16)


class Keeper:
    """The states of texts while they are written, piece by piece.

    They are those of `features` but for rounding: a token's were computed in another shape.
    """

    def __init__(self, states: dict[int, Tensor], layer_ids: Sequence[int], texts: int):
        self._states, self._layer_ids = states, layer_ids
        self._pieces: list[States] = []
        self._places: list[list[tuple[int, int]]] = [[] for _ in range(texts)]  # start and count
        self._held = 0

    def add(self, rows: Iterable[tuple[int, int, int]]) -> None:
        """Of the forward just done [rows, n, d], the last tokens of some `rows`: row, number of its
        text, and how many tokens."""
        hidden, final = _side_by_side(self._states, self._layer_ids)
        width = hidden.shape[1]
        for row, text, count in rows:
            self._places[text].append((self._held + (row + 1) * width - count, count))
        self._pieces.append((hidden.flatten(0, 1), final.flatten(0, 1)))
        self._held += len(hidden) * width

    def kept(self) -> Iterator[States]:
        """The states of each text, in order; they are given away."""
        hidden, final = (torch.cat(of) for of in zip(*self._pieces, strict=True))
        self._pieces = []  # thousands of steps' are one by now: a text is picked out of it at once
        for places in self._places:
            numbers = torch.cat([torch.arange(start, start + count) for start, count in places])
            yield hidden.index_select(0, numbers), final.index_select(0, numbers)


@contextmanager
def keeping(model: Any, layer_ids: Sequence[int], texts: int) -> Iterator[Keeper]:
    """Within, forwards of `model` can be kept for so many texts."""
    with tapped(model, layer_ids) as states:
        yield Keeper(states, layer_ids, texts)


@contextmanager
def tapped(model: Any, layer_ids: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Within, a forward of `model` leaves the wanted residual streams [rows, n, d] in the dict, and
    those after the final norm."""
    states: dict[int, Tensor] = {}
    layers = decoder_layers(model)

    def after(i: int) -> Any:
        def keep(_module: Any, _args: Any, output: Any) -> None:
            states[i] = output[0] if isinstance(output, tuple) else output

        return keep

    def before(_module: Any, args: Any, kwargs: Any) -> None:
        states[0] = args[0] if args else kwargs["hidden_states"]

    def last(_module: Any, _args: Any, output: Any) -> None:
        states[FINAL] = output[0]

    handles = [model.get_decoder().register_forward_hook(last)]
    for i in set(layer_ids):
        if i == 0:
            handles.append(layers[0].register_forward_pre_hook(before, with_kwargs=True))
        else:
            handles.append(layers[i - 1].register_forward_hook(after(i)))
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def decoder_layers(model: Any) -> Any:
    """The target's decoder layers in order. `UserError` for architectures that hide them."""
    layers = getattr(model.get_decoder(), "layers", None)
    expected = model.config.get_text_config().num_hidden_layers
    if layers is None or len(layers) != expected:
        raise UserError(
            f"{type(model).__name__} does not keep its {expected} decoder layers where afaspec "
            "looks for them (`layers`)",
            hint="use a target of a usual decoder-only architecture such as Llama or Qwen",
        )
    return layers


def _groups(sequences: Sequence[Sequence[int]], max_tokens: int) -> Iterator[list[Sequence[int]]]:
    """Consecutive sequences whose padded size stays within `max_tokens` (at least one each)."""
    group: list[Sequence[int]] = []
    for ids in sequences:
        width = max(map(len, [*group, ids]))
        if group and width * (len(group) + 1) > max_tokens:
            yield group
            group = []
        group.append(ids)
    if group:
        yield group

"""Batched generation: left padding, one buffer for keys and values, finished rows dropped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from afaspec.capture.features import Keeper

BLOCK = 256  # tokens; some square root of a vocabulary
PREFILL_TOKENS = 8192  # through the model at a time, padding and all


class GrowingLayer(DynamicLayer):
    """A layer's keys and values in one buffer made for the longest sequence.

    The stock layer copies everything at each step; here a step writes only its own token.
    """

    keys: Tensor
    values: Tensor
    is_initialized: bool

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity = capacity
        self.length = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append [rows, heads, n, head_dim] states and return all so far."""
        if not self.is_initialized:
            self.dtype, self.device = key_states.dtype, key_states.device
            rows = len(key_states)
            self._keys = _buffer(key_states, self.capacity, rows)
            self._values = _buffer(value_states, self.capacity, rows)
            self.is_initialized = True
        start, self.length = self.length, self.length + key_states.shape[-2]
        self._keys[:, :, start : self.length] = key_states
        self._values[:, :, start : self.length] = value_states
        self._look()
        return self.keys, self.values

    def fill(self, start: int, rows: int, end: int, keys: Tensor, values: Tensor) -> None:
        """Keep the states of the rows from `start` on, out of `rows`, so that they end at `end`.

        What lies before is zero: it is masked, and a mask does not hide what is not a number.
        """
        if not self.is_initialized:
            self.dtype, self.device = keys.dtype, keys.device
            self._keys = _buffer(keys, self.capacity, rows).zero_()
            self._values = _buffer(values, self.capacity, rows).zero_()
            self.is_initialized, self.length = True, end
            self._look()
        own, count = slice(start, start + len(keys)), keys.shape[-2]
        self._keys[own, :, end - count : end] = keys
        self._values[own, :, end - count : end] = values

    def batch_select_indices(self, indices: Tensor) -> None:
        self._keys, self._values = self._keys[indices], self._values[indices]
        self._look()

    def _look(self) -> None:
        self.keys = self._keys[:, :, : self.length]
        self.values = self._values[:, :, : self.length]


def _buffer(states: Tensor, capacity: int, rows: int) -> Tensor:
    _, heads, _, width = states.shape
    return states.new_empty(rows, heads, capacity, width)


def make_cache(model: Any, capacity: int) -> Any:
    """A cache for `model` whose full-attention layers never copy what they hold."""
    cache = DynamicCache(config=model.config)
    cache.layers = [
        GrowingLayer(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache


@torch.inference_mode()
def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    end_ids: frozenset[int],
    seed: int,
    on_step: Callable[[int, int], None] | None = None,
    keeper: Keeper | None = None,
) -> list[list[int]]:
    """Continue each prompt up to its end token (kept) or `max_new_tokens`.

    Temperature 0 takes the likeliest token. `seed` alone decides the draws of this batch.
    `on_step(step, rows)` is called after each step with the rows that got a token. `keeper` gets
    the states of all tokens, the last included, which takes a step more.
    """
    device = model.device
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    width = len(prompts[order[-1]])
    tokens = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts[i] for i in order):
        tokens[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    padded = bool((mask == 0).any())
    tokens, mask = tokens.to(device), mask.to(device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = make_cache(model, width + max_new_tokens)
    generator = torch.Generator(device).manual_seed(seed)
    ends = torch.tensor(sorted(end_ids), device=device)

    rows = torch.tensor(order, device=device)  # which prompt each row of the batch is
    alive = torch.ones(len(prompts), dtype=torch.bool, device=device)
    output = torch.full((len(prompts), max_new_tokens), -1, dtype=torch.long, device=device)

    def keep_prompts(start: int, count: int) -> None:
        if keeper:
            texts = order[start : start + count]
            keeper.add([(row, i, len(prompts[i])) for row, i in enumerate(texts)])

    logits = _prefill(model, tokens, mask, positions, cache, keep_prompts)
    for step in range(max_new_tokens):
        chosen = _choose(logits, temperature, generator)
        output[rows[alive], step] = chosen[alive]
        fed, count = alive.clone(), int(alive.sum())
        alive &= ~torch.isin(chosen, ends)
        if on_step:
            on_step(step, count)
        last = step + 1 == max_new_tokens or not bool(alive.any())
        if last and not keeper:
            break
        tokens, positions = chosen[:, None], positions[:, -1:] + 1
        if padded:
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        needed = fed if keeper else alive
        if int(needed.sum()) <= len(rows) * 3 // 4:
            kept = needed.nonzero()[:, 0]
            rows, tokens, positions, mask = rows[kept], tokens[kept], positions[kept], mask[kept]
            alive, fed = alive[kept], fed[kept]
            for layer in cache.layers:
                layer.batch_select_indices(kept)
        logits = _last_logits(model, tokens, mask if padded else None, positions, cache)
        if keeper:
            pairs = zip(rows.tolist(), fed.tolist(), strict=True)
            keeper.add([(row, text, 1) for row, (text, new) in enumerate(pairs) if new])
        if last:
            break
    return [[int(token) for token in line if token >= 0] for line in output.tolist()]


def _prefill(
    model: Any,
    tokens: Tensor,
    mask: Tensor,
    positions: Tensor,
    cache: Any,
    done: Callable[[int, int], None],
) -> Tensor:
    """The last logits [rows, vocab] of left-padded prompts [rows, width], shortest first.

    Rows of like length go through together, as wide as the longest of them, so that little padding
    is computed. Where a layer keeps states of another kind, all go at once. `done` is told the
    first row and the number of those that went through.
    """
    rows, width = tokens.shape
    lengths = mask.sum(1).tolist()
    if not all(isinstance(layer, GrowingLayer) for layer in cache.layers):
        padded = mask if lengths[0] < width else None
        whole = _last_logits(model, tokens, padded, positions, cache)
        done(0, rows)
        return whole
    logits, start = [], 0
    while start < rows:
        end = start + 1
        while end < rows and (end + 1 - start) * lengths[end] <= PREFILL_TOKENS:
            end += 1
        own = slice(start, end), slice(width - lengths[end - 1], width)
        part = DynamicCache(config=model.config)
        padded = mask[own] if lengths[start] < lengths[end - 1] else None
        logits.append(_last_logits(model, tokens[own], padded, positions[own], part))
        done(start, end - start)
        for buffer, layer in zip(cache.layers, part.layers, strict=True):
            buffer.fill(start, rows, width, layer.keys, layer.values)
        start = end
    return torch.cat(logits)


def _last_logits(
    model: Any, tokens: Tensor, mask: Tensor | None, positions: Tensor, cache: Any
) -> Tensor:
    """Logits [rows, vocab] after the last of the tokens [rows, n]."""
    output = model(
        input_ids=tokens,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    last: Tensor = output.logits[:, -1]
    return last


def _choose(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """[rows, vocab] to one token id per row."""
    if temperature == 0:
        return logits.argmax(-1)
    return draw(torch.softmax(logits.float() / temperature, dim=-1), generator)


def draw(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """[rows, vocab] to one token id per row: first a block of the vocabulary, then its token.

    `multinomial` makes a random number for every entry, which over a whole vocabulary takes as
    long as half of a small model's forward pass. Two draws have the same distribution.
    """
    if spare := -probabilities.shape[-1] % BLOCK:
        probabilities = torch.nn.functional.pad(probabilities, (0, spare))
    blocks = probabilities.unflatten(-1, (-1, BLOCK))
    block = torch.multinomial(blocks.sum(-1), 1, generator=generator)[:, 0]
    inside = blocks[torch.arange(len(blocks), device=blocks.device), block]
    return block * BLOCK + torch.multinomial(inside, 1, generator=generator)[:, 0]


NAME = "afaspec_grouped"


def grouped_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [rows, heads, n, width], key and value [rows, key heads, length, width]; returns
    [rows, n, heads, width]. More than one new token per row goes the usual way."""
    rows, heads, new, width = query.shape
    shared = key.shape[1]
    if new != 1 or heads == shared or kwargs.get("position_bias") is not None:
        usual: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **kwargs
        )
        return usual
    grouped = query.view(rows, shared, heads // shared, width)
    output = torch.nn.functional.scaled_dot_product_attention(
        grouped, key, value, attn_mask=attention_mask, scale=kwargs.get("scaling")
    )
    return output.reshape(rows, 1, heads, output.shape[-1]), None


AttentionInterface.register(NAME, grouped_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def use_fast_decoding(model: Any) -> None:
    """Let a model that uses torch's own attention decode with the grouped one."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)

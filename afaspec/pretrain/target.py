"""Train the embedded target from scratch: Muon for matrices, AdamW for the rest, bf16 autocast.

The budget is wall time (or tokens), so that the same command suits two CPU cores and a GPU. The
last part of training runs on rounded weights (straight-through), since those are what ships.
Progress is saved every few minutes; a killed run goes on from there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from afaspec.embedded.quantize import round_to_grid
from afaspec.pretrain.config import PretrainConfig, TargetShape
from afaspec.train.step import autocast, training_step
from drafts.tensors import has_bf16

TARGET_BITS = 4


def target_config(config: PretrainConfig, end_id: int, pad_id: int) -> LlamaConfig:
    return LlamaConfig(
        **config.shared_with(TargetShape),
        tie_word_embeddings=True,
        bos_token_id=end_id,
        eos_token_id=end_id,
        pad_token_id=pad_id,
    )


@contextmanager
def rounded_weights(model: nn.Module) -> Iterator[None]:
    """Within, matrices hold their rounded values; after it, their own. Gradients pass straight."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    own = [p.detach().clone() for p in matrices]
    with torch.no_grad():
        for p in matrices:
            p.copy_(round_to_grid(p, TARGET_BITS))
    yield
    with torch.no_grad():
        torch._foreach_copy_(matrices, own)


def pretrain(
    config: PretrainConfig,
    streams: dict[str, Any],
    weights: dict[str, float],
    model_config: LlamaConfig,
    folder: Path,
    say: Callable[[str], None] = print,
    stage: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> LlamaForCausalLM:
    """Train within the budget and return the model, its weights not yet rounded.

    `streams` are int32 token ids per domain; the last 2% of each are kept for validation.
    `stage` is told the tokens or seconds of the budget. Writes `loss.jsonl` and the
    resumable `state.pt` to `folder`.
    """
    accelerator = Accelerator()
    torch.manual_seed(config.seed)
    model = LlamaForCausalLM(model_config).to(accelerator.device)
    parameters, optimizers = list(model.parameters()), _optimizers(model, config)
    loss_fn = torch.compile(_loss, dynamic=False) if config.compiled else _loss
    train = {name: ids[: int(len(ids) * 0.98)] for name, ids in streams.items()}
    held_out = {name: ids[int(len(ids) * 0.98) :] for name, ids in streams.items()}

    state_path, log_path = folder / "state.pt", folder / "loss.jsonl"
    step, tokens, spent = _load(state_path, model, optimizers)
    started = saved = time.monotonic()

    def seconds() -> float:
        return spent + time.monotonic() - started

    def done() -> float:
        used: tuple[float, float] = tokens, config.tokens or 0
        if config.tokens is None:
            assert config.minutes is not None
            used = seconds(), 60 * config.minutes
        stage("training the target", int(used[0]), int(used[1]))
        return used[0] / used[1]

    while (progress := done()) < 1.0:
        long = progress >= 1 - config.long_fraction
        length = config.max_position_embeddings if long else config.sequence_length
        rng = np.random.default_rng([config.seed, step])
        batch = _draw(train, weights, config.tokens_per_step // length, length, rng)
        factor = _learning_rate_factor(config, step, progress)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor

        rounded = progress >= 1 - config.rounded_fraction
        loss, _ = training_step(
            accelerator,
            [partial(loss_fn, model, batch.to(accelerator.device))],
            parameters,
            optimizers,
            clip=1.0,
            weights=rounded_weights(model) if rounded else nullcontext(),
        )
        step += 1
        tokens += batch.numel()

        if step % 20 == 0:
            row: dict[str, Any] = {"step": step, "tokens": tokens, "loss": round(loss, 4)}
            row |= {"minutes": round(seconds() / 60, 2), "rounded": rounded}
            if step % 200 == 0:
                row["held_out"] = _evaluate(model, held_out, config)
            with log_path.open("a") as log:
                log.write(json.dumps(row) + "\n")
            say(json.dumps(row))
        if time.monotonic() - saved > 60 * config.save_minutes:
            saved = time.monotonic()
            _save(state_path, model, optimizers, (step, tokens, spent + saved - started))

    _save(state_path, model, optimizers, (step, tokens, seconds()))
    with rounded_weights(model), log_path.open("a") as log:
        final = {
            "step": step,
            "tokens": tokens,
            "minutes": round(seconds() / 60, 2),
            "final_held_out": _evaluate(model, held_out, config),
        }
        log.write(json.dumps(final) + "\n")
    return model


def _loss(model: LlamaForCausalLM, batch: Tensor) -> Tensor:
    hidden = model.model(input_ids=batch).last_hidden_state[:, :-1]
    logits = nn.functional.linear(hidden, model.lm_head.weight)
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


def _optimizers(model: nn.Module, config: PretrainConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, fused AdamW for embeddings and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    muon = torch.optim.Muon(matrices, lr=config.muon_lr, weight_decay=config.weight_decay)
    adamw = torch.optim.AdamW(
        others, lr=config.adamw_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    for optimizer in (muon, adamw):
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return [muon, adamw]


def _learning_rate_factor(config: PretrainConfig, step: int, progress: float) -> float:
    """Warm up over steps, hold, then fall linearly to 5% over the last part of the budget."""
    warm = min(1.0, (step + 1) / config.warmup_steps)
    return warm * max(0.05, min(1.0, (1 - progress) / config.decay_fraction))


def _draw(
    streams: dict[str, Any], weights: dict[str, float], rows: int, length: int, rng: Any
) -> Tensor:
    """`rows` random windows [rows, length]; domains drawn by weight, positions uniformly."""
    names = list(weights)
    shares = np.array([weights[name] for name in names])
    picked = []
    for name in rng.choice(names, size=rows, p=shares / shares.sum()):
        start = rng.integers(0, len(streams[name]) - length)
        picked.append(streams[name][start : start + length])
    return torch.from_numpy(np.stack(picked).astype(np.int64))


@torch.no_grad()
def _evaluate(
    model: LlamaForCausalLM, streams: dict[str, Any], config: PretrainConfig
) -> dict[str, float]:
    """Mean loss (nats per token) on the first held-out windows of each domain."""
    losses = {}
    for name, ids in streams.items():
        length = config.sequence_length
        rows = min(8, len(ids) // length)
        batch = torch.from_numpy(ids[: rows * length].reshape(rows, length).astype(np.int64))
        with autocast(model.device, bf16=has_bf16(model.device)):
            losses[name] = round(float(_loss(model, batch.to(model.device))), 4)
    return losses


def _save(
    path: Path, model: nn.Module, optimizers: list[Any], counters: tuple[int, int, float]
) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(
        {
            "model": model.state_dict(),
            "optimizers": [o.state_dict() for o in optimizers],
            "counters": counters,
        },
        temporary,
    )
    temporary.replace(path)


def _load(path: Path, model: nn.Module, optimizers: list[Any]) -> tuple[int, int, float]:
    if not path.exists():
        return 0, 0, 0.0
    state = torch.load(path, weights_only=True, map_location="cpu")
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    step, tokens, spent = state["counters"]
    return step, tokens, spent

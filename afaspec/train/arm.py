"""What makes an arm: the parameters that train, where they begin, their rates, and the loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from afaspec.adapters.afa import adapt
from afaspec.adapters.gradient_init import init_lora_a, weight_gradients
from afaspec.train.checks import LOOK
from afaspec.train.config import OWN_INITS, LossSettings, TrainConfig
from afaspec.train.objective import DraftObjective
from afaspec.train.step import autocast
from drafts.checkpoint.info import DraftInfo
from drafts.errors import NotFiniteError, UserError
from drafts.nn.interface import Draft
from drafts.registry import load_draft
from drafts.target.head import load_target_head
from drafts.target.info import TargetInfo

GRADIENT_STEPS = 4  # whose gradients decide on where adapters begin
OF_WEIGHTS = ("pissa", "olora")  # inits that take A and B from the weight itself


@dataclass
class Setup:
    """All that a training step needs of one arm, on its device.

    `wrapped` is the PEFT model around the draft, or the draft itself where all of it trains.
    """

    draft: Draft
    wrapped: Any
    objective: DraftObjective
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer


def set_up(config: TrainConfig, info: DraftInfo, target: TargetInfo, device: torch.device) -> Setup:
    """The draft as it begins, with what trains it. Sets the seed."""
    torch.manual_seed(config.seed)
    draft = load_draft(info, target)
    draft.gradient_checkpointing = config.gradient_checkpointing
    wrapped, parameters = prepare_arm(draft, config, info.folder)
    head = load_target_head(target).to(torch.bfloat16 if config.bf16 else torch.float32)
    objective = DraftObjective(draft, head, **config.shared_with(LossSettings))
    objective.to(device)  # before the optimizer, whose state lies where its parameters do
    optimizer = torch.optim.AdamW(decay_groups(parameters, config.weight_decay), fused=True)
    return Setup(draft, wrapped, objective, parameters, optimizer)


def decay_groups(parameters: list[nn.Parameter], decay: float) -> list[dict[str, Any]]:
    """Matrices with weight decay, norms and biases without."""
    matrices = [p for p in parameters if p.ndim > 1]
    others = [p for p in parameters if p.ndim <= 1]
    groups = [(matrices, decay), (others, 0.0)]
    return [{"params": group, "weight_decay": value} for group, value in groups if group]


def learning_rate(config: TrainConfig, peak: float, step: int) -> float:
    """Linear warm-up to `peak`, then cosine to zero, at 0-based optimizer step `step`."""
    warm = round(config.warmup * config.steps)
    rising = min((step + 1) / warm, 1.0) if warm else 1.0
    done = max((step - warm) / max(config.steps - warm, 1), 0.0)
    return peak * rising * 0.5 * (1 + math.cos(math.pi * done))


def adapted_modules(draft: nn.Module, config: TrainConfig) -> list[str]:
    """The last parts of the names of the linear layers that get adapters."""
    known = {
        name.rsplit(".", 1)[-1] for name, m in draft.named_modules() if isinstance(m, nn.Linear)
    }
    chosen = config.modules or sorted(known - {"lm_head"})
    modules = [*chosen, *(["lm_head"] if config.lm_head else [])]
    if unknown := sorted(set(modules) - known):
        raise UserError(
            f"modules names {', '.join(unknown)}, which the draft has not",
            hint=f"choose from {', '.join(sorted(known))}",
        )
    return modules


def unadapted(draft: nn.Module, modules: list[str]) -> list[str]:
    """Modules that are called as those with adapters are and get none: an MTP layer's experts."""
    return [
        name
        for name, module in draft.named_modules()
        if name.rsplit(".", 1)[-1] in modules and not isinstance(module, nn.Linear)
    ]


def check_rank(draft: nn.Module, modules: list[str], config: TrainConfig) -> None:
    """Raise `UserError` where the weights are too small to take adapters of this rank from."""
    if not config.init.startswith(OF_WEIGHTS):
        return
    for name, layer in draft.named_modules():
        adapted = isinstance(layer, nn.Linear) and name.rsplit(".", 1)[-1] in modules
        if adapted and config.rank > (most := min(layer.weight.shape)):
            raise UserError(
                f"rank is {config.rank}, but {name} is {list(layer.weight.shape)}: with init "
                f"{config.init} it has {most} directions",
                hint=f"give --rank {most} or less, or leave it out with --modules",
            )


def init_from_gradients(
    accelerator: Accelerator,
    draft: Draft,
    config: TrainConfig,
    losses: Iterable[Callable[[], Tensor]],
) -> None:
    """With `init: gradient`, point the new adapters along the gradients of the first steps' losses.

    Gradients are summed over all processes.
    """
    if config.arm == "full" or config.init != "gradient":
        return

    def loss(share: Callable[[], Tensor]) -> Tensor:
        with autocast(accelerator.device, bf16=config.bf16):
            return share()

    layers = {n: m for n, m in draft.named_modules() if isinstance(m, LoraLinear)}
    gradients = weight_gradients(
        {name: layer.get_base_layer() for name, layer in layers.items()},
        (partial(loss, share) for share in losses),
    )
    draft.zero_grad(set_to_none=True)  # the adapters' own
    for name, own in gradients.items():
        gradient = accelerator.reduce(own, reduction="sum")
        if not gradient.isfinite().all():
            raise NotFiniteError(
                f"the gradient of {name} is NaN or infinite before the first step", hint=LOOK
            )
        for A in layers[name].lora_A.values():
            init_lora_a(A.weight, gradient)


def prepare_arm(
    draft: nn.Module, config: TrainConfig, base: Path
) -> tuple[Any, list[nn.Parameter]]:
    """Make exactly the arm's parameters trainable, in place; the PEFT model (or the draft).

    A saved adapter names `base`, the draft's folder.
    """
    if config.arm == "full":
        frozen = {"embed_tokens"} if config.lm_head else {"embed_tokens", "lm_head"}
        for name, parameter in draft.named_parameters():
            parameter.requires_grad_(frozen.isdisjoint(name.split(".")))
        return draft, [p for p in draft.parameters() if p.requires_grad]
    modules = adapted_modules(draft, config)
    check_rank(draft, modules, config)
    wrapped = adapt(
        draft,
        LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha or 2 * config.rank,
            use_rslora=config.rslora,
            lora_dropout=config.dropout,
            init_lora_weights=True if config.init in OWN_INITS else config.init,
            target_modules=modules,
            exclude_modules=unadapted(draft, modules) or None,
        ),
        config.activation if config.arm == "afa-lora" else None,
    )
    wrapped.peft_config["default"].base_model_name_or_path = str(base.resolve())
    return wrapped, [p for p in draft.parameters() if p.requires_grad]

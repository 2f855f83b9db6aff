"""Folding: an adapter's update goes into the frozen weights, and a fresh adapter goes on.

Adapters merge at no cost, so a run can do so several times (cycles; ReLoRA, arXiv 2307.05695):
the rank of the whole update grows with every cycle, what is trained at any time does not. What was
folded is kept beside the run, so that the result is one stock PEFT LoRA of the summed rank.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

WRAPPER = "base_model.model."  # what PEFT puts before names
NAME = "default"  # PEFT's name for the one adapter that there is
Pair = tuple[Tensor, Tensor]  # A [r, in] and B [out, r]


@dataclass
class Folded:
    """The updates folded so far: by layer, a pair per cycle."""

    pairs: dict[str, list[Pair]] = field(default_factory=dict)

    @property
    def cycles(self) -> int:
        return max((len(pairs) for pairs in self.pairs.values()), default=0)

    def fold(self, model: nn.Module) -> None:
        """Add each adapter's update to the weights under it, and make the adapter new."""
        for name, layer in lora_layers(model).items():
            pair = (layer.lora_A[NAME].weight, layer.lora_B[NAME].weight)
            self.pairs.setdefault(name, []).append(
                tuple(part.detach().cpu().clone() for part in pair)
            )
            base = layer.get_base_layer().weight
            with torch.no_grad():
                base += layer.get_delta_weight(NAME).to(base.dtype)
            layer.reset_lora_parameters(NAME, True)

    def refold(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        """Fold again, into a model that was just loaded, what `state` (of `tensors`) holds."""
        layers = lora_layers(model)
        for cycle in range(len(state) // (2 * len(layers)) if layers else 0):
            for name, layer in layers.items():
                with torch.no_grad():
                    layer.lora_A[NAME].weight.copy_(state[f"{cycle}|{name}|A"])
                    layer.lora_B[NAME].weight.copy_(state[f"{cycle}|{name}|B"])
            self.fold(model)

    def tensors(self) -> dict[str, Tensor]:
        """All pairs by flat names, for a checkpoint."""
        return {
            f"{cycle}|{name}|{part}": tensor
            for name, pairs in self.pairs.items()
            for cycle, pair in enumerate(pairs)
            for part, tensor in zip("AB", pair, strict=True)
        }


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """PEFT's linear layers, by their names in the model that PEFT wrapped."""
    return {
        name.removeprefix(WRAPPER): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLinear)
    }


def joined(model: PeftModel, folded: Folded) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Config and state of one LoRA that is the sum of all cycles, with a scaling of 1."""
    state, ranks = {}, {}
    for name, layer in lora_layers(model).items():
        pairs = list(folded.pairs.get(name, []))
        now = tuple(part[NAME].weight.detach().cpu() for part in (layer.lora_A, layer.lora_B))
        if not pairs or bool(now[1].any()):  # an adapter just made has nothing to say
            pairs.append((now[0], now[1]))
        A = torch.cat([a.float() for a, _ in pairs])
        B = torch.cat([b.float() for _, b in pairs], dim=1) * layer.scaling[NAME]
        state[f"{WRAPPER}{name}.lora_A.{NAME}.weight"] = A.contiguous()
        state[f"{WRAPPER}{name}.lora_B.{NAME}.weight"] = B.contiguous()
        ranks[name] = len(A)
    config = copy.deepcopy(model.peft_config[NAME])
    config.r = config.lora_alpha = max(ranks.values())
    config.use_rslora = False
    config.rank_pattern = {name: rank for name, rank in ranks.items() if rank != config.r}
    config.alpha_pattern = dict(config.rank_pattern)
    config.init_lora_weights = True
    return config, state

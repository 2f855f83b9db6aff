"""Cycles: what was folded is what the adapter said, and the result is one stock PEFT LoRA."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import nn

from afaspec.adapter import adapt, annealed_layers, save_adapter
from afaspec.folding import Folded, joined, lora_layers


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(24, 40)
        self.second = nn.Linear(40, 16, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def network() -> Net:
    torch.manual_seed(0)
    return Net()


def adapted(sigma: str | None = None, **settings: object) -> PeftModel:
    config = {"r": 3, "lora_alpha": 5, "target_modules": ["first", "second"]} | settings
    model = adapt(network(), LoraConfig(**config), sigma)
    for layer in annealed_layers(model):
        layer.beta = 0.0
    return model


def learn(model: nn.Module, seed: int) -> None:
    """Stands in for training: any weights will do."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.3)


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().abs().max() / b.detach().abs().max())


SETTINGS = [{}, {"use_rslora": True}, {"rank_pattern": {"first": 5}, "alpha_pattern": {"first": 9}}]
X = torch.randn(7, 24, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("sigma", [None, "relu"])
def test_folding_changes_where_an_update_lies_and_not_what_it_says(
    settings: dict[str, object], sigma: str | None
) -> None:
    model, folded = adapted(sigma, **settings), Folded()
    learn(model, 1)
    before = model(X).detach()
    frozen = lora_layers(model)["first"].get_base_layer().weight.clone()
    folded.fold(model)
    assert apart(model(X), before) <= 1e-5
    assert not any(layer.lora_B["default"].weight.any() for layer in lora_layers(model).values())
    assert not torch.equal(lora_layers(model)["first"].get_base_layer().weight, frozen)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_sum_of_cycles_is_one_stock_lora(settings: dict[str, object], tmp_path: Path) -> None:
    model, folded = adapted("relu", **settings), Folded()
    for cycle in range(2):
        learn(model, cycle)
        folded.fold(model)
    learn(model, 9)
    save_adapter(model, tmp_path, None, 9, 9, joined(model, folded))
    stock = PeftModel.from_pretrained(network(), str(tmp_path))
    assert apart(stock(X), model(X)) <= 1e-5
    assert {layer.r["default"] for layer in lora_layers(stock).values()} <= {9, 15}
    assert model.peft_config["default"].r == 3  # the one that trains stays as it was


def test_a_fresh_adapter_adds_no_rank() -> None:
    model, folded = adapted(), Folded()
    learn(model, 1)
    folded.fold(model)
    config, state = joined(model, folded)
    assert config.r == 3
    assert state["base_model.model.first.lora_A.default.weight"].shape == (3, 24)


def test_folding_again_gives_the_same_weights_bit_for_bit() -> None:
    model, folded = adapted(), Folded()
    for cycle in range(3):
        learn(model, cycle)
        folded.fold(model)
    again, refolded = adapted(), Folded()
    refolded.refold(again, folded.tensors())
    assert refolded.cycles == 3
    for name, layer in lora_layers(again).items():
        assert torch.equal(
            layer.get_base_layer().weight, lora_layers(model)[name].get_base_layer().weight
        )

"""AFA on PEFT's layer: plain LoRA is PEFT's, and a finished adapter is a stock PEFT LoRA."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import get_args

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from afaspec.adapters.afa import adapt, read_record, save_adapter
from afaspec.adapters.annealing import ACTIVATIONS, annealed_layers
from afaspec.adapters.schedule import Activation, AnnealingSchedule
from drafts.errors import UserError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(24, 40, bias=True)
        self.second = nn.Linear(40, 16, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


CONFIGS = {
    "default": {},
    "rslora": {"use_rslora": True},
    "rank_pattern": {"rank_pattern": {"first": 2}, "alpha_pattern": {"second": 3}},
    "pissa": {"init_lora_weights": "pissa"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "olora": {"init_lora_weights": "olora"},
}


def lora_config(**settings: object) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=6, target_modules=["first", "second"], **settings)


def network() -> Net:
    torch.manual_seed(0)
    return Net()


def randomise(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.3)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("name", CONFIGS)
def test_plain_lora_is_pefts(name: str) -> None:
    ours = adapt(network(), lora_config(**CONFIGS[name]), None)
    torch.manual_seed(0)
    theirs = get_peft_model(network(), lora_config(**CONFIGS[name]))
    theirs.load_state_dict(ours.state_dict())
    randomise(ours)
    randomise(theirs)
    x = torch.randn(5, 24)
    assert relative(ours(x), theirs(x)) <= 1e-6


@pytest.mark.parametrize("name", CONFIGS)
def test_annealed_to_zero_is_plain_lora(name: str) -> None:
    annealed = adapt(network(), lora_config(**CONFIGS[name]), "silu")
    plain = adapt(network(), lora_config(**CONFIGS[name]), None)
    plain.load_state_dict(annealed.state_dict())
    randomise(annealed)
    randomise(plain)
    x = torch.randn(5, 24)
    assert relative(annealed(x), plain(x)) > 1e-3  # beta is 1
    for layer in annealed_layers(annealed):
        layer.beta = 0.0
    assert torch.equal(annealed(x), plain(x))


def test_the_formula() -> None:
    model = adapt(network(), lora_config(), "relu")
    randomise(model)
    for layer in annealed_layers(model):
        layer.beta = 0.3
    module = model.base_model.model.first
    x = torch.randn(5, 24)
    a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
    z = x @ a.T
    phi = 0.3 * torch.relu(z) + 0.7 * z
    expected = module.base_layer(x) + (6 / 4) * (phi @ b.T)
    assert relative(module(x), expected) <= 1e-6


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("sigma", [None, "relu", "gelu"])
def test_round_trip_through_stock_peft(name: str, sigma: str | None, tmp_path: Path) -> None:
    model = adapt(network(), lora_config(**CONFIGS[name]), sigma)
    randomise(model)
    for layer in annealed_layers(model):
        layer.beta = 0.0
    save_adapter(model, tmp_path, AnnealingSchedule(), 10, 10)
    stock = PeftModel.from_pretrained(network(), str(tmp_path))
    x = torch.randn(5, 24)
    assert relative(stock(x), model(x)) <= 1e-5
    assert relative(stock.merge_and_unload()(x), model(x)) <= 1e-5
    assert read_record(tmp_path).beta == 0.0


def test_merging_in_place_is_refused_until_beta_is_zero() -> None:
    model = adapt(network(), lora_config(), "relu")
    with pytest.raises(UserError, match="non-linear"):
        copy.deepcopy(model).merge_and_unload()
    randomise(model)
    for layer in annealed_layers(model):
        layer.beta = 0.0
    x = torch.randn(5, 24)
    expected = model(x)
    assert relative(model.merge_and_unload()(x), expected) <= 1e-5


def test_every_sigma_that_can_be_asked_for_is_there() -> None:
    assert get_args(Activation) == tuple(ACTIVATIONS)


def test_only_the_adapter_trains() -> None:
    model = adapt(network(), lora_config(), "relu")
    assert all(("lora_" in n) == p.requires_grad for n, p in model.named_parameters())


def test_record_says_what_was_saved(tmp_path: Path) -> None:
    model = adapt(network(), lora_config(), "gelu")
    save_adapter(model, tmp_path, AnnealingSchedule(end=0.4), 3, 10)
    record = read_record(tmp_path)
    assert (record.activation, record.beta, record.step) == ("gelu", 1.0, 3)
    assert record.schedule is not None
    assert record.schedule["end"] == 0.4


def test_a_stock_adapter_counts_as_plain(tmp_path: Path) -> None:
    get_peft_model(network(), lora_config()).save_pretrained(tmp_path)
    assert read_record(tmp_path).beta == 0.0


def test_a_damaged_record_is_refused(tmp_path: Path) -> None:
    (tmp_path / "annealing.json").write_text(json.dumps({"beta": "none"}))
    with pytest.raises(UserError, match="annealing record"):
        read_record(tmp_path)


def test_unknown_activation_is_refused() -> None:
    with pytest.raises(UserError, match="relu"):
        adapt(network(), lora_config(), "softplus")


def test_another_lora_variant_is_refused() -> None:
    with pytest.raises(UserError, match="DoraLinearVariant"):
        adapt(network(), lora_config(use_dora=True), "relu")


def test_gpt2s_transposed_layers_are_annealed_too(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    def gpt2() -> nn.Module:
        torch.manual_seed(0)
        sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 32, "n_positions": 16}
        return GPT2LMHeadModel(GPT2Config(**sizes)).eval()

    config = LoraConfig(r=4, target_modules=["c_attn", "c_fc", "c_proj"])
    model = adapt(gpt2(), config, "relu").eval()
    randomise(model)
    ids = torch.arange(12)[None]
    assert len(annealed_layers(model)) == 4
    curved = model(input_ids=ids).logits
    for layer in annealed_layers(model):
        layer.beta = 0.0
    expected = model(input_ids=ids).logits
    assert relative(curved, expected) > 1e-3
    save_adapter(model, tmp_path, AnnealingSchedule(), 10, 10)
    stock = PeftModel.from_pretrained(gpt2(), str(tmp_path)).eval()
    assert relative(stock(input_ids=ids).logits, expected) <= 1e-5
    assert relative(model.merge_and_unload()(input_ids=ids).logits, expected) <= 1e-5

"""The tensors that a config makes: the same that the module has, whatever the switches."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from drafts.checkpoint.fields import complete
from drafts.checkpoint.layer_config import layer_fields
from drafts.families.dflash import layouts as dflash
from drafts.families.dflash.module import DFlashConfig, DFlashDraft
from drafts.families.eagle import layouts as eagle
from drafts.families.eagle.module import EagleDraft
from drafts.families.eagle3 import layouts as eagle3
from drafts.families.eagle3.module import Eagle3Config, Eagle3Draft
from drafts.families.medusa import layouts as medusa
from drafts.families.medusa.module import MedusaDraft

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLMEagle3"],
    "model_type": "llama",
    "num_hidden_layers": 1,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "vocab_size": 20,
    "target_hidden_size": 16,
    "draft_vocab_size": 20,
}
LAYER = [
    {},
    {"head_dim": 8},
    {"num_key_value_heads": 2},
    {"attention_bias": True},
    {"num_hidden_layers": 3, "head_dim": 6, "num_key_value_heads": 1},
]
EAGLE3 = [
    {},
    {"architectures": ["Eagle3Qwen3ForCausalLM"]},
    {"norm_before_fc": True, "target_hidden_size": 12},
    {"fc_norm": True, "num_aux_hidden_states": 2},
    {"norm_before_residual": True, "norm_output": True},
    {"draft_vocab_size": 10},
]
MEDUSA = [
    {},
    {"medusa_fc_bias": True, "num_hidden_layers": 2},
    {"original_lm_head": True, "num_heads": 2},
]


def eagle3_module(flat: dict[str, Any]) -> nn.Module:
    sizes = {key: flat[key] for key in ("vocab_size", "draft_vocab_size", "target_hidden_size")}
    return Eagle3Draft(
        Eagle3Config(
            **layer_fields(flat, eagle3.layers_of(flat)),
            **sizes,
            **eagle3.switches(flat),
            qk_norm=eagle3.is_qwen3(flat),
            layer_ids=tuple(range(eagle3.num_hidden_states(flat))),
        )
    )


def dflash_module(flat: dict[str, Any]) -> nn.Module:
    sizes = {key: flat[key] for key in ("vocab_size", "draft_vocab_size", "target_hidden_size")}
    return DFlashDraft(
        DFlashConfig(**layer_fields(flat, "dflash"), **sizes, layer_ids=(1, 2), mask_token_id=3)
    )


CASES: list[tuple[Callable[[Any], Any], Callable[[Any], nn.Module], dict[str, Any]]] = [
    *((eagle3.shapes, eagle3_module, BASE | a | b) for a, b in product(LAYER, EAGLE3)),
    *((eagle.shapes, lambda f: EagleDraft(eagle.config_of(f, None)), BASE | a) for a in LAYER),
    *(
        (lambda f: dflash.dflash_shapes(f, 2), dflash_module, BASE | a | b)
        for a, b in product(LAYER, [{}, {"draft_vocab_size": 10}])
    ),
    *(
        (
            medusa.shapes,
            lambda f: MedusaDraft(medusa.config_of(f)),
            BASE
            | {"num_heads": 3, "num_hidden_layers": 1, "medusa_fc_bias": False}
            | {"original_lm_head": False}
            | a,
        )
        for a in MEDUSA
    ),
]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_they_are_those_of_the_module(case: int) -> None:
    shapes, module, config = CASES[case]
    flat = complete(config, Path("config.json"))
    state = module(flat).state_dict()
    assert shapes(flat) == {n: tuple(t.shape) for n, t in state.items() if n != "d2t"}

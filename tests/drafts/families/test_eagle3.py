"""The draft module: all rows at once equal the server's token-by-token computation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from drafts.families.eagle3.module import Eagle3Config, Eagle3Draft
from tests.packed import alone

PLAIN = Eagle3Config(
    hidden_size=32,
    target_hidden_size=32,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=60,
    draft_vocab_size=40,
    max_positions=128,
    layer_ids=(1, 2, 3),
)
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "norm_before_residual": {"norm_before_residual": True},
    "norm_before_fc": {"norm_before_fc": True},
    "fc_norm": {"fc_norm": True},
    "norm_output": {"norm_output": True},
    "biases": {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
    "windows": {"num_layers": 3, "windows": (3, None, 4)},
    "narrow_window": {"windows": (2,)},
    "the_targets_window": {"num_layers": 2, "windows": (None, 3), "target_window": 5},
    "half_rotary": {
        "rope": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}
    },
    "no_gqa": {"num_key_value_heads": 4},
    "wide_heads": {"head_dim": 16},
    "other_target_width": {"target_hidden_size": 20},
    "two_layers": {"layer_ids": (1, 4)},
    "logit_scale": {"logit_scale": 0.5},
    "linear_rope": {"rope": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
    "llama3_rope": {
        "rope": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "yarn_rope": {
        "rope": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
}


def make_draft(config: Eagle3Config) -> Eagle3Draft:
    torch.manual_seed(0)
    draft = Eagle3Draft(config).eval()
    kept = torch.randperm(config.vocab_size)[: config.draft_vocab_size].sort().values
    draft.set_vocabulary_map(kept - torch.arange(len(kept)))
    for parameter in draft.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return draft


@pytest.mark.parametrize("name", VARIANTS)
def test_rows_at_once_equal_token_by_token(name: str) -> None:
    """Where the path is what the draft itself proposes, both ways must propose the same."""
    config = replace(PLAIN, **VARIANTS[name])
    draft, k = make_draft(config), 4
    fused = len(config.layer_ids) * config.target_hidden_size
    features = torch.randn(14, fused)
    prefix = torch.randint(config.vocab_size, (9,))
    drafted = draft.propose(features[:8], prefix, k)

    path = torch.cat([prefix, torch.tensor(drafted)])  # as if the target had said the same
    with torch.no_grad():
        outputs = draft(features[: len(path)], path, k, alone(len(path)))
    row = 7
    at_once = [draft.best(output[row : row + 1], j) for j, output in enumerate(outputs)]
    assert at_once == drafted


def test_rows_see_nothing_of_the_future() -> None:
    draft = make_draft(PLAIN)
    features, ids = torch.randn(12, 96), torch.randint(60, (12,))
    changed_features, changed_ids = features.clone(), ids.clone()
    changed_features[6:] += 1.0
    changed_ids[8:] = (changed_ids[8:] + 1) % 60
    before = draft(features, ids, 2, alone(12))
    after = draft(changed_features, changed_ids, 2, alone(12))
    assert torch.equal(before[0][:6], after[0][:6])
    assert torch.equal(before[1][:6], after[1][:6])
    assert not torch.equal(before[1][6], after[1][6])


def test_vocabulary_map_is_a_bijection_on_the_kept_tokens() -> None:
    draft = make_draft(PLAIN)
    assert torch.equal(draft.t2d[draft.target_ids()], torch.arange(40))
    assert int((draft.t2d >= 0).sum()) == 40

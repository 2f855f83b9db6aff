"""The speculators layout of EAGLE-like drafts.

The decoder layer's fields lie in `transformer_layer_config`, which vLLM takes as the draft's
config; the draft's own fields, which override it, lie outside.
"""

from __future__ import annotations

from typing import Any

INNER = "transformer_layer_config"
DTYPES = ("dtype", "torch_dtype")


def to_speculators(
    raw: dict[str, Any],
    kind: str,
    architecture: str,
    own: dict[str, Any],
    k: int,
    layers: dict[str, Any],
) -> dict[str, Any]:
    """A config.json for `kind` from a flat one; `own` are the fields that go outside.

    `k` is the number of speculative tokens that it names for servers that ask for none. `layers`
    are fields of the decoder layer that `raw` says otherwise, or not at all, its whole rope too.
    """
    left_out = {*own, "architectures", "rope_scaling"}
    inner = {k: v for k, v in raw.items() if k not in left_out}
    greedy = {"proposal_type": "greedy", "speculative_tokens": k}
    return {
        "architectures": [architecture],
        "speculators_model_type": kind,
        "speculators_config": {
            "algorithm": kind,
            "default_proposal_method": "greedy",
            "proposal_methods": [greedy],
            "verifier": {"architectures": [], "name_or_path": None},
        },
        **own,
        **{key: raw[key] for key in DTYPES if key in raw},
        INNER: inner | layers,
    }


def from_speculators(
    raw: dict[str, Any], architecture: str, own: dict[str, Any], layers: dict[str, Any]
) -> dict[str, Any]:
    """A flat config.json; `own` are the draft's fields. What else lies outside is left out.

    `layers` are as `to_speculators` takes them.
    """
    dtype = {key: raw[key] for key in DTYPES if key in raw}
    inner = {key: value for key, value in raw[INNER].items() if key != "rope_scaling"}
    return {"architectures": [architecture], **inner, **layers, **dtype, **own}

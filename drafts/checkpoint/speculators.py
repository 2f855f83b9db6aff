"""The speculators layout of EAGLE-like drafts.

The decoder layer's fields lie in `transformer_layer_config`, which vLLM takes as the draft's
config; the draft's own fields, which override it, lie outside. speculators itself (0.9) fills what
a config or a checkpoint leaves out with defaults of its own, or not at all: all of it is written.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from drafts.checkpoint.info import DraftInfo
from drafts.checkpoint.shared import from_target, shared_tensor
from drafts.errors import UserError
from drafts.files import read_json
from drafts.hub import source
from drafts.target.info import SHARED, TargetInfo
from drafts.tensors import dtype_name, open_tensors

if TYPE_CHECKING:
    from torch import Tensor


SPECULATORS = "speculators"
T2D = "t2d"
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


def hindrances(info: DraftInfo, further: dict[str, bool]) -> tuple[str, ...]:
    """What of a draft speculators would compute otherwise, or not load: words for each.

    `further` are a family's own, and whether they are there.
    """
    possible = {
        "reads a target of another width than its own": info.target_hidden_size != info.hidden_size,
        "scales its logits": (info.config.get("logit_scale") or 1.0) != 1.0,
        **further,
    }
    return tuple(words for words, there in possible.items() if there)


def lacking(info: DraftInfo, names: set[str]) -> list[str]:
    """What speculators reads of a checkpoint that has the tensors `names` (module names)."""
    reduced = info.draft_vocab_size != info.vocab_size
    return [name for name in (*SHARED, *([T2D] if reduced else [])) if name not in names]


def tensor_to_add(name: str, info: DraftInfo, target: TargetInfo | None) -> Tensor:
    """A tensor that the draft shares with its target, or the mask of the tokens that it can say.

    `t2d` [vocab] is true where the draft has the target's token. Raises `UserError` where a target
    is needed, and where the draft's ids are not in the order of the target's.
    """
    import torch

    if name != T2D:
        shape = (info.vocab_size, info.hidden_size)
        if target is None:
            raise UserError(
                f"has no {name}: it shares the target's, which the layout speculators holds",
                where=info.folder,
                hint="give --target TARGET as well",
            )
        tensor = shared_tensor(name, shape, info, target)
        if not tensor.is_floating_point() or tensor.itemsize < 2:
            raise UserError(
                f"stores {name} as {dtype_name(tensor.dtype)}, which a draft cannot hold",
                where=target.folder,
                hint="give the target as it was before quantization",
            )
        return tensor
    ids = target_ids(info)
    if not bool((ids[1:] > ids[:-1]).all()):
        raise UserError(
            "cannot be written as speculators: its d2t is not in the order of the target's ids, in "
            "which speculators counts",
            where=info.folder,
            hint="keep it in its layout, which vLLM serves",
        )
    return torch.zeros(info.vocab_size, dtype=torch.bool).index_fill_(0, ids, True)


def target_ids(info: DraftInfo) -> Tensor:
    """The target id of each draft id, [draft_vocab]."""
    import torch

    stored = open_tensors(info.folder)
    name = next(name for name in stored.headers if name.removeprefix("model.") == "d2t")
    return torch.arange(info.draft_vocab_size) + stored.load(name).long()


def verifier(info: DraftInfo, target: TargetInfo, replaced: Iterable[str]) -> dict[str, Any]:
    """What a config.json says of the target.

    speculators loads the tensors in `replaced` from the target that is named here, whatever the
    draft has: a draft with others of its own names none.
    """
    stored = open_tensors(info.folder)
    own = {name.removeprefix("model."): name for name in stored.headers}
    same = all(
        equal(stored.load(own[name]), from_target(name, target)) for name in replaced if name in own
    )
    on_hub = source(target.folder)
    name = on_hub.partition("@")[0] if on_hub else str(target.folder)
    return {
        "architectures": read_json(target.folder / "config.json").get("architectures", []),
        "name_or_path": name if same else None,
    }


def equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool((one.float() == other.float()).all())

"""Reading and writing draft checkpoints: EAGLE/SpecForge layout and speculators layout.

Both are a config.json and safetensors files. The layouts differ in where the config keeps its
fields and in the name of the decoder layer (`midlayer.` or `layers.0.`). What is written has the
layout that was read: the base draft's config byte for byte, its tensor names, dtypes and order.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from drafts.errors import UserError
from drafts.files import hash_model, read_json
from drafts.target import load_embedding, read_target, rope_of
from drafts.tensors import open_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from drafts.eagle3 import Eagle3Config, Eagle3Draft

Format = Literal["eagle3", "speculators"]
EAGLE3_ARCHITECTURES = {"LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM"}
REQUIRED = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")


@dataclass(frozen=True)
class DraftInfo:
    """A draft's shape and identity. `layer_ids` is None where the config does not name them."""

    folder: Path
    format: Format
    method: str
    hidden_size: int
    target_hidden_size: int
    vocab_size: int
    draft_vocab_size: int
    layer_ids: tuple[int, ...] | None
    max_positions: int
    rope: dict[str, Any]
    dtype: str
    has_embedding: bool
    sha256: str


def read_draft_info(folder: Path) -> DraftInfo:
    """Describe the draft in `folder` from its config and tensor headers. Raises `UserError`."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            "no such folder", where=folder, mend="give the folder of a draft checkpoint"
        )
    raw = read_json(folder / "config.json")
    layout, flat = _flatten(raw, folder / "config.json")
    tensors = open_tensors(folder)
    names = {module_name(name): header for name, header in tensors.headers.items()}
    _check_shapes(names, flat, folder)
    return DraftInfo(
        folder=folder,
        format=layout,
        method="eagle3",
        hidden_size=flat["hidden_size"],
        target_hidden_size=flat["target_hidden_size"],
        vocab_size=flat["vocab_size"],
        draft_vocab_size=flat["draft_vocab_size"],
        layer_ids=_layer_ids(flat, folder / "config.json"),
        max_positions=flat.get("max_position_embeddings", 2048),
        rope=rope_of(flat),
        dtype=names["fc.weight"].dtype,
        has_embedding="embed_tokens.weight" in names,
        sha256=hash_model(folder),
    )


def default_layer_ids(num_layers: int) -> tuple[int, ...]:
    """The layers vLLM takes where a draft names none: (2, L//2, L-3)."""
    return (2, num_layers // 2, num_layers - 3)


def load_draft(folder: Path, target_folder: Path | None = None) -> Eagle3Draft:
    """Load the draft in float32. A draft without an embedding takes the target's."""
    import torch

    from drafts.eagle3 import Eagle3Draft

    info = read_draft_info(folder)
    config = draft_config(info, target_folder)
    tensors = {module_name(k): v for k, v in open_tensors(info.folder).load_all().items()}
    draft = Eagle3Draft(config)
    if not info.has_embedding:
        if target_folder is None:
            raise UserError(
                "has no embed_tokens.weight, so it shares the target's",
                where=info.folder,
                mend="give the target's folder as well",
            )
        tensors["embed_tokens.weight"] = _shared_embedding(info, target_folder)
    d2t = tensors.pop("d2t", None)
    wanted = draft.state_dict().keys() - {"d2t"}
    lacking = sorted(wanted - tensors.keys())
    if lacking:
        raise UserError(f"lacks {', '.join(lacking[:4])}", where=info.folder, mend=_FETCH)
    state = {name: tensors[name].float() for name in wanted}
    draft.load_state_dict(state, strict=False)
    if info.draft_vocab_size != info.vocab_size:
        draft.set_vocabulary_map(_checked_map(d2t, info))
    else:
        draft.set_vocabulary_map(torch.zeros(info.vocab_size, dtype=torch.long))
    return draft


def draft_config(info: DraftInfo, target_folder: Path | None = None) -> Eagle3Config:
    """The module's configuration, layer ids filled in from the target where the draft has none."""
    from drafts.eagle3 import Eagle3Config

    _, flat = _flatten(read_json(info.folder / "config.json"), info.folder / "config.json")
    layer_ids = info.layer_ids
    if layer_ids is None:
        if target_folder is None:
            raise UserError(
                "names no eagle_aux_hidden_state_layer_ids",
                where=info.folder / "config.json",
                mend="add them, or give the target's folder as well",
            )
        layer_ids = default_layer_ids(read_target(target_folder).num_layers)
    heads = flat["num_attention_heads"]
    return Eagle3Config(
        hidden_size=flat["hidden_size"],
        target_hidden_size=flat["target_hidden_size"],
        intermediate_size=flat["intermediate_size"],
        num_attention_heads=heads,
        num_key_value_heads=flat.get("num_key_value_heads") or heads,
        head_dim=flat.get("head_dim") or flat["hidden_size"] // heads,
        vocab_size=flat["vocab_size"],
        draft_vocab_size=flat["draft_vocab_size"],
        max_positions=flat.get("max_position_embeddings", 2048),
        layer_ids=layer_ids,
        rope=rope_of(flat),
        rms_norm_eps=flat.get("rms_norm_eps", 1e-6),
        hidden_act=flat.get("hidden_act", "silu"),
        attention_bias=bool(flat.get("attention_bias", False)),
        norm_before_residual=bool(flat.get("norm_before_residual", False)),
        norm_before_fc=bool(flat.get("norm_before_fc", False)),
        fc_norm=bool(flat.get("fc_norm", False)),
        norm_output=bool(flat.get("norm_output", False)),
        logit_scale=float(flat.get("logit_scale", 1.0)),
    )


def write_like(base: Path, folder: Path, changed: dict[str, Tensor]) -> None:
    """Write `base`'s checkpoint to the empty `folder` with the `changed` tensors (module names).

    Changed tensors are stored in the base's dtype; every other byte of the base is kept.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    left = dict(changed)
    for path in sorted(base.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if not any(module_name(name) in left for name in tensors):
            shutil.copyfile(path, folder / path.name)
            continue
        for name, old in tensors.items():
            if module_name(name) in left:
                tensors[name] = left.pop(module_name(name)).to(old.dtype).contiguous()
        save_file(tensors, folder / path.name, metadata=metadata)
    if left:
        raise UserError(f"has no tensor for {', '.join(sorted(left))}", where=base, mend=_FETCH)
    for path in base.iterdir():
        if path.is_file() and path.suffix in (".json", ".txt", ".model", ".jinja"):
            shutil.copyfile(path, folder / path.name)


def save_draft(
    draft: Eagle3Draft, folder: Path, *, dtype: Any, with_embedding: bool = False
) -> None:
    """Write `draft` to the empty `folder` in EAGLE layout, as vLLM loads it."""
    from safetensors.torch import save_file

    from drafts.files import write_json

    c = draft.config
    write_json(
        folder / "config.json",
        {
            "architectures": ["LlamaForCausalLMEagle3"],
            "model_type": "llama",
            "hidden_size": c.hidden_size,
            "target_hidden_size": c.target_hidden_size,
            "intermediate_size": c.intermediate_size,
            "num_hidden_layers": 1,
            "num_attention_heads": c.num_attention_heads,
            "num_key_value_heads": c.num_key_value_heads,
            "head_dim": c.head_dim,
            "hidden_act": c.hidden_act,
            "rms_norm_eps": c.rms_norm_eps,
            "max_position_embeddings": c.max_positions,
            "rope_theta": c.rope.get("rope_theta", 10000.0),
            "rope_parameters": dict(c.rope),
            "attention_bias": c.attention_bias,
            "vocab_size": c.vocab_size,
            "draft_vocab_size": c.draft_vocab_size,
            "tie_word_embeddings": False,
            "eagle_aux_hidden_state_layer_ids": list(c.layer_ids),
            "norm_before_residual": c.norm_before_residual,
            "norm_before_fc": c.norm_before_fc,
            "fc_norm": c.fc_norm,
            "norm_output": c.norm_output,
            "logit_scale": c.logit_scale,
            "dtype": str(dtype).removeprefix("torch."),
        },
    )
    state = {n: t.to(dtype).contiguous() for n, t in draft.state_dict().items() if n != "d2t"}
    if not with_embedding:
        del state["embed_tokens.weight"]
    if c.draft_vocab_size != c.vocab_size:
        state["d2t"] = draft.d2t.contiguous()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def module_name(stored: str) -> str:
    """The module's parameter name for a stored tensor name."""
    return stored.removeprefix("model.").replace("layers.0.", "midlayer.", 1)


_FETCH = "download the draft again, or check that it is an EAGLE-3 draft"


def _flatten(raw: dict[str, Any], path: Path) -> tuple[Format, dict[str, Any]]:
    """The layout, and the config with all fields on one level under EAGLE's names."""
    if "speculators_model_type" in raw:
        if raw["speculators_model_type"] != "eagle3":
            raise UserError(
                f"is a {raw['speculators_model_type']} speculator; only eagle3 is supported",
                where=path,
                mend="give an EAGLE-3 draft",
            )
        flat = dict(raw.get("transformer_layer_config") or {})
        flat |= {k: v for k, v in raw.items() if k != "transformer_layer_config" and v is not None}
        flat.setdefault("norm_before_residual", True)  # vLLM's default for this layout
        layout: Format = "speculators"
    else:
        names = set(raw.get("architectures") or [])
        if not names & EAGLE3_ARCHITECTURES:
            raise UserError(
                f"architectures is {sorted(names)}, expected one of {sorted(EAGLE3_ARCHITECTURES)}",
                where=path,
                mend="give an EAGLE-3 draft; other families are not supported yet",
            )
        flat = dict(raw)
        layout = "eagle3"
    missing = [key for key in REQUIRED if key not in flat]
    if missing:
        raise UserError(f"lacks {', '.join(missing)}", where=path, mend=_FETCH)
    if flat.get("num_hidden_layers", 1) != 1:
        raise UserError(
            f"has num_hidden_layers = {flat['num_hidden_layers']}, expected 1",
            where=path,
            mend="give an EAGLE-3 draft with one decoder layer",
        )
    flat["target_hidden_size"] = flat.get("target_hidden_size") or flat["hidden_size"]
    flat["draft_vocab_size"] = flat.get("draft_vocab_size") or flat["vocab_size"]
    return layout, flat


def _layer_ids(flat: dict[str, Any], path: Path) -> tuple[int, ...] | None:
    nested = flat.get("eagle_config") or {}
    ids = flat.get("eagle_aux_hidden_state_layer_ids") or nested.get(
        "eagle_aux_hidden_state_layer_ids"
    )
    if not ids:
        return None
    if not all(isinstance(i, int) and i >= 0 for i in ids) or len(set(ids)) != len(ids):
        raise UserError(
            f"eagle_aux_hidden_state_layer_ids is {ids}, expected distinct layer numbers",
            where=path,
            mend="write the layers that the draft was trained on",
        )
    return tuple(ids)


def _check_shapes(names: dict[str, Any], flat: dict[str, Any], folder: Path) -> None:
    """The sizes that the config promises are those of the stored tensors."""
    size = flat["hidden_size"]
    expected = {
        "fc.weight": (size, None),
        "midlayer.mlp.down_proj.weight": (size, flat["intermediate_size"]),
        "norm.weight": (size,),
        "lm_head.weight": (flat["draft_vocab_size"], size),
        "embed_tokens.weight": (flat["vocab_size"], size),
    }
    for name, shape in expected.items():
        if name not in names:
            if name == "embed_tokens.weight":
                continue
            raise UserError(f"lacks the tensor {name}", where=folder, mend=_FETCH)
        found = names[name].shape
        if len(found) != len(shape) or any(
            want not in (None, have) for want, have in zip(shape, found, strict=True)
        ):
            raise UserError(
                f"{name} is {list(found)}, the config says {list(shape)}", where=folder, mend=_FETCH
            )
    if flat["draft_vocab_size"] != flat["vocab_size"] and "d2t" not in names:
        raise UserError(
            "has a reduced vocabulary but no d2t tensor that maps it", where=folder, mend=_FETCH
        )


def _checked_map(d2t: Tensor, info: DraftInfo) -> Tensor:
    import torch

    ids = torch.arange(info.draft_vocab_size) + d2t.long()
    if d2t.shape != (info.draft_vocab_size,) or ids.min() < 0 or ids.max() >= info.vocab_size:
        raise UserError("d2t points outside the vocabulary", where=info.folder, mend=_FETCH)
    if len(ids.unique()) != len(ids):
        raise UserError("d2t maps two draft ids to one token", where=info.folder, mend=_FETCH)
    return d2t.long()


def _shared_embedding(info: DraftInfo, target_folder: Path) -> Tensor:
    embedding = load_embedding(target_folder)
    if tuple(embedding.shape) != (info.vocab_size, info.hidden_size):
        raise UserError(
            f"shares the target's embedding, which is {list(embedding.shape)}, "
            f"but needs {[info.vocab_size, info.hidden_size]}",
            where=info.folder,
            mend="use the draft with the target it was trained for",
        )
    return embedding

"""The draft families, and what can be done with a draft of any: read, load, start, write.

A checkpoint is a config.json and safetensors files. What is written has the layout that was read:
the base draft's config byte for byte, its tensor names, dtypes and order.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drafts.checkpoint.family import Family, InitOptions
from drafts.checkpoint.info import DraftInfo
from drafts.checkpoint.layer_ids import default_layer_ids
from drafts.checkpoint.source import FETCH, Source, load_tensor, open_source
from drafts.checkpoint.values import check_values, check_vocabulary_map
from drafts.errors import UserError
from drafts.families.dflash.layouts import DFlash
from drafts.families.dspark.layouts import DSpark
from drafts.families.eagle.layouts import Eagle
from drafts.families.eagle3.layouts import Eagle3
from drafts.families.lm.layouts import DraftModel
from drafts.families.medusa.layouts import Medusa
from drafts.families.mtp.layouts import Mtp
from drafts.families.pard.layouts import Pard
from drafts.families.peagle.layouts import PEagle
from drafts.files import INDEX, PAPERS, TEXTS, read_index, weight_files, write_json
from drafts.target.info import TargetInfo

if TYPE_CHECKING:
    from torch import Tensor

    from drafts.nn.interface import Draft

QUANTIZED = (
    "its weights are quantized. They are trained and measured offline as the plain weights that "
    "they stand for, which `afaspec merge` writes; vLLM computes with them as they are stored"
)
LATENT = "an EAGLE-3 draft whose layer has multi-head latent attention (MLA)"
OTHERS = {  # heads that vLLM serves and afaspec does not adapt, by the name in their config
    "Eagle3DeepseekV2ForCausalLM": LATENT,
    "Eagle3DeepseekV3ForCausalLM": LATENT,
    "EagleDeepSeekMTPModel": "an EAGLE draft with MLA and experts",
    "EagleMistralLarge3ForCausalLM": "an EAGLE draft with MLA and experts",
    "EagleLlama4ForCausalLM": "an EAGLE draft of Llama 4's layers",
    "EagleCohereForCausalLM": "an EAGLE draft of Cohere's layers",
    "EagleMiniCPMForCausalLM": "an EAGLE draft of MiniCPM's layers",
    "EagleMistralForCausalLM": "an EAGLE draft of Mistral's layers",
    "DFlash2DraftModel": "a DFlash 2 draft (convolutions, and a selector of candidates)",
    "DFlashLagunaForCausalLM": "a DFlash draft of Laguna's layers",
    "DFlashMuseGlimmerAssistantModel": "a DFlash draft of Muse Glimmer's",
    "MuseGlimmerAssistantModel": "a DFlash draft of Muse Glimmer's",
    "DSparkDraftModel": "a DSpark draft of DeepSeek-V4's layers",
    "DSparkV41DraftModel": "a DSpark draft of DeepSeek-V4.1's layers",
    "Gemma4DSparkModel": "a DSpark draft of Gemma 4's layers",
    "Qwen3OmniDSparkModel": "a DSpark draft of Qwen3-Omni's",
    "K3DSparkModel": "a DSpark draft of Kimi-K3's layers",
}
FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        PEagle(),  # before EAGLE-3, whose architecture name its checkpoints may carry
        Eagle3(),
        Eagle(),
        Medusa(),
        DFlash(),
        DSpark(),
        Mtp(),  # before draft models: it has the config of a whole target
        Pard(),  # before draft models, whose architectures its checkpoints have
        DraftModel(),  # last: what is no draft head may still be a model of its own
    )
}


def read_draft(folder: Path) -> DraftInfo:
    """Describe the draft in `folder`; free of torch, but for draft models.

    The one check that every command shares: each stored tensor has its place in the module that the
    config makes, every value is finite, and the vocabulary map is one. Raises `UserError`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            "no such folder", where=folder, hint="give the folder of a draft checkpoint"
        )
    source = open_source(folder)
    named = source.raw.get("architectures") or []
    family = next((family for family in FAMILIES.values() if family.matches(source)), None)
    if family is None or (isinstance(family, DraftModel) and any(map(is_head, named))):
        raise unknown(source, named)
    info = family.describe(source)
    check_values(source)
    check_vocabulary_map(source, info.vocab_size)
    return replace(info, warnings=(*info.warnings, QUANTIZED)) if source.scales else info


def is_head(architecture: str) -> bool:
    """Is this the name of a draft head, of whatever target?"""
    return any(kind in architecture for kind in ("Eagle", "DFlash", "DSpark", "Medusa", "MTP"))


def unknown(source: Source, named: list[str]) -> UserError:
    """What is wrong with a checkpoint that no family has; without `architectures`, what it may be.

    vLLM goes by them, whatever the tensors are called.
    """
    kinds = ", ".join(f.title for f in FAMILIES.values())
    if speculators := source.raw.get("speculators_model_type"):
        named = [f"{speculators} of speculators"]
    if named:
        what = next((OTHERS[one] for one in named if one in OTHERS), "a head")
        foreign = any(one in OTHERS or is_head(one) for one in named)
        return UserError(
            f"is no draft that afaspec knows: its config says {', '.join(named)}"
            + f", {what} that vLLM has another module for" * foreign,
            where=source.config_path,
            hint=f"give a draft of one of {kinds}",
        )
    hint = f"write the architecture of a draft of one of {kinds} into it"
    names = source.headers
    if "fc.weight" in names and any(".hidden_norm" in name for name in names):
        normed = any("q_norm" in name for name in names)
        architecture = "Eagle3Qwen3ForCausalLM" if normed else "LlamaForCausalLMEagle3"
        hint = f'write "architectures": ["{architecture}"] into it: its tensors are EAGLE-3\'s'
    return UserError(
        "names no architectures, by which vLLM tells what it is",
        where=source.config_path,
        hint=hint,
    )


def wanted_layer_ids(draft: DraftInfo, target: TargetInfo) -> tuple[int, ...]:
    """The target's layers that the draft reads, vLLM's default where its config names none."""
    return default_layer_ids(target.num_layers) if draft.layer_ids is None else draft.layer_ids


def load_draft(draft: DraftInfo, target: TargetInfo | None = None) -> Draft:
    """Load the draft in float32. What it does not store itself, it takes from the target."""
    return FAMILIES[draft.family].load(draft, target)


def init_draft(family: str, target: TargetInfo, options: InitOptions | None = None) -> Draft:
    """A seeded random draft of `family` for `target`; its output layer starts as the target's."""
    import torch

    if family not in FAMILIES:
        raise UserError(
            f"family {family!r} is unknown", hint=f"choose one of {', '.join(sorted(FAMILIES))}"
        )
    options = options or InitOptions()
    with torch.random.fork_rng():
        torch.manual_seed(options.seed)
        return FAMILIES[family].init(target, options)


def module_names(draft: DraftInfo) -> dict[str, str]:
    """The module's parameter name of each stored tensor, by its stored name."""
    rename = FAMILIES[draft.family].module_name
    return {name: rename(name) for name in open_source(draft.folder).headers}


def write_like(base: DraftInfo, folder: Path, changed: dict[str, Tensor]) -> None:
    """Write `base`'s checkpoint to the empty `folder` with the `changed` tensors (module names).

    Changed tensors are stored in the base's types, quantized ones as plain floats; those that
    `base.to_store` names are added. Every other byte of a tensor is kept, and so are licence,
    notices and model card. Raises `UserError` where a changed tensor is not finite in its type.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    source, left = open_source(base.folder), dict(changed)
    names, files = module_names(base), weight_files(base.folder)
    added = {name: left.pop(name) for name in base.to_store if name in left}
    written = dict.fromkeys(added, files[-1].name)
    for path in files:
        stored = [name for name, header in source.stored.items() if header.file == path]
        kept = [name for name in stored if name in source.headers]
        written |= dict.fromkeys(kept, path.name)
        new = {name for name in kept if names[name] in left or name in source.scales}
        more = added if path == files[-1] else {}
        if kept == stored and not new and not more:
            shutil.copyfile(path, folder / path.name)
            continue
        tensors = {name: load_tensor(source, name) for name in kept}
        for name in new:
            value = left.pop(names[name], tensors[name])
            tensors[name] = in_type(value, source.headers[name].dtype, name)
        tensors |= {name: in_type(value, base.dtype, name) for name, value in more.items()}
        with safe_open(path, framework="pt") as file:
            save_file(tensors, folder / path.name, metadata=file.metadata())
    if left:
        raise UserError(
            f"has no tensor for {', '.join(sorted(left))}", where=base.folder, hint=FETCH
        )
    for path in base.folder.iterdir():
        if path.is_file() and (path.suffix in TEXTS or PAPERS.match(path.name)):
            shutil.copyfile(path, folder / path.name)
    config = FAMILIES[base.family].written_config(base, source.raw)
    if config != source.raw:
        write_json(folder / "config.json", config)
    if (folder / INDEX).exists() and read_index(folder / INDEX) != written:
        write_json(folder / INDEX, {"metadata": {}, "weight_map": written})


def in_type(value: Tensor, dtype: str, name: str) -> Tensor:
    """The tensor as it is stored. Raises `UserError` where it is not finite then."""
    import torch

    result = value.to(getattr(torch, dtype)).contiguous()
    if wrong := int((~result.isfinite()).sum()):
        raise UserError(
            f"{name} would hold {wrong:,} values that are NaN or infinite in {dtype}",
            hint="give an adapter or weights that are finite: train again with a lower learning "
            "rate, from a checkpoint before the loss became non-finite",
        )
    return result


def save_draft(draft: Draft, family: str, folder: Path, *, dtype: Any) -> None:
    """Write `draft` to the empty `folder` in its family's first layout, as vLLM loads it."""
    from safetensors.torch import save_file

    config, tensors = FAMILIES[family].dump(draft, dtype)
    write_json(folder / "config.json", config)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

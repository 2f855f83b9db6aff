"""A target that is served with a LoRA adapter: merged once into a folder of the cache.

What comes out is an ordinary target, with a hash of its own, for capture, training and serving.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from afaspec.capture.target_model import load_model
from afaspec.pairs.names import resolve_model
from drafts.errors import UserError, first_line
from drafts.files import atomic_folder, cache_folder, read_json, write_json
from drafts.hashes import hash_file, hash_model
from drafts.target.info import TargetInfo, read_target
from drafts.tensors import Header, open_tensors, read_header
from drafts.tokenizer_files import copy_tokenizer

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
UNMERGEABLE = {  # of LoRA's settings: each makes a model that no plain weights can express
    "alora_invocation_tokens": "acts on a part of the tokens only (aLoRA)",
    "layer_replication": "repeats layers of the target",
}
VOCABULARY = ("embed_tokens", "lm_head")  # layers with a row for each token
# Tensors of these that have one as well: saved whole, or a LoRA's half on the side of the tokens.
OF_TOKENS = re.compile(
    rf"\b({'|'.join(VOCABULARY)})(?:\.base_layer)?"
    r"(?:\.weight|\.lora_B\.weight|\.lora_embedding_A)$"
)
TRAINED_FOR = "give the base model that the adapter was trained on"


def open_target(
    name_or_path: str | Path,
    adapter: str | Path | None = None,
    note: Callable[[str], object] = lambda text: None,
) -> TargetInfo:
    """The target of that name or folder, or target and adapter merged (done once, then found).

    `note` is told where the merged one lies. Raises `UserError` before any model loads for an
    adapter that is damaged, cannot be merged, or belongs to another model.
    """
    target = read_target(resolve_model(name_or_path))
    if adapter is None:
        return target
    adapter = Path(adapter).expanduser()
    check_adapter(adapter, target)
    folder = cache_folder() / "targets" / address(target, adapter)
    if not folder.exists():
        merge_target(target, adapter, folder)
    note(f"The target merged with its adapter lies in {folder}")
    return read_target(folder)


def open_target_if_given(
    name_or_path: str | Path | None,
    adapter: str | Path | None,
    note: Callable[[str], object] = lambda text: None,
) -> TargetInfo | None:
    """As `open_target`, where the target need not be given; an adapter alone is refused."""
    if name_or_path is not None:
        return open_target(name_or_path, adapter, note)
    if adapter is not None:
        raise UserError(
            "adapts a target that is not given",
            where=adapter,
            hint="give --target as well, or neither: a store and a run name their target",
        )
    return None


def address(target: TargetInfo, adapter: Path) -> str:
    """A name that says what the merged folder is made of: model, adapter and tokenizer."""
    digest = hashlib.sha256(target.sha256.encode())
    texts = [p for p in target.folder.glob("*") if p.is_file() and p.suffix != ".safetensors"]
    for path in [adapter / CONFIG, adapter / WEIGHTS, *sorted(texts)]:
        digest.update(f"{path.name}\0{hash_file(path)}\0".encode())
    return digest.hexdigest()[:16]


def check_adapter(adapter: Path, target: TargetInfo) -> None:
    """Raise `UserError` unless `adapter` is a whole LoRA adapter that merges into `target`."""
    from afaspec.adapters.afa import read_record
    from afaspec.adapters.annealing import refuse_non_linear

    if not (adapter / CONFIG).is_file():
        raise UserError(
            f"is no PEFT adapter: it has no {CONFIG}",
            where=adapter,
            hint="give the folder that PEFT's save_pretrained wrote",
        )
    config = read_json(adapter / CONFIG)
    if (kind := config.get("peft_type")) != "LORA":
        raise UserError(
            f"is an adapter of type {kind}; only LoRA is merged here",
            where=adapter / CONFIG,
            hint="merge it into the target yourself, and give that as the target",
        )
    for key, reason in UNMERGEABLE.items():
        if config.get(key):
            raise UserError(
                f"cannot be merged: {key} is set, so that it {reason}",
                where=adapter / CONFIG,
                hint="use a plain LoRA adapter, or give a fine-tuned target without adapter",
            )
    if "quantization_config" in read_json(target.folder / "config.json"):
        raise UserError(
            "is quantized, so that an adapter cannot be merged into it",
            where=target.folder,
            hint="give the target as it was before quantization",
        )
    refuse_non_linear(read_record(adapter).beta, where=adapter)
    check_named_base(config, adapter, target)
    check_sizes(adapter, target)


def check_named_base(config: dict[str, Any], adapter: Path, target: TargetInfo) -> None:
    """A base that the adapter names, and that lies here, must be this target."""
    named = Path(config.get("base_model_name_or_path") or "")
    if not (named / "config.json").is_file() or named.resolve() == target.folder.resolve():
        return
    found = hash_model(named)
    if found != target.sha256:
        raise UserError(
            f"adapts another model: {named} (hash {found[:12]}, "
            f"{target.folder} has {target.sha256[:12]})",
            where=adapter / CONFIG,
            hint=TRAINED_FOR,
        )


def check_sizes(adapter: Path, target: TargetInfo) -> None:
    """Every adapted module is one of the target's, of the same size."""
    if not (adapter / WEIGHTS).is_file():
        raise UserError(
            f"has no {WEIGHTS}",
            where=adapter,
            hint="save the adapter with safetensors; afaspec does not load pickles",
        )
    own = open_tensors(target.folder).headers
    check_vocabulary(adapter, target)
    for name, header in read_header(adapter / WEIGHTS).items():
        plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        module = plain.partition(".lora_")[0]
        if ".experts" in module:  # transformers joins their tensors on loading: PEFT checks them
            continue
        ends = module.removesuffix(".weight").rpartition(".")[2]
        if ends in VOCABULARY and "lm_head.weight" not in own:
            raise UserError(
                f"cannot be merged: it changes {ends}, which the target uses as embedding and as "
                "output layer",
                where=adapter / WEIGHTS,
                hint="train the adapter without lm_head and embed_tokens",
            )
        weight = own.get(module) or own.get(f"{module}.weight")
        if weight is None or not fits(plain.removeprefix(module), header, weight):
            size = "the target has not" if weight is None else f"is {list(weight.shape)} there"
            raise UserError(
                f"adapts another model: {name} is {list(header.shape)}, {module} {size}",
                where=adapter / WEIGHTS,
                hint=TRAINED_FOR,
            )


def check_vocabulary(adapter: Path, target: TargetInfo) -> None:
    """Raise `UserError` for an adapter of a target whose vocabulary was resized before training."""
    for name, header in read_header(adapter / WEIGHTS).items():
        found = OF_TOKENS.search(name)
        count = header.shape[-1 if name.endswith("embedding_A") else 0]
        if found and count != target.vocab_size:
            raise resized(count, found[1], adapter, target)


def resized(count: int, layer: str, adapter: Path, target: TargetInfo) -> UserError:
    more = count > target.vocab_size
    return UserError(
        f"{'adds' if more else 'drops'} {abs(count - target.vocab_size):,} tokens: its {layer} has "
        f"{count:,}, the target {target.vocab_size:,}, so that it cannot be merged into the target "
        "as it is",
        where=adapter / WEIGHTS,
        hint="make one model of the two: load the target in transformers, call its "
        f"resize_token_embeddings({count}), load the adapter with PEFT, merge_and_unload() and "
        "save_pretrained() it with the adapter's tokenizer; give that folder as the target, and a "
        f"draft of {count:,} tokens (afaspec init)",
    )


def fits(part: str, header: Header, weight: Header) -> bool:
    """Does a tensor of the adapter fit the stored `weight` [out, in] that it changes?"""
    if part == ".lora_A.weight":
        return header.shape[-1] == weight.shape[-1]
    if part == ".lora_B.weight":
        return header.shape[0] == weight.shape[0]
    if part == ".lora_embedding_A":
        return header.shape[-1] == weight.shape[0]
    if part == ".lora_embedding_B":
        return header.shape[0] == weight.shape[-1]
    return bool(part) or header.shape == weight.shape  # without a part: a tensor saved whole


def merge_target(target: TargetInfo, adapter: Path, folder: Path) -> None:
    """Write the merged model with its tokenizer to `folder`, in the stored dtype."""
    from peft import PeftModel

    model = load_model(target.folder, target.dtype)
    try:
        adapted = PeftModel.from_pretrained(model, str(adapter))
        merged = adapted.merge_and_unload(safe_merge=True)
    except Exception as error:  # a library boundary: whatever PEFT finds wrong with an adapter
        raise UserError(
            f"PEFT cannot merge this adapter ({type(error).__name__}: {first_line(error)})",
            where=adapter,
            hint="check that it was trained for this target, and that it holds no NaN",
        ) from error
    with atomic_folder(folder) as temporary:
        merged.save_pretrained(temporary)
        copy_tokenizer(target.folder, temporary)
        write_json(
            temporary / "afaspec.json",
            {
                "made_by": "a target merged with --target-adapter",
                "target": {"path": str(target.folder), "sha256": target.sha256},
                "adapter": {"path": str(adapter), "sha256": hash_file(adapter / WEIGHTS)},
            },
        )

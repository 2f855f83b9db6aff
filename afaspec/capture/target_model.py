"""The target as transformers loads it: config, tokenizer and weights, never its own code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from drafts.checkpoint.load import load_causal_lm
from drafts.errors import UserError, first_line

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def load_tokenizer(folder: Path) -> Any:
    """The target's tokenizer. `UserError` when the folder has none or a broken one."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(
            f"has no tokenizer (none of {', '.join(TOKENIZER_FILES)})",
            where=folder,
            hint="copy the target's tokenizer files into it",
        )
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a damaged tokenizer file makes the library raise
        raise UserError(
            f"its tokenizer cannot be loaded ({type(error).__name__}: {first_line(error)})",
            where=folder,
            hint="fetch the target's tokenizer files again",
        ) from error


def read_model_config(folder: Path) -> Any:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return config.get_text_config()
    except Exception as error:
        raise UserError(
            f"transformers cannot read this model's config ({first_line(error)})",
            where=folder / "config.json",
            hint="use a model whose code is part of transformers",
        ) from error


def load_target(folder: Path, dtype: str, device: str) -> Any:
    """The target on its device, ready to generate. `UserError` for damaged or foreign models."""
    from afaspec.capture.generate import use_fast_decoding

    model = load_model(folder, dtype).to(device).eval()
    use_fast_decoding(model)
    return model


def load_model(folder: Path, dtype: str) -> Any:
    """transformers' own model in memory. `UserError` for damaged or foreign models."""
    import torch

    model, wrong, _ = load_causal_lm(folder, getattr(torch, dtype), "target")
    if wrong:
        raise UserError(
            f"its weights lack or misshape {len(wrong)} tensors that its config asks for, such as "
            f"{wrong[0]}",
            where=folder,
            hint="fetch the model again: config and weights do not belong together",
        )
    return model


def end_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a response: the model's own and its tokenizer's."""
    found: set[int] = set()
    for ids in (model.generation_config.eos_token_id, tokenizer.eos_token_id):
        found.update(ids if isinstance(ids, list) else [ids] if ids is not None else [])
    return frozenset(found)

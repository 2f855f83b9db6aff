"""A target that speaks a chat template and says nothing but digits, until it ends its turn."""

from __future__ import annotations

import shutil
from pathlib import Path

from drafts.files import write_json
from tests.tiny.models import write_target
from tests.tiny.templates import chat_tokenizer

END = 2  # <|im_end|>


def write_digits(folder: Path) -> Path:
    """A seeded target whose output layer knows the digits and the end token alone."""
    import torch
    from safetensors.torch import load_file, save_file

    write_target(folder, vocab=400, seed=3)
    weights = load_file(folder / "model.safetensors")
    spoken = [chat_tokenizer(None).convert_tokens_to_ids(word) for word in [*"0123456789"]]
    head = torch.zeros_like(weights["lm_head.weight"])
    for token in [*spoken, END]:
        head[token] = weights["lm_head.weight"][token]
    save_file({**weights, "lm_head.weight": head}, folder / "model.safetensors", {"format": "pt"})
    return folder


def with_template(base: Path, folder: Path, template: str | None, *, bos: bool = False) -> Path:
    """A copy of `base` that speaks `template`."""
    shutil.copytree(base, folder)
    for path in folder.glob("*token*"):
        path.unlink()
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer = chat_tokenizer(template, bos=bos)
    tokenizer.save_pretrained(folder)
    write_json(folder / "generation_config.json", {"eos_token_id": [END]})
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == END
    return folder

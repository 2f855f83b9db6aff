"""What a capture may take of the machine's memory and disk."""

from __future__ import annotations

import math
import shutil

from afaspec.capture.plan import CapturePlan
from afaspec.capture.target_model import read_model_config
from drafts.errors import UserError
from drafts.files import weight_files
from drafts.target.info import TargetInfo

GIB = 1 << 30
LARGEST_BATCH = {"cpu": 128, "cuda": 256}
MEMORY_SHARE = 0.4  # of what is free: the rest is for attention, the shard and other programs


def choose_batch_size(plan: CapturePlan) -> int:
    """The largest power of two whose caches and features fit the free memory."""
    longest = max(plan.longest(prompt) for prompt in plan.prompts)
    token = cache_bytes(plan.target, 2) + 2 * plan.token_bytes
    row = longest * token + 12 * plan.target.vocab_size
    free = free_memory(plan.device)
    weights = sum(path.stat().st_size for path in weight_files(plan.target.folder))
    if weights >= free:
        raise UserError(
            f"its weights take {weights / GIB:.1f} GiB, {free / GIB:.1f} GiB of memory are free",
            where=plan.target.folder,
            hint="free some memory, or capture on a larger machine",
        )
    fits = max(1, int(MEMORY_SHARE * (free - weights) / row))
    largest: int = min(fits, LARGEST_BATCH[plan.device], max(1, len(plan.prompts)))
    return 1 << (largest.bit_length() - 1)


def free_memory(device: str) -> int:
    """Bytes that are free on a device."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.mem_get_info()[0]
    import psutil

    return int(psutil.virtual_memory().available)


def cache_bytes(target: TargetInfo, value_bytes: int) -> int:
    """Keys and values of one token, in values of so many bytes."""
    config = read_model_config(target.folder)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * heads * width * target.num_layers * value_bytes)


def engine_cache_gib(
    target: TargetInfo, dtype: str, device: str, longest: int, batch: int, layers: int = 0
) -> int:
    """GiB of a vLLM engine's cache for a batch of texts, and the states of so many layers; less
    where memory is short, then vLLM lets some wait. `UserError` where not one text fits."""
    value = 4 if dtype == "float32" else 2
    one = longest * (cache_bytes(target, value) + layers * target.hidden_size * value)
    room = MEMORY_SHARE * free_memory(device)
    if one > room:
        raise UserError(
            f"the keys and values of {longest:,} tokens take {one / GIB:.1f} GiB, "
            f"{room / GIB:.1f} GiB may be used",
            where=target.folder,
            hint="give --max-prompt-tokens or a lower --max-new-tokens",
        )
    return max(1, math.ceil(min(one * batch, room) / GIB))


def check_space(plan: CapturePlan, done_bytes: int) -> int:
    """The bytes still to be written, at most. `UserError` when the disk has fewer, or the store
    could take more than `--max-disk`."""
    whole = plan.most_tokens * plan.token_bytes
    allowed = plan.config.max_disk
    if allowed is not None and whole > allowed * GIB:
        fits = int(len(plan.prompts) * allowed * GIB / whole)
        raise UserError(
            f"the store may take {size(whole)}, and --max-disk allows {size(allowed * GIB)}",
            where=plan.config.out,
            hint=f"give --limit {fits} or so, a lower --max-new-tokens"
            + {"bf16": ", or --features int8", "int8": ", or --features none", "none": ""}[
                plan.config.features
            ],
        )
    most = max(0, whole - done_bytes)
    folder = plan.config.out.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if most > free:
        raise UserError(
            f"the store may need {size(most)} more, the disk has {size(free)} free",
            where=plan.config.out,
            hint="choose another disk with --out, or fewer or shorter responses with --limit or "
            "--max-new-tokens",
        )
    return most


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"

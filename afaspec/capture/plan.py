"""What a capture will do, settled and checked before any weight is loaded."""

from __future__ import annotations

import hashlib
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from afaspec.capture.config import CaptureConfig
from afaspec.capture.target_model import load_tokenizer, read_model_config
from afaspec.store.manifest import Manifest, TargetRecord, token_bytes
from afaspec.versions import versions
from bench.prompts.encode import EncodedPrompt, encode_prompts
from bench.prompts.read import read_prompts
from drafts.checkpoint.info import DraftInfo
from drafts.checkpoint.layer_ids import default_layer_ids
from drafts.errors import UserError
from drafts.files import weight_files
from drafts.registry import wanted_layer_ids
from drafts.target import TargetInfo

GIB = 1 << 30
LARGEST_BATCH = {"cpu": 64, "cuda": 256}
MEMORY_SHARE = 0.4  # of what is free: the rest is for attention, the shard and other programs


@dataclass(frozen=True)
class CapturePlan:
    """Settled inputs of one capture. `batches` hold prompt numbers, in the order of the store."""

    config: CaptureConfig
    target: TargetInfo
    tokenizer: Any
    prompts: list[EncodedPrompt]
    layer_ids: tuple[int, ...]
    device: str
    dtype: str
    prompts_sha256: str
    model_config: Any  # transformers' own

    @property
    def token_bytes(self) -> int:
        return token_bytes(self.target.hidden_size, len(self.layer_ids))

    def longest(self, prompt: EncodedPrompt) -> int:
        """The most tokens that this prompt and its response can have."""
        if self.config.use_responses:
            return len(prompt.input_ids) + len(prompt.response_ids or [])
        return len(prompt.input_ids) + self.config.max_new_tokens

    @property
    def most_tokens(self) -> int:
        return sum(self.longest(prompt) for prompt in self.prompts)

    def batches(self, batch_size: int) -> list[list[int]]:
        """Prompts of like length together (little padding), the batches in an order by seed."""
        order = sorted(range(len(self.prompts)), key=lambda i: self.longest(self.prompts[i]))
        batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        random.Random(self.config.seed).shuffle(batches)
        return batches

    def manifest(self, batch_size: int) -> Manifest:
        """A manifest without shards for this plan."""
        return Manifest(
            target=TargetRecord(
                path=str(self.target.folder.resolve()),
                sha256=self.target.sha256,
                hidden_size=self.target.hidden_size,
                vocab_size=self.target.vocab_size,
                num_layers=self.target.num_layers,
            ),
            layer_ids=self.layer_ids,
            dtype=self.dtype,
            settings={
                "prompts": self.config.prompts,
                "prompts_sha256": self.prompts_sha256,
                "prompts_count": len(self.prompts),
                **self.config.fixed_settings(),
                "batch_size": batch_size,
                "device": self.device,
            },
            versions=versions(),
        )


def plan_capture(
    config: CaptureConfig,
    target: TargetInfo,
    draft: DraftInfo | None,
    note: Callable[[str], None],
) -> CapturePlan:
    """Check the layers and every prompt. Raises `UserError` for the first fault."""
    model_config = read_model_config(target.folder)
    layer_ids = choose_layer_ids(config, target, draft)
    device = choose_device(config.device)
    dtype = compute_dtype(config.dtype, target, device)
    prompts = read_prompts(
        config.prompts,
        limit=config.limit,
        seed=config.seed,
        split=config.split,
        eval_fraction=config.eval_fraction,
        prompt_tokens=config.prompt_tokens,
        suffixes=tuple(config.suffixes) if config.suffixes else None,
        suite_folder=config.suite_folder,
        note=note,
    )
    later = sum(bool(prompt.turns) for prompt in prompts)
    if later:
        note(f"{later} of {len(prompts)} prompts go on with more turns: only the first is captured")
    tokenizer = load_tokenizer(target.folder)
    encoded = encode_prompts(
        prompts,
        tokenizer,
        max_positions=target.max_positions,
        max_prompt_tokens=config.max_prompt_tokens,
        new_tokens=config.max_new_tokens,
        truncate=config.truncate_prompts,
        chat=config.chat,
    )
    if config.use_responses:
        for prompt, row in zip(encoded, prompts, strict=True):
            if not prompt.response_ids and row.head_tokens is None:
                raise UserError(
                    "has no response to take",
                    where=prompt.id,
                    hint='give every row a "response", or let the target write: no --use-responses',
                )
        encoded = [prompt for prompt in encoded if prompt.response_ids]
    _check_vocabulary(encoded, target)
    return CapturePlan(
        config=config,
        target=target,
        tokenizer=tokenizer,
        prompts=encoded,
        layer_ids=layer_ids,
        device=device,
        dtype=dtype,
        prompts_sha256=_hash(encoded, config),
        model_config=model_config,
    )


def choose_layer_ids(
    config: CaptureConfig, target: TargetInfo, draft: DraftInfo | None
) -> tuple[int, ...]:
    """From the config, else from the draft, else vLLM's default for this depth; checked."""
    layers = target.num_layers
    usual = (1, max(2, layers // 2), layers - 1)
    hint = f"give --layer-ids {','.join(map(str, usual))}" if layers >= 4 else "see --layer-ids"
    ids, origin = config.chosen_layer_ids(), "--layer-ids"
    if ids is None and draft is not None:
        ids, origin = wanted_layer_ids(draft, target), f"draft {draft.folder}"
    if ids is None:
        ids, origin = default_layer_ids(layers), "the default (2, L/2, L-3)"
    fault = None
    if wrong := [i for i in ids if not 0 <= i <= layers]:
        fault = f": {wrong[0]} is out of range, the target has layers 0 to {layers}"
    elif len(set(ids)) != len(ids):
        fault = f" are not distinct (the target has {layers} layers)"
    if fault:
        problem = f"layer ids {list(ids)} from {origin}{fault}"
        raise UserError(problem, where=target.folder, hint=hint)
    return tuple(ids)


def choose_device(wanted: str) -> str:
    import torch

    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("no CUDA device can be used here", hint="give --device cpu or auto")
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return wanted


def compute_dtype(wanted: str, target: TargetInfo, device: str) -> str:
    """`auto` is bfloat16, as at serving, but float16 for a float16 target on a GPU."""
    if wanted != "auto":
        return wanted
    return "float16" if target.dtype == "float16" and device == "cuda" else "bfloat16"


def choose_batch_size(plan: CapturePlan) -> int:
    """The largest power of two whose caches and features fit the free memory."""
    import torch

    config = plan.model_config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    longest = max(plan.longest(prompt) for prompt in plan.prompts)
    cache = 4 * heads * width * plan.target.num_layers
    row = longest * (cache + 2 * plan.token_bytes) + 12 * plan.target.vocab_size
    if plan.device == "cuda":
        free = torch.cuda.mem_get_info()[0]
    else:
        import psutil

        free = psutil.virtual_memory().available
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


def check_space(plan: CapturePlan, done_bytes: int) -> int:
    """The bytes still to be written, at most. `UserError` when the disk has fewer."""
    most = max(0, plan.most_tokens * plan.token_bytes - done_bytes)
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


def _check_vocabulary(prompts: list[EncodedPrompt], target: TargetInfo) -> None:
    for prompt in prompts:
        largest = max([*prompt.input_ids, *(prompt.response_ids or [])])
        if largest >= target.vocab_size:
            raise UserError(
                f"token id {largest} is outside the target's vocabulary of {target.vocab_size}",
                where=prompt.id,
                hint="the tokenizer in the target's folder belongs to another model; replace it",
            )


def _hash(prompts: list[EncodedPrompt], config: CaptureConfig) -> str:
    """SHA-256 over the token ids that go into the store or the target."""
    digest = hashlib.sha256()
    for prompt in prompts:
        answer = prompt.response_ids if config.use_responses else None
        digest.update(f"{prompt.input_ids}{answer}\n".encode())
    return digest.hexdigest()

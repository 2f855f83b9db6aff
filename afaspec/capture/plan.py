"""What a capture will do, settled and checked before any weight is loaded."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from afaspec.capture.config import CaptureConfig, is_address
from afaspec.capture.states import ReadWith, ToRead, choose_reader
from afaspec.capture.target_model import end_ids, load_tokenizer, read_model_config
from afaspec.capture.turns import (
    Turn,
    ended,
    joined,
    recorded_text,
    recorded_turns,
    to_generate,
)
from afaspec.store.manifest import NAME, Manifest, TargetRecord, read_manifest, token_bytes
from afaspec.versions import versions
from bench.prompts.conversation import require_room
from bench.prompts.encode import Dialogue, EncodedPrompt, Encoder, make_encoder
from bench.prompts.formats.collect import usable
from bench.prompts.read import read_prompts
from bench.prompts.rows import Prompt
from bench.prompts.select import drawn
from bench.prompts.template import ChatTemplate, today
from drafts.checkpoint.info import DraftInfo
from drafts.checkpoint.layer_ids import default_layer_ids
from drafts.errors import UserError
from drafts.registry import wanted_layer_ids
from drafts.target.info import TargetInfo
from drafts.tensors import fastest_float
from serving.runtime import require_vllm, vllm_package

GROWN = "grown"  # of a manifest's settings: limit and number of prompts before each time it grew


@dataclass(frozen=True)
class Asked:
    """What is asked first, and the turns of the whole: with the recorded answers, or, where the
    target writes them, as they would be with answers of a token each."""

    prompt: EncodedPrompt
    turns: list[Turn]


@dataclass(frozen=True)
class Setup:
    """What of a capture is settled before its prompts are read.

    `ends` are the tokens that end an answer; `write_with` is what writes the answers, `read_with`
    what gives the hidden states where they were not kept in writing.
    """

    config: CaptureConfig
    target: TargetInfo
    encoder: Encoder
    ends: list[int]
    layer_ids: tuple[int, ...]
    device: str
    dtype: str
    write_with: Literal["transformers", "vllm", "server"]
    read_with: ReadWith

    @property
    def token_bytes(self) -> int:
        return token_bytes(self.target.hidden_size, len(self.layer_ids), self.config.features)


@dataclass(frozen=True)
class CapturePlan(Setup):
    """Settled inputs of one capture. `batches` hold prompt numbers, in the order of the store."""

    prompts: list[Asked]
    prompts_sha256: str
    first: int = 0  # the number of its first prompt, in a part of a capture

    @property
    def seed(self) -> str:
        """What all that is drawn begins with."""
        return f"{self.config.seed}:part {self.first}" if self.first else str(self.config.seed)

    @property
    def to_read(self) -> ToRead:
        """What its reader is told."""
        return ToRead(
            target=self.target,
            layer_ids=self.layer_ids,
            dtype=self.dtype,
            device=self.device,
            longest=max(map(self.longest, self.prompts)),
            enforce_eager=self.config.enforce_eager,
            tensor_parallel=self.config.tensor_parallel,
        )

    def longest(self, asked: Asked) -> int:
        """The most tokens that a sequence of this prompt and its responses can have."""
        return max(self._lengths(asked))

    @property
    def most_tokens(self) -> int:
        return sum(sum(self._lengths(asked)) for asked in self.prompts)

    def _lengths(self, asked: Asked) -> list[int]:
        """The most tokens of each sequence."""
        kept = [len(one.ids) for one in joined(asked.turns, self.config.train_turns)]
        if self.config.use_responses:
            return kept
        new = self.config.max_new_tokens
        return [min(length + len(asked.turns) * new, self.encoder.room + new) for length in kept]

    def batches(self, batch_size: int, grown: Sequence[int] = ()) -> list[list[int]]:
        """Prompts of like length together (little padding), the batches in an order by seed.

        Those of a store that has `grown` come as they did: the prompts up to each of these numbers
        before those that were added there.
        """
        batches = []
        for start, end in pairwise([0, *grown, len(self.prompts)]):
            order = sorted(range(start, end), key=lambda i: self.longest(self.prompts[i]))
            some = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
            random.Random(self.config.seed).shuffle(some)
            batches += some
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
                "prompts": self.config.source,
                "field": self.config.field,
                "skip_bad_rows": self.config.skip_bad_rows,
                "prompts_sha256": self.prompts_sha256,
                "prompts_count": len(self.prompts),
                **self.config.fixed_settings(),
                **self._chat_settings(),
                "sampling": "neutral",  # the temperature alone, nothing of generation_config
                "self_prompts": self.config.self_prompt_settings(),
                "written_with": None if self.write_with == "transformers" else self.write_with,
                "states_with": None if self.read_with == "transformers" else self.read_with,
                "batch_size": batch_size,
                "device": self.device,
            },
            features=self.config.features,
            versions=versions(),
        )

    def _chat_settings(self) -> dict[str, Any]:
        """What the chat template was told, where any prompt went through it."""
        dialogues = [asked.prompt.dialogue for asked in self.prompts]
        if all(dialogue is None or dialogue.plain for dialogue in dialogues):
            return {}
        return self.encoder.template.record()


def settle(config: CaptureConfig, target: TargetInfo, draft: DraftInfo | None) -> Setup:
    """Check all that needs no prompts. Raises `UserError` for the first fault."""
    read_model_config(target.folder)  # raises what it would raise later
    layer_ids = choose_layer_ids(config, target, draft)
    device = choose_device(config.device)
    encoder = make_encoder(
        ChatTemplate(load_tokenizer(target.folder), config.chat_template_kwargs, _date(config)),
        max_positions=target.max_positions,
        max_prompt_tokens=config.max_prompt_tokens,
        new_tokens=config.max_new_tokens,
        truncate=config.truncate_prompts,
        chat=config.chat,
    )
    own = config.generate_with == "transformers"  # writes, so it reads as well
    read_with = choose_reader("transformers" if own else config.states_with, target, device)
    return Setup(
        config=config,
        target=target,
        encoder=encoder,
        ends=end_ids(target.folder, encoder.tokenizer),
        layer_ids=layer_ids,
        device=device,
        dtype=compute_dtype(config.dtype, target, device),
        write_with=choose_writer(config, read_with),
        read_with=read_with,
    )


def plan_capture(setup: Setup, note: Callable[[str], None]) -> CapturePlan:
    """Read and check every prompt. Raises `UserError` for the first fault."""
    config, encoder, ends = setup.config, setup.encoder, setup.ends
    prompts = read_prompts(
        config.source,
        config,
        seed=config.seed,
        suffixes=tuple(config.suffixes) if config.suffixes else None,
        note=note,
    )
    make = _recorded if config.use_responses else _to_write
    made = usable(
        as_captured(prompts, config),
        lambda prompt: make(prompt, encoder, ends, config),
        config.source,
        skip=config.skip_bad_rows,
        note=note,
    )
    asked = [one for one in made if one is not None]
    _tell(asked, encoder, ends, note)
    _check_vocabulary(asked, setup.target)
    return CapturePlan(**vars(setup), prompts=asked, prompts_sha256=hash_of(asked))


def as_captured(prompts: list[Prompt], config: CaptureConfig) -> list[Prompt]:
    """The prompts in the order of the store that is gone on with: those of a lower limit first."""
    if config.overwrite or not (config.out / NAME).is_file():
        return prompts
    settings = read_manifest(config.out).settings
    limits = [before["limit"] for before in settings.get(GROWN, [])] + [settings.get("limit")]
    ordered: dict[int, Prompt] = {}
    for limit in limits:
        ordered |= {id(prompt): prompt for prompt in drawn(prompts, limit, config.seed)}
    return [*(ordered | {id(prompt): prompt for prompt in prompts}).values()]


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
    """`auto` is as at serving, but float16 for a float16 target on a GPU."""
    import torch

    if wanted != "auto":
        return wanted
    if target.dtype == "float16" and device == "cuda":
        return "float16"
    return fastest_float(torch.device(device))


def choose_writer(
    config: CaptureConfig, read_with: str
) -> Literal["transformers", "vllm", "server"]:
    """What writes prompts and answers. Raises `UserError` for a vLLM that is not installed."""
    if config.use_responses:
        return "transformers"  # which loads nothing before it has to write
    if is_address(config.generate_with):
        return "server"
    if config.generate_with == "vllm":
        require_vllm()
        return "vllm"
    wanted = config.self_prompts is not None or read_with == "vllm"
    if config.generate_with == "auto" and wanted and vllm_package() is not None:
        return "vllm"
    return "transformers"


def _date(config: CaptureConfig) -> str:
    """What the chat template's clock says: as given, as in the store that is gone on with, or
    today."""
    if config.chat_date is None and not config.overwrite and (config.out / NAME).is_file():
        recorded: str | None = read_manifest(config.out).settings.get("chat_date")
        return recorded or today()
    return config.chat_date or today()


def _recorded(
    prompt: Prompt, encoder: Encoder, ends: list[int], config: CaptureConfig
) -> Asked | None:
    """The prompt with its own responses. None for a document that ends within its prompt."""
    dialogue = encoder.dialogue(prompt, replay=True)
    limit = config.max_new_tokens
    if dialogue is None:
        turns = recorded_text(prompt, encoder, ends, limit)
    else:
        turns = recorded_turns(dialogue, encoder, ends, limit, cut=prompt.cut)
    if turns:
        return _asked(prompt, dialogue, turns)
    if prompt.head_tokens is not None:
        return None
    raise UserError(
        "has no response to take",
        where=prompt.id,
        hint='give every row a "response", or let the target write: no --use-responses',
    )


def _to_write(prompt: Prompt, encoder: Encoder, ends: list[int], config: CaptureConfig) -> Asked:
    """The prompt with turns that the target is to answer."""
    dialogue = encoder.dialogue(prompt, replay=True)
    if dialogue is None:
        turns = [Turn(encoder.fit_plain(encoder.plain(prompt), prompt.id), [])]
    else:
        dialogue = to_generate(dialogue)
        if len(dialogue.asked) > 1:
            require_room(dialogue, encoder, config.max_new_tokens)
        end = encoder.template.end_id
        answer = ended(encoder.ids(".", begin=False), ends if end is None else [end])
        turns = [
            Turn(encoder.ask(dialogue, ["."] * number).ids, answer)
            for number in range(len(dialogue.asked))
        ]
    return _asked(prompt, dialogue, turns)


def _asked(prompt: Prompt, dialogue: Dialogue | None, turns: list[Turn]) -> Asked:
    first = EncodedPrompt(prompt.id, turns[0].prompt, prompt.category, dialogue, prompt.root)
    return Asked(first, turns)


def _tell(
    asked: list[Asked], encoder: Encoder, ends: list[int], note: Callable[[str], None]
) -> None:
    """Say what is special about the conversations."""
    several = [one for one in asked if len(one.turns) > 1]
    if several:
        count = sum(len(one.turns) for one in several)
        note(f"{len(several)} of {len(asked)} prompts are conversations of {count} turns in all")
    chats = [one for one in asked if (found := one.prompt.dialogue) and not found.plain]
    end = encoder.template.end_id if chats else None
    if end is not None and end not in ends:
        note(
            f"Warning: the chat template ends a turn with {encoder.tokenizer.decode([end])!r}, at "
            "which the target does not stop: eos_token_id in generation_config.json lacks it"
        )
    begin = encoder.begin
    if begin and any(one.turns[0].prompt[: len(begin)] != begin for one in chats):
        note(
            "The chat template writes no BOS, which the tokenizer puts before plain text: "
            "conversations have none, as in vLLM's server"
        )


def _check_vocabulary(prompts: list[Asked], target: TargetInfo) -> None:
    for asked in prompts:
        largest = max(max([*turn.prompt, *turn.answer]) for turn in asked.turns)
        if largest >= target.vocab_size:
            raise UserError(
                f"token id {largest} is outside the target's vocabulary of {target.vocab_size}",
                where=asked.prompt.id,
                hint="the tokenizer in the target's folder belongs to another model; replace it",
            )


def hash_of(prompts: Sequence[Asked]) -> str:
    """SHA-256 over the token ids that go into the store or the target."""
    digest = hashlib.sha256()
    for asked in prompts:
        for turn in asked.turns:
            digest.update(f"{turn.prompt}{turn.answer}".encode())
        digest.update(b"\n")
    return digest.hexdigest()

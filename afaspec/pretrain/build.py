"""Build the embedded pair from scratch: corpus, tokenizer, target, its Python completions, draft.

Every stage leaves its result in the work folder, so that a killed build goes on where it was.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer

from afaspec.capture.config import CaptureConfig
from afaspec.capture.run import capture
from afaspec.checkpoints.merge import merge
from afaspec.embedded.unpack import pack, unpack_to
from afaspec.pretrain.card import write_card
from afaspec.pretrain.config import BuildConfig
from afaspec.pretrain.corpus import build_corpus, python_files, sample_texts
from afaspec.pretrain.target import TARGET_BITS, pretrain, target_config
from afaspec.pretrain.tokenizer import encode_corpus, train_tokenizer
from afaspec.train.config import TrainConfig
from afaspec.train.run import train
from drafts.checkpoint.family import InitOptions
from drafts.files import atomic_file, atomic_folder
from drafts.registry import init_draft, read_draft, save_draft
from drafts.target.info import TargetInfo, read_target

DRAFT_BITS = 8
Say = Callable[[str], None]
Stage = Callable[[str, int, int], None]


def build_embedded(config: BuildConfig, say: Say, stage: Stage) -> None:
    """Build target and draft and pack them into `config.out`. `stage` follows the long parts."""
    config.work.mkdir(parents=True, exist_ok=True)
    target = read_target(build_target(config, say, stage))
    draft = build_draft(config, target, say, stage)
    pack(draft, config.out / "draft", DRAFT_BITS)
    write_card(config.work, config.out, config.model_dump(mode="json"))
    say(f"packed pair: {config.out} ({folder_mib(config.out):.1f} MiB)")


def folder_mib(folder: Path) -> float:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 2**20


def build_target(config: BuildConfig, say: Say, stage: Stage) -> Path:
    """Corpus, tokenizer and pre-training; returns the unpacked target that ships."""
    folder = config.work / "target"
    if folder.exists():
        return folder
    corpus = build_corpus(config.extra, config.characters, config.seed)
    say(f"corpus, characters by domain: {corpus.characters()}")
    tokenizer_folder = config.work / "tokenizer"
    if not tokenizer_folder.exists():
        with atomic_folder(tokenizer_folder) as temporary:
            train_tokenizer(corpus, config.target.vocab_size).save_pretrained(temporary)
    streams_path = config.work / "streams.npz"
    if not streams_path.exists():
        with atomic_file(streams_path) as temporary, temporary.open("wb") as file:
            np.savez(file, **encode_corpus(corpus, tokenizer_folder))
    streams = dict(np.load(streams_path))
    say(f"tokens by domain: { {name: len(ids) for name, ids in streams.items()} }")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    model_config = target_config(config.target, tokenizer.eos_token_id, tokenizer.pad_token_id)
    model = pretrain(config.target, streams, corpus.weights, model_config, config.work, say, stage)

    trained = config.work / "trained"
    with atomic_folder(trained) as temporary:
        model.save_pretrained(temporary)
        for path in tokenizer_folder.iterdir():
            shutil.copyfile(path, temporary / path.name)
    pack(trained, config.out / "target", TARGET_BITS)
    unpack_to(config.out / "target", folder)
    return folder


def build_draft(config: BuildConfig, target: TargetInfo, say: Say, stage: Stage) -> Path:
    """Capture the target's Python completions and train an EAGLE-3 head on them from scratch."""
    prompts = config.work / "python_prompts.jsonl"
    if not prompts.exists():
        texts = sample_texts(python_files(), config.characters, config.seed + 1)
        with atomic_file(prompts) as temporary:
            temporary.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    start_folder = config.work / "draft-start"
    if not start_folder.exists():
        streams = config.work / "streams.npz"
        kept = common_tokens(streams, config.draft_vocab_size, target.vocab_size)
        draft = init_draft("eagle3", target, InitOptions(kept=kept, seed=config.seed))
        with atomic_folder(start_folder) as temporary:
            save_draft(draft, "eagle3", temporary, dtype=torch.float32)
    start = read_draft(start_folder)
    store = capture(
        CaptureConfig(
            target=str(target.folder),
            prompts=str(prompts),
            out=config.work / "python-store",
            draft=start.folder,
            split="train",
            limit=config.draft_prompts,
            prompt_tokens=96,
            max_new_tokens=config.draft_new_tokens,
            seed=config.seed,
        ),
        target,
        start,
        on_progress=lambda p: stage("target answers (python)", int(p.done), p.total),
        note=say,
    )
    run = config.work / "draft-run"
    if not (run / "manifest.json").exists():
        train(
            TrainConfig(
                store=store.folder,
                draft=start.folder,
                out=run,
                target=target.folder,
                arm="full",
                lm_head=True,
                steps=config.draft_steps,
                learning_rate=config.draft_learning_rate,
                batch_size=8,
                eval_fraction=0.05,
                eval_every=100,
                checkpoint_every=50,
                seed=config.seed,
            ),
            store,
            start,
            target,
            lambda row: stage("training the draft", row["step"], config.draft_steps),
        )
    merged = config.work / "draft-trained"
    if not merged.exists():
        merge(run, start, merged, target)
    return merged


def common_tokens(streams: Path, count: int, vocab_size: int) -> torch.Tensor:
    """The `count` tokens most frequent in the training corpus, in ascending order of id."""
    counts: Counter[int] = Counter()
    for ids in np.load(streams).values():
        counts.update(dict(enumerate(np.bincount(ids, minlength=vocab_size).tolist())))
    chosen = [token for token, _ in counts.most_common(count)]
    return torch.tensor(sorted(chosen))

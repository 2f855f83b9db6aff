"""The embedded target's byte-level BPE, trained on its own corpus."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from afaspec.pretrain.corpus import Corpus

END, USER, ASSISTANT, PAD = "<|endoftext|>", "<|user|>", "<|assistant|>", "<|pad|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ ('<|user|>' if message['role'] != 'assistant' else '<|assistant|>') + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|endoftext|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_tokenizer(corpus: Corpus, vocab_size: int, characters: int = 6_000_000) -> Any:
    """A `PreTrainedTokenizerFast` of exactly `vocab_size` ids, specials first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, USER, ASSISTANT, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_balanced(corpus, characters), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _balanced(corpus: Corpus, characters: int) -> list[str]:
    """The first documents of each domain, in proportion to the domain's weight."""
    chosen = []
    for name, weight in corpus.weights.items():
        budget = int(characters * weight)
        for text in corpus.documents[name]:
            if budget <= 0:
                break
            chosen.append(text[:budget])
            budget -= len(text)
    return chosen


def encode_corpus(corpus: Corpus, tokenizer_folder: Path) -> dict[str, Any]:
    """One int32 array of token ids per domain, documents joined by the end token."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    end = tokenizer.eos_token_id
    streams = {}
    for name, documents in corpus.documents.items():
        rows = tokenizer(documents, add_special_tokens=False)["input_ids"]
        streams[name] = np.concatenate([np.asarray([end, *row], dtype=np.int32) for row in rows])
    return streams

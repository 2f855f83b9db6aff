"""How many tokens an answer has, where the server does not say."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from bench.records.run import Answer, Block
from bench.server.config import ServerConfig
from serving.remote import RemoteServer

UNKNOWN = (
    "the server does not say how many tokens it wrote, and offers no /tokenize to count them "
    "with; give TARGET, the folder of the model that it serves"
)


def with_counts(block: Block, config: ServerConfig, server: RemoteServer) -> Block:
    """The block with the tokens of all its answers counted; where nobody can, they have failed.

    An answer's text is tokenised again, by the server or else with the target's tokenizer. That can
    give other tokens than were written, and no end token.
    """
    target = config.target.folder if config.target else None
    return replace(block, answers=[_counted(answer, server, target) for answer in block.answers])


def _counted(answer: Answer, server: RemoteServer, target: Path | None) -> Answer:
    if answer.error is not None or answer.counted_by is not None:
        return answer
    ids = server.tokenize(prompt=answer.text, add_special_tokens=False)
    if ids is None and target is not None:
        ids = _tokenizer(target).encode(answer.text, add_special_tokens=False)
    if not ids:
        return replace(answer, error=UNKNOWN)
    return replace(answer, tokens=len(ids), counted_by="tokenizer")


@lru_cache(maxsize=1)
def _tokenizer(target: Path):  # type: ignore[no-untyped-def]  # transformers' own
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(target)

"""One prompt with an answer to it, so that a reader sees what was asked and said."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

SHOWN = 1500  # characters of the prompt's end, and of the answer's beginning

Text = str | Sequence[int]


def example(name: str, prompt: Text, answer: Text, target: Path | None) -> dict[str, Any] | None:
    """The report's `example`; token ids are read by the target's tokenizer, without which None."""
    texts = []
    for content in (prompt, answer):
        if isinstance(content, str):
            texts.append(content)
        elif target is None:
            return None
        else:
            from transformers import AutoTokenizer

            texts.append(str(AutoTokenizer.from_pretrained(target).decode(list(content))))
    asked, said = texts
    before, after = "… " * (len(asked) > SHOWN), " …" * (len(said) > SHOWN)
    return {"id": name, "prompt": before + asked[-SHOWN:], "answer": said[:SHOWN] + after}

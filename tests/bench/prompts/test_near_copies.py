"""Near-copies: the same words in another dress are one text, a few words in common are not."""

from __future__ import annotations

import random

import pytest

from bench.prompts.near_copies import NearCopies

TEXT = "Can you help me write a short letter to my landlord about the broken heating in my flat?"


@pytest.mark.parametrize(
    ("other", "new"),
    [
        (TEXT, False),
        (TEXT.upper().replace("?", " !"), False),
        (TEXT.replace("flat", "kitchen"), False),
        ("Can you help me write a short poem about the sea?", True),
        ("heating " * 20, True),
        ("我想学习如何做饭", True),
        ("", True),
    ],
)
def test_what_is_a_near_copy(other: str, new: bool) -> None:
    seen = NearCopies()
    assert seen.add(TEXT)
    assert seen.add(other) is new
    assert not seen.add(other)


def test_near_copies_are_found_among_many() -> None:
    chance = random.Random(0)
    words = [f"word{i}" for i in range(500)]
    texts = [chance.choices(words, k=40) for _ in range(300)]
    seen = NearCopies()
    assert all(seen.add(" ".join(text)) for text in texts)
    for text in texts:
        text[chance.randrange(40)] = "changed"
    assert sum(seen.add(" ".join(text)) for text in texts) <= 3

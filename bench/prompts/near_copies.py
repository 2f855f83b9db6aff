"""Texts that nearly repeat an earlier one: MinHash finds candidates, their words decide."""

from __future__ import annotations

import zlib
from collections import defaultdict

import numpy as np

SHINGLE = 3  # words
BANDS, ROWS = 16, 3  # texts alike in 0.6 of their shingles share a band in 98 of 100 cases
PRIME = (1 << 31) - 1


class NearCopies:
    """The texts seen so far. Two are near-copies if `alike` of all their shingles are common."""

    def __init__(self, alike: float = 0.6):
        self.alike = alike
        self._bands: dict[tuple[int, bytes], list[frozenset[int]]] = defaultdict(list)
        generator = np.random.default_rng(0)
        self._factors = generator.integers(1, PRIME, (BANDS * ROWS, 1), dtype=np.uint64)
        self._shifts = generator.integers(0, PRIME, (BANDS * ROWS, 1), dtype=np.uint64)

    def add(self, text: str) -> bool:
        """Whether `text` is new; it is remembered where it is."""
        found = shingles(text)
        values = np.fromiter(found, dtype=np.uint64) % PRIME
        least = ((self._factors * values + self._shifts) % PRIME).min(axis=1)
        keys = [(i, band.tobytes()) for i, band in enumerate(least.reshape(BANDS, ROWS))]
        for key in keys:
            if any(_jaccard(found, other) >= self.alike for other in self._bands.get(key, ())):
                return False
        for key in keys:
            self._bands[key].append(found)
        return True


def shingles(text: str) -> frozenset[int]:
    """Hashes of every few words in a row, without regard to case and punctuation.

    Of a text with fewer words, or of a script without spaces, characters in a row."""
    words = "".join(c if c.isalnum() else " " for c in text.casefold()).split()
    if len(words) > SHINGLE:
        parts = [" ".join(words[i : i + SHINGLE]) for i in range(len(words) - SHINGLE + 1)]
    else:
        whole = " ".join(words) or text
        parts = [whole[i : i + SHINGLE] for i in range(max(1, len(whole) - SHINGLE + 1))]
    return frozenset(zlib.crc32(part.encode("utf-8", "surrogatepass")) for part in parts)


def _jaccard(one: frozenset[int], other: frozenset[int]) -> float:
    return len(one & other) / len(one | other)

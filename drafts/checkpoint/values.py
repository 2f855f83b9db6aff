"""The stored values held against what they must be: finite, and one token for each draft id."""

from __future__ import annotations

from typing import Any

import numpy as np

from drafts.checkpoint.source import FETCH, Source
from drafts.errors import UserError
from drafts.tensors import read_numbers

CHUNK = 1 << 22  # numbers looked at in one go
# How a float is read, and the bits of its exponent: all set in an infinity or a NaN. E4M3 has no
# infinity and keeps one pattern, all bits set, for NaN.
EXPONENTS = {
    "bfloat16": ("<u2", 0x7F80),
    "float16": ("<u2", 0x7C00),
    "float32": ("<u4", 0x7F800000),
    "float64": ("<u8", 0x7FF0000000000000),
    "F8_E4M3": ("u1", 0x7F),
    "F8_E5M2": ("u1", 0x7C),
}
WHOLE = {"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1", "BOOL": "?"}


def check_values(source: Source) -> None:
    """Raise `UserError` for a NaN or an infinity in any tensor, and for a wrong vocabulary map.

    Reads every weight once: about a second for a gigabyte that the system has in memory.
    """
    for name, header in source.stored.items():
        if header.dtype not in EXPONENTS:
            continue
        kind, exponent = EXPONENTS[header.dtype]
        numbers = read_numbers(header, kind)
        for start in range(0, len(numbers), CHUNK):
            if (numbers[start : start + CHUNK] & exponent).max() == exponent:
                raise UserError(
                    f"{name} holds NaN or infinity",
                    where=header.file,
                    hint="download the draft again, or train it again: no draft computes with this",
                )


def check_vocabulary_map(source: Source, vocab_size: int) -> None:
    """Raise `UserError` unless d2t, where there is one, gives each draft id a token of its own.

    `d2t` [draft_vocab] holds target id minus draft id; `t2d` [vocab], where it is stored as well,
    says of each token whether it is one of these.
    """
    if "d2t" not in source.stored:
        return
    d2t = _whole_numbers(source, "d2t")
    ids = np.arange(len(d2t)) + d2t
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise UserError("d2t points outside the vocabulary", where=source.folder, hint=FETCH)
    if len(np.unique(ids)) != len(ids):
        raise UserError("d2t maps two draft ids to one token", where=source.folder, hint=FETCH)
    if "t2d" not in source.stored or source.stored["t2d"].dtype not in WHOLE:
        return
    marked = np.flatnonzero(_whole_numbers(source, "t2d"))
    if not np.array_equal(marked, np.sort(ids)):
        raise UserError(
            f"d2t and t2d disagree: d2t leads to {len(ids):,} tokens, t2d marks {len(marked):,}, "
            f"{len(np.intersect1d(marked, ids)):,} of them the same",
            where=source.folder,
            hint="one of the two is of another draft: download the draft again",
        )


def _whole_numbers(source: Source, name: str) -> Any:
    header = source.stored[name]
    return read_numbers(header, WHOLE[header.dtype])

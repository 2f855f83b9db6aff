"""Files of rows: JSON lines or one JSON document, as they are or packed by gzip or zstd."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.prompts.formats.faults import MEND, shortened
from drafts.errors import UserError

ROW_SUFFIXES = (".jsonl", ".json", ".ndjson", ".gz", ".zst", ".zstd")
GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
LONE_SURROGATE = re.compile(
    "[\ud800-\udfff]"
)  # JSON may escape half of a character; UTF-8 has none
REPLACED = "lone surrogates (halves of a character) replaced by U+FFFD"
FIRST_LINES = 5  # looked at: a log may begin with something else
BLANK = re.compile(r"\s*")


def holds_rows(path: Path) -> bool:
    """Whether the file's name, or else one of its first lines, is that of rows."""
    if path.name.endswith(ROW_SUFFIXES):
        return True
    with path.open("rb") as file:
        head = file.read(1 << 16)
    if head.startswith((GZIP, ZSTD)):
        return True
    filled = [line for line in head.splitlines() if line.strip()]
    return any(map(_is_object, filled[:FIRST_LINES]))


def read_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (`file:line`, row). A row of JSON lines is its bytes, still to be decoded.

    A document is an array of rows or rows one after another, each on any number of lines. Blank
    lines count for nothing. Raises `UserError` for a file that cannot be read to its end.
    """
    lines = _lines(path)
    if _is_document(lines):
        yield from _document(b"".join(lines), path)
        return
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield f"{path}:{number}", line


def decode_line(line: bytes, where: str, seen: Counter[str]) -> Any:
    """The value of one line of JSON. What was replaced in it is counted in `seen`.

    Raises `UserError` for a line that is no JSON, or not UTF-8.
    """
    try:
        text = line.decode("utf-8-sig")
        value = json.loads(text)
    except UnicodeDecodeError as error:
        raise UserError(
            f"found byte 0x{line[error.start]:02x} at column {error.start + 1}, expected UTF-8",
            where=where,
            hint=f"save the file as UTF-8, or {MEND}",
        ) from None
    except (ValueError, RecursionError) as error:
        column = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(
            f"is not valid JSON ({getattr(error, 'msg', error)}{column}); found "
            f"{shortened(text.strip())}, expected one JSON object on each line",
            where=where,
            hint=MEND,
        ) from None
    return whole_characters(value, seen) if "\\u" in text else value


def whole_characters(value: Any, seen: Counter[str]) -> Any:
    """`value` with every lone surrogate in its texts replaced by U+FFFD and counted in `seen`."""
    if isinstance(value, str):
        text, count = LONE_SURROGATE.subn("\ufffd", value)
        if count:
            seen[REPLACED] += count
        return text
    if isinstance(value, list):
        return [whole_characters(item, seen) for item in value]
    if isinstance(value, dict):
        return {whole_characters(k, seen): whole_characters(v, seen) for k, v in value.items()}
    return value


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line.decode("utf-8-sig")), dict)
    except (ValueError, RecursionError):
        return False


def _lines(path: Path) -> list[bytes]:
    """The file's lines with their ends, unpacked and in UTF-8."""
    with path.open("rb") as file:
        magic = file.read(4)
    lines: list[bytes] = []
    try:
        with _opened(path, magic) as unpacked:
            for line in unpacked:
                lines.append(line)  # one by one: those before a fault say where it is
    except (gzip.BadGzipFile, EOFError, zlib.error, OSError) as error:
        kind = {GZIP: "gzip", ZSTD: "zstd"}.get(magic[: 2 if magic[:2] == GZIP else 4])
        if kind is None:
            raise UserError(f"cannot be read ({error})", where=path) from None
        raise UserError(
            f"is not a whole {kind} file",
            where=f"{path}:{len(lines) + 1}",
            hint="fetch it again, or give it unpacked",
        ) from None
    if magic.startswith(UTF16):
        try:
            text = b"".join(lines).decode("utf-16")
        except UnicodeDecodeError as error:
            raise UserError(
                f"begins as UTF-16 and is none at byte {error.start + 1}",
                where=path,
                hint="save the file as UTF-8",
            ) from None
        return text.encode("utf-8").splitlines(keepends=True)
    return lines


def _opened(path: Path, magic: bytes) -> Any:
    if magic.startswith(GZIP):
        return gzip.open(path, "rb")
    if magic.startswith(ZSTD):
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(str(path), "zstd"))
    return path.open("rb")


def _is_document(lines: list[bytes]) -> bool:
    """Whether the first value goes on beyond its line, or is an array that stands alone."""
    filled = (line.strip().removeprefix(codecs.BOM_UTF8) for line in lines if line.strip())
    first, second = next(filled, b""), next(filled, b"")
    if not first.startswith((b"[", b"{")):
        return False
    try:
        return isinstance(json.loads(first), list) and not second
    except json.JSONDecodeError as error:
        unfinished = error.pos >= len(error.doc.rstrip())
        return unfinished and (first.startswith(b"[") or not second.startswith(b"{"))
    except ValueError:
        return False


def _document(data: bytes, path: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a JSON document. Those that share a line are told apart by their number."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        found = f"found byte 0x{data[error.start]:02x}, expected UTF-8"
        raise UserError(found, where=f"{path}:{line}", hint="save the file as UTF-8") from None
    decoder, place = json.JSONDecoder(), _after_blank(text, 0)
    in_array = text.startswith("[", place)
    place = _after_blank(text, place + in_array)
    line, counted, last = 1, 0, 0
    index = 0
    while place < len(text) and not (in_array and text[place] == "]"):
        line, counted = line + text.count("\n", counted, place), place
        try:
            value, place = decoder.raw_decode(text, place)
            place = _after_blank(text, place)
            if in_array and text[place : place + 1] not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' or ']'", text, place)
        except json.JSONDecodeError as error:
            raise _not_json(error, path) from None
        yield f"{path}:{line}" + (f"[{index}]" if line == last else ""), value
        if in_array and text[place] == ",":
            place = _after_blank(text, place + 1)
        last, index = line, index + 1
    if in_array and (place >= len(text) or text[place + 1 :].strip()):
        found = "Expecting ']'" if place >= len(text) else "Extra data"
        raise _not_json(json.JSONDecodeError(found, text, min(place + 1, len(text))), path)


def _not_json(error: json.JSONDecodeError, path: Path) -> UserError:
    return UserError(
        f"is not valid JSON ({error.msg} at column {error.colno})",
        where=f"{path}:{error.lineno}",
        hint="repair the file: an array of objects, or one object on each line",
    )


def _after_blank(text: str, place: int) -> int:
    found = BLANK.match(text, place)
    return found.end() if found else place

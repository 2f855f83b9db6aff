"""Records as JSON: part by part what `json` writes at once, of any shape."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest

from bench.records.plain import plain, write_streamed
from bench.records.run import Answer, Block
from serving.metrics import ServerCounters, SpecCounters

SPEC = SpecCounters(2, 6, 3, (2, 1, 0))
BLOCK = Block(1.5, 0.1, [Answer(0.0, 0.1, [0.5, 0.75], 3, 'a "ż"\n', [5, 6, 7], SPEC),
                         Answer(0.0, 0.1, error="HTTP 500: no")])  # fmt: skip


@pytest.mark.parametrize(
    "value",
    [
        {"turns": [BLOCK, BLOCK], "counters": [None, ServerCounters(1, 2, SPEC)]},
        {"prompts": ["a", "b"], "seconds": [[1.0, 2.0], [3.0]], "nothing": [], "none": None},
        [[], {}, [[]], {"a": {}}, (1, (2, [3]))],
        {"a": {1: [True, None, 0.1]}},
        [],
        "text",
    ],
    ids=lambda value: str(value)[:30],
)
def test_it_is_what_json_writes_at_once(value: Any) -> None:
    file = io.StringIO()
    write_streamed(value, file)
    assert json.loads(file.getvalue()) == json.loads(json.dumps(value, default=plain))


def test_what_is_no_record_is_refused() -> None:
    with pytest.raises(TypeError, match="set is not written as JSON"):
        write_streamed({"a": [{1}, 2]}, io.StringIO())


def test_answers_take_little_room() -> None:
    many = Answer(0.0, 0.0, [0.1] * 1000, 1000, token_ids=[49_151] * 1000)
    assert memoryview(many.chunks).nbytes == 8000  # type: ignore[arg-type]
    assert memoryview(many.token_ids).nbytes == 4000  # type: ignore[arg-type]
    assert many == Answer(0.0, 0.0, (0.1,) * 1000, 1000, token_ids=[49_151] * 1000)

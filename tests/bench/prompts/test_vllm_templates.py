"""Conversations are the same text here and in vLLM's own server."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.prompts.template import ChatTemplate
from drafts.files import write_json
from tests.tiny.templates import (
    CHATML,
    DATED,
    PARTS,
    REASONING,
    TOOLS,
    WEATHER,
    chat_tokenizer,
    weather_call,
)

RAW_CALLS = TOOLS.replace(" | tojson }}}</call>", " }}}</call>")
USER = {"role": "user", "content": " Is it raining in Lund?\n"}
CALL = {"role": "assistant", "content": None, "tool_calls": [weather_call()]}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": '{"rain": false}'}
THOUGHT = {"role": "assistant", "content": "Dry.", "reasoning": "Look outside."}
SYSTEM, DEVELOPER = ({"role": r, "content": f"I am {r}."} for r in ("system", "developer"))


def case(
    template: str, *messages: dict[str, Any], tools: Any = None, **kwargs: Any
) -> dict[str, Any]:
    return {"template": template, "messages": messages, "tools": tools, "kwargs": kwargs}


CASES = [
    case(CHATML, SYSTEM, USER),
    case(CHATML, SYSTEM, USER, DEVELOPER, USER),
    case(CHATML, DEVELOPER, USER),
    case("{# 'developer' #}" + CHATML, DEVELOPER, USER),
    case(DATED, USER, date_string="1 May 2030"),
    case(DATED, USER),
    case(REASONING, USER, THOUGHT),
    case(REASONING, USER, THOUGHT, USER, enable_thinking=False),
    case(REASONING, USER, enable_thinking=True),
    case(PARTS, SYSTEM, USER, THOUGHT, USER),
    case(TOOLS, USER, CALL, RESULT, tools=[WEATHER]),
    case(RAW_CALLS, USER, CALL, RESULT, tools=[WEATHER]),
    case(TOOLS, USER, {**CALL, "content": "Let me look."}, RESULT),
    case(TOOLS, USER, {**CALL, "tool_calls": [weather_call("")]}, RESULT),
]


def test_the_text_is_that_of_vllms_server(tiny_target: Path, tmp_path: Path) -> None:
    folder = tmp_path / "target"
    tokenizer = chat_tokenizer(None)
    tokenizer.save_pretrained(folder)
    write_json(folder / "config.json", json.loads((tiny_target / "config.json").read_text()))
    asked = json.dumps({"target": str(folder), "cases": CASES})
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.prompts.vllm_chats"],
        input=asked,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = json.loads(done.stdout.splitlines()[-1])
    for one, text in zip(CASES, theirs, strict=True):
        tokenizer.chat_template = one["template"]
        told = one["kwargs"]
        chat = ChatTemplate(tokenizer, told)  # without a date: both clocks are the machine's
        messages = [
            {**message, "reasoning_content": message["reasoning"]}
            if "reasoning" in message
            else message
            for message in one["messages"]
        ]
        assert chat.text(messages, "case", ask=True, tools=one["tools"]) == text

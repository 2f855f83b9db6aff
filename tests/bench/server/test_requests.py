"""Prompts as requests: what a server's chat template is told goes with the messages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.server.config import ServerConfig
from bench.server.requests import content_hash, load_requests, make_job
from drafts.errors import UserError
from tests.tiny.templates import WEATHER, weather_call

ASKED = [
    {"role": "user", "content": "Is it raining in Lund?"},
    {"role": "assistant", "content": None, "tool_calls": [weather_call()]},
    {"role": "tool", "tool_call_id": "c1", "content": "dry"},
]


def config(folder: Path, row: dict[str, Any], **settings: Any) -> ServerConfig:
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    return ServerConfig(prompts=str(path), **settings)


def test_tools_and_variables_go_with_the_messages(tmp_path: Path) -> None:
    row = {"messages": ASKED, "tools": [WEATHER], "chat_template_kwargs": {"depth": 2}}
    given = config(tmp_path, row, chat_template_kwargs={"enable_thinking": False, "depth": 1})
    (request,) = load_requests(given, None, 3)
    body = json.loads(make_job(request, given, "m").body)
    assert body["messages"] == ASKED
    assert body["tools"] == [WEATHER]
    assert body["chat_template_kwargs"] == {"enable_thinking": False, "depth": 2}  # the row's wins
    (plain,) = load_requests(config(tmp_path, {"messages": ASKED[:1]}), None, 3)
    assert plain.content == {"messages": ASKED[:1]}
    told = {"chat_template_kwargs": {"depth": 2}}
    (other,) = load_requests(config(tmp_path, {"messages": ASKED[:1], **told}), None, 3)
    assert content_hash([plain]) != content_hash([other])


def test_a_servers_clock_is_its_own(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the servers' own clocks"):
        config(tmp_path, {"messages": ASKED[:1]}, chat_date="2026-01-31")

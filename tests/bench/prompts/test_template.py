"""Chat templates: told what the server tells them, and nothing of a conversation is lost."""

from __future__ import annotations

from typing import Any

import pytest

from bench.prompts.template import ChatTemplate
from drafts.errors import UserError
from tests.tiny.templates import (
    CHATML,
    CLOCK,
    DATED,
    PARTS,
    REASONING,
    TOOLS,
    WEATHER,
    chat_tokenizer,
    weather_call,
)


def template(source: str | None, **told: Any) -> ChatTemplate:
    return ChatTemplate(chat_tokenizer(source), told, "2026-01-31")


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def test_the_clock_stands_still_and_can_be_told() -> None:
    """The inputs that could not be resumed: a template with a clock, and Llama's date."""
    made = template(CLOCK).text([user("Say 1.")], "a", ask=True)
    assert made == "<|user|>Today: 31 Jan 2026 00:00\n<|user|>Say 1.<|assistant|>"
    assert "Today: 31 Jan 2026<|eot|>" in template(DATED).text([user("x")], "a", ask=True)
    told = template(DATED, date_string="1 May 2030")
    assert "Today: 1 May 2030<|eot|>" in told.text([user("x")], "a", ask=True)
    assert template(CLOCK).record()["chat_date"] == "2026-01-31"
    assert template(CHATML).record()["chat_date"] is None  # of no matter there


def test_thinking_is_switched_by_flag_and_by_row() -> None:
    asked = [user("Is 7 prime?")]
    none = "<think>\n\n</think>\n\n"
    assert none not in template(REASONING).text(asked, "a", ask=True)
    assert template(REASONING, enable_thinking=False).text(asked, "a", ask=True).endswith(none)
    by_row = {"enable_thinking": False, "unknown_to_it": 1}
    assert template(REASONING).text(asked, "a", ask=True, kwargs=by_row).endswith(none)


@pytest.mark.parametrize("name", ["enable_thinkng", "tools", "add_generation_prompt", "messages"])
def test_a_variable_that_no_template_reads_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"'{name}', which .* does not read; it reads enable_think"):
        template(REASONING, **{name: False})
    with pytest.raises(UserError, match="it reads nothing that can be given"):
        template(CHATML, **{name: False})


@pytest.mark.parametrize("content", [None, "", "Let me look."])
@pytest.mark.parametrize("arguments", ['{"town": "Lund"}', {"town": "Lund"}])
def test_tools_calls_and_results_reach_the_template(content: str | None, arguments: Any) -> None:
    asked = [
        user("Is it raining in Lund?"),
        assistant(content, tool_calls=[weather_call(arguments)]),
        {"role": "tool", "tool_call_id": "c1", "content": '{"rain": false}'},
    ]
    chat = template(TOOLS)
    chat.require_all_read(asked, "a", tools=[WEATHER])
    made = chat.text(asked, "a", ask=True, tools=[WEATHER])
    assert '"description": "Weather of a town"' in made
    assert (
        f"<|im_start|>assistant\n{content or ''}"
        '<call>{"name": "weather", "arguments": {"town": "Lund"}}</call><|im_end|>\n'
        '<|im_start|>tool\n{"rain": false}<|im_end|>\n' in made
    )


@pytest.mark.parametrize(
    ("source", "lost"),
    [
        (CHATML, r"tool_calls of message 2 \(assistant\)"),
        (TOOLS.replace("{% if tools %}", "{% if false %}"), '"tools"'),
        (TOOLS.replace("'role'] }}\n", "'role'] }}\n{% if m['role'] != 'tool' %}").replace(
            "{{ m['content'] }}", "{{ m['content'] }}{% endif %}"
        ), r"content of message 3 \(tool\)"),
    ],
    ids=["call", "tools", "result"],
)  # fmt: skip
def test_what_a_template_leaves_out_is_refused(source: str, lost: str) -> None:
    asked = [
        user("Is it raining in Lund?"),
        assistant(None, tool_calls=[weather_call()]),
        {"role": "tool", "tool_call_id": "c1", "content": "dry"},
    ]
    tools = None if source == CHATML else [WEATHER]
    with pytest.raises(UserError, match=f"rows:4: .* leaves out {lost}"):
        template(source).require_all_read(asked, "rows:4", tools=tools)


def test_arguments_that_are_no_object_are_refused() -> None:
    asked = [user("x"), assistant(None, tool_calls=[weather_call("{town")]), user("y")]
    with pytest.raises(UserError, match="rows:4: the arguments of the call to 'weather' are no"):
        template(TOOLS).text(asked, "rows:4", ask=True)


def test_a_template_of_parts_gets_parts() -> None:
    chat = template(PARTS)
    chat.require_all_read([user("hello")], "a")
    expected = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert chat.text([user("hello")], "a", ask=True) == expected


def test_a_developer_is_the_system_where_it_is_not_known() -> None:
    asked = [
        {"role": "developer", "content": "Be brief."},
        user("x"),
        {"role": "developer", "content": "Be kind."},
        user("y"),
    ]
    assert template(CHATML).text(asked, "a", ask=False) == (
        "<|im_start|>system\nBe brief.\n\nBe kind.<|im_end|>\n"
        "<|im_start|>user\nx<|im_end|>\n<|im_start|>user\ny<|im_end|>\n"
    )
    knowing = "{# 'developer' #}" + CHATML
    assert "<|im_start|>developer\nBe kind." in template(knowing).text(asked, "a", ask=False)


def test_the_end_of_a_turn_is_the_templates() -> None:
    ends = {CHATML: "<|im_end|>", DATED: "<|eot|>", CLOCK: None}
    for source, end in ends.items():
        chat = ChatTemplate(chat_tokenizer(source, end="<|endoftext|>"))
        expected = None if end is None else chat.tokenizer.convert_tokens_to_ids(end)
        assert chat.end_id == expected


def test_a_template_that_refuses_is_told_with_the_roles() -> None:
    strict = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match=r"rows:2: .*roles must alternate\); its roles: user, user"):
        template(strict).text([user("a"), user("b")], "rows:2", ask=True)

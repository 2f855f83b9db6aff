"""What production writes: every shape of a chat row, every kind of file, and rows that are bad."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from bench.prompts.read import read_prompts
from bench.prompts.rows import Prompt
from bench.prompts.select import content_sha256
from bench.records.settings import PromptSettings
from drafts.errors import UserError

Row = dict[str, Any]
FUNCTION = {
    "name": "weather",
    "parameters": {"type": "object", "properties": {"town": {"type": "string"}}},
}
TOOL = {"type": "function", "function": FUNCTION}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"a": 1}'}}
ASK = {"role": "user", "content": "Is it raining?"}
SAID = {"role": "assistant", "content": "No, it is dry."}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": '{"rain": false}'}
SYSTEM = {"role": "system", "content": "Answer shortly."}


def write_rows(path: Path, rows: list[Any]) -> Path:
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


def only(tmp_path: Path, row: Any, **settings: Any) -> Prompt:
    (prompt,) = read_prompts(write_rows(tmp_path / "rows.jsonl", [row]), PromptSettings(**settings))
    return prompt


def test_tool_calls_reach_the_messages(tmp_path: Path) -> None:
    for said in ({"content": None}, {"content": ""}, {"content": "Let me look."}, {}):
        calling = {"role": "assistant", "tool_calls": [CALL], **said}
        found = only(tmp_path, {"tools": [TOOL], "messages": [ASK, calling, RESULT, SAID]})
        assert found.messages == [ASK, {**calling, "content": said.get("content")}, RESULT]
        assert (found.tools, found.answer) == ([TOOL], SAID)


def test_a_call_may_be_the_answer_and_tools_may_be_text(tmp_path: Path) -> None:
    calling = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    found = only(tmp_path, {"tools": json.dumps([FUNCTION]), "messages": [ASK, calling]})
    assert (found.tools, found.answer) == ([TOOL], calling)
    assert only(tmp_path, {"tools": "[]", "messages": [ASK]}).tools is None
    old = {"role": "assistant", "content": None, "function_call": CALL["function"]}
    back = {"role": "function", "name": "weather", "content": "dry"}
    found = only(tmp_path, {"functions": [FUNCTION], "messages": [ASK, old, back, SAID]})
    assert found.tools == [TOOL]
    assert found.messages is not None
    assert found.messages[1]["tool_calls"] == [{k: CALL[k] for k in ("type", "function")}]
    assert found.messages[2] == {**back, "role": "tool"}


def test_parts_of_text_are_joined_and_others_named(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "input_text", "text": "two"}, "three"]
    found = only(tmp_path, {"messages": [{"role": "user", "content": parts}]})
    assert found.messages == [{"role": "user", "content": "one\ntwo\nthree"}]
    parts[1] = {"type": "image_url", "image_url": {"url": "x"}}
    with pytest.raises(UserError, match=r":1: .*\[0\] has a part of the type 'image_url'"):
        only(tmp_path, {"messages": [{"role": "user", "content": parts}]})


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_has_one_name(name: str, tmp_path: Path) -> None:
    found = only(tmp_path, {"messages": [ASK, {**SAID, name: "Look outside."}]})
    assert found.answer == {**SAID, "reasoning_content": "Look outside."}


def turn(speaker: str, text: str) -> Row:
    return {"from": speaker, "value": text}


def test_sharegpt_and_its_roles(tmp_path: Path) -> None:
    rows = [turn("system", SYSTEM["content"]), turn("human", ASK["content"]),
            turn("function_call", json.dumps({"name": "weather", "arguments": {"a": 1}})),
            turn("observation", "dry"), turn("acme-7b", SAID["content"])]  # fmt: skip
    path = write_rows(tmp_path / "rows.jsonl", [{"conversations": rows}])
    notes: list[str] = []
    (found,) = read_prompts(path, note=notes.append)
    call = {"type": "function", "function": {"name": "weather", "arguments": {"a": 1}}}
    assert found.messages == [
        SYSTEM,
        ASK,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "dry"},
    ]
    assert found.answer == SAID
    assert "1 turns from 'acme-7b', which is no role, taken for the assistant's" in notes[0]
    for speakers in (["acme-7b", "human"], ["human", "gpt", "narrator"]):
        with pytest.raises(UserError, match=r"has the role '(acme-7b|narrator)'"):
            only(tmp_path, {"conversations": [turn(name, "x") for name in speakers]})


ONE_TURN: dict[str, Row] = {
    "roles of ShareGPT in messages": {
        "messages": [{"role": "human", "content": ASK["content"]},
                     {"role": "gpt", "content": SAID["content"]}]},
    "lists as text": {"conversations": json.dumps([ASK, SAID])},
    "answer beside the conversation": {"messages": [ASK], "response": SAID["content"]},
    "TRL": {"prompt": [ASK], "completion": [SAID]},
    "TRL with a text": {"prompt": [ASK], "completion": SAID["content"]},
    "Alpaca": {"instruction": ASK["content"], "input": "", "output": SAID["content"]},
    "request and response": {"request": {"messages": [ASK]},
                             "response": {"choices": [{"message": SAID}]}},
    "as text": {"request": json.dumps({"messages": [ASK]}),
                "response": json.dumps({"choices": [{"message": SAID}]})},
    "request and text": {"request": {"messages": [ASK]}, "response": SAID["content"]},
    "batch": {"custom_id": "1", "method": "POST", "body": {"model": "m", "messages": [ASK]},
              "response": {"status_code": 200, "body": {"choices": [{"message": SAID}]}},
              "error": None},
    "choices beside messages": {"messages": [ASK], "choices": [{"message": SAID}]},
}  # fmt: skip


@pytest.mark.parametrize("name", ONE_TURN)
def test_one_question_in_many_shapes(name: str, tmp_path: Path) -> None:
    found = only(tmp_path, ONE_TURN[name])
    assert (found.messages, found.answer) == ([ASK], SAID)
    assert (found.text, found.response, found.cut) == (None, None, False)


def test_alpaca_with_input_system_and_history(tmp_path: Path) -> None:
    row = {"instruction": "Sort.", "input": "3 1 2", "output": "1 2 3", "system": "Be brief.",
           "history": [["Hi.", "Hello."]]}  # fmt: skip
    found = only(tmp_path, row)
    contents = [message["content"] for message in found.messages or []]
    assert contents == ["Be brief.", "Hi.", "Hello.", "Sort.\n\n3 1 2"]
    assert found.answer == {"role": "assistant", "content": "1 2 3"}


def test_completions_stay_text_and_a_system_prompt_makes_a_conversation(tmp_path: Path) -> None:
    row = {"request": {"prompt": "def f():", "max_tokens": 4}, "choices": [{"text": "\n    pass"}]}
    found = only(tmp_path, row)
    assert (found.text, found.response, found.messages) == ("def f():", "\n    pass", None)
    assert only(tmp_path, {"prompt": ["one"]}).text == "one"
    row = {"system_prompt": SYSTEM["content"], "question": ASK["content"]}
    assert only(tmp_path, row).messages == [SYSTEM, ASK]
    row = {"system_prompt": SYSTEM["content"], "prompt": ASK["content"]}
    assert only(tmp_path, row).messages == [SYSTEM, ASK]


@pytest.mark.parametrize("how", [{"finish_reason": "length"}, {"stop_reason": "\n\n"}])
def test_an_answer_cut_off_has_no_end(how: Row, tmp_path: Path) -> None:
    assert only(tmp_path, {"messages": [ASK], "choices": [{"message": SAID, **how}]}).cut
    ended = {"finish_reason": "stop", "stop_reason": 7}
    assert not only(tmp_path, {"messages": [ASK], "choices": [{"message": SAID, **ended}]}).cut


def test_what_a_request_told_the_template_is_kept(tmp_path: Path) -> None:
    row = {"messages": [ASK], "chat_template_kwargs": {"enable_thinking": False},
           "reasoning_effort": "low"}  # fmt: skip
    expected = {"enable_thinking": False, "reasoning_effort": "low"}
    assert only(tmp_path, row).template_kwargs == expected
    assert only(tmp_path, {"request": row}).template_kwargs == expected


REFUSED: dict[str, tuple[Row, str]] = {
    "token ids": ({"prompt": [1, 2]}, '"prompt" is a list of a number; expected text or messages'),
    "several prompts": ({"prompt": ["a", "b"]}, '"prompt" is a list of text'),
    "images": ({"image": "x.png", "conversations": [turn("human", "<image>")]}, 'has "image"'),
    "a failed request": ({"body": {"messages": [ASK]}, "response": {"status_code": 500,
                          "body": {"error": "x"}}}, "its request failed"),
    "an answer alone": ({"response": {"body": {"choices": [{"message": SAID}]}}},
                        "holds an answer without its request"),
    "a piece of a stream": ({"messages": [ASK], "choices": [{"delta": {"content": "x"}}]},
                            "its answer has delta"),
    "documents": ({"messages": [ASK], "documents": [{"text": "x"}]}, 'has "documents"'),
    "tools of another kind": ({"messages": [ASK], "tools": [{"type": "web_search"}]},
                              "is of the type 'web_search'"),
    "tools in words": ({"messages": [ASK], "tools": "weather"}, '"tools" is text'),
    "tools in a message": ({"messages": [{**ASK, "tools": [TOOL]}]}, '[0] has "tools"'),
    "a call of nothing": ({"messages": [ASK, {**SAID, "tool_calls": [{"id": "1"}]}]}, "calls {"),
    "null without a call": ({"messages": [ASK, {"role": "assistant", "content": None}]},
                            '"messages"[1] is null; expected text'),
    "nothing said": ({"messages": [ASK, {"role": "assistant", "content": " "}]},
                     '"messages"[1] is empty'),
    "two answers": ({"messages": [ASK, SAID], "response": "Yes."}, "has two answers"),
    "context beside a question": ({"question": "Who?", "context": "Ann."}, 'has "context"'),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_right_is_refused(name: str, tmp_path: Path) -> None:
    row, expected = REFUSED[name]
    with pytest.raises(UserError) as caught:
        only(tmp_path, row)
    assert expected in caught.value.problem
    assert str(caught.value.where).endswith("rows.jsonl:1")


MANY = [{"messages": [ASK]}, {"messages": [{**ASK, "content": "Is it\tcold? é"}]}]


def written(form: str, path: Path) -> Path:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in MANY)
    array = json.dumps(MANY, indent=1)
    if form in ("gzip", "zstd"):
        import pyarrow

        path = path.with_suffix(".jsonl.gz" if form == "gzip" else ".jsonl.zst")
        one, two = (line.encode() for line in lines.splitlines(keepends=True))
        pack = gzip.compress if form == "gzip" else lambda data: pyarrow.compress(
            data, codec="zstd", asbytes=True)  # fmt: skip
        path.write_bytes(pack(one) + pack(two))  # one after another, as rotated logs are joined
        return path
    if form == "parquet":
        import datasets

        path = path.with_suffix(".parquet")
        datasets.Dataset.from_list(MANY).to_parquet(str(path))
        return path
    if form == "lines without a known name":
        path = path.with_suffix(".log")
    text = {"array": array, "one line": json.dumps(MANY), "CRLF": lines.replace("\n", "\r\n"),
            "BOM": "\ufeff" + lines, "BOMs inside": "\ufeff" + "\n\ufeff".join(lines.splitlines()),
            "array with BOM": "\ufeff" + array,
            "objects over lines": "\n".join(json.dumps(row, indent=2) for row in MANY)}  # fmt: skip
    encoding = "utf-16" if form == "UTF-16" else "utf-8"
    path.write_bytes(text.get(form, lines).encode(encoding))
    return path


FORMS = ("array", "one line", "CRLF", "BOM", "BOMs inside", "array with BOM", "objects over lines",
         "UTF-16", "gzip", "zstd", "parquet", "lines without a known name")  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_files_of_every_kind(form: str, tmp_path: Path) -> None:
    prompts = read_prompts(written(form, tmp_path / "rows.json"))
    assert [prompt.messages for prompt in prompts] == [row["messages"] for row in MANY]
    assert len({prompt.id for prompt in prompts}) == 2


def test_a_folder_of_logs_is_read_unless_it_is_one_of_sources(tmp_path: Path) -> None:
    for number, row in enumerate(MANY):
        write_rows(tmp_path / f"day{number}.jsonl", [row])
    assert [prompt.messages for prompt in read_prompts(tmp_path)] == [r["messages"] for r in MANY]
    (tmp_path / "notes.md").write_text("# Notes\n" + "What was asked. " * 100)
    notes: list[str] = []
    assert all(prompt.text for prompt in read_prompts(tmp_path, note=notes.append))
    assert "2 files of rows passed over" in notes[0]


def test_rows_of_an_array_have_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('[\n{"prompt": "a"},\n\n{"prompt": "b"}, {"prompt": "c"}\n]\n')
    assert [p.id for p in read_prompts(path)] == [f"{path}:{n}" for n in ("2", "4", "4[2]")]
    path.write_text('[\n{"prompt": "a"},\n{"prompt" "b"}\n]\n')
    with pytest.raises(UserError, match=r":3: is not valid JSON [^$]* an array of objects"):
        read_prompts(path)
    path.write_text('[\n{"prompt": "a"},\n{"prompt": "b"}\n')
    with pytest.raises(UserError, match=r"rows.json:\d: is not valid JSON \(Expecting"):
        read_prompts(path)


def test_parquet_rows_lose_the_nulls_that_arrow_adds(tmp_path: Path) -> None:
    import datasets

    calling = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    rows = [{"messages": [ASK, calling, RESULT, SAID], "tools": [TOOL]}, {"messages": [ASK, SAID]}]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "rows.parquet"))
    with_call, without = read_prompts(tmp_path / "rows.parquet")
    assert with_call.messages == [ASK, calling, RESULT]
    assert (without.messages, without.tools, without.answer) == ([ASK], None, SAID)


def test_half_a_zstd_file_and_a_table_are_refused(tmp_path: Path) -> None:
    import pyarrow

    path = tmp_path / "rows.jsonl.zst"
    data = b'{"prompt": "a"}\n' * 5
    path.write_bytes(pyarrow.compress(data, codec="zstd", asbytes=True)[:-4])
    with pytest.raises(UserError, match="is not a whole zstd file"):
        read_prompts(path)
    table = tmp_path / "rows.csv"
    table.write_text("prompt\nhello\n")
    with pytest.raises(UserError, match=r"is a table \(.csv\)"):
        read_prompts(table)


def test_lone_surrogates_are_replaced_and_counted(tmp_path: Path) -> None:
    row = r'{"messages": [{"role": "user", "content": "cut \ud83d and \ud83d\ude00"}]}'
    path = write_rows(tmp_path / "rows.jsonl", [row, MANY[0]])
    array = tmp_path / "rows.json"
    array.write_text(f"[{row}]")
    for source in (path, array):
        notes: list[str] = []
        prompt, *_ = read_prompts(source, note=notes.append)
        assert prompt.messages == [{"role": "user", "content": "cut \ufffd and \U0001f600"}]
        assert notes == [f"{source}: 1 lone surrogates (halves of a character) replaced by U+FFFD"]


BAD = [{"messages": [{**SAID, "content": "Hello, how can I help?"}]}, {"messages": []},
       {"messages": [ASK, {**SAID, "content": ""}]}, '{"messages": [{"role',
       {"messages": [{**ASK, "content": ""}, SAID]}]  # fmt: skip


def test_bad_rows_are_listed_at_once_or_left_out_and_counted(tmp_path: Path) -> None:
    good = [{"messages": [{**ASK, "content": f"Count to {i}."}, SAID]} for i in range(10)]
    path = write_rows(tmp_path / "rows.jsonl", [*good[:5], *BAD, *good[5:]])
    with pytest.raises(UserError) as caught:
        read_prompts(path)
    assert f"{path}: 5 of its 15 rows cannot be used" in str(caught.value)
    assert "--skip-bad-rows" in str(caught.value)
    told = [line.split(": ")[0].strip() for line in caught.value.problem.splitlines()[1:]]
    assert told == [f"{path}:{line}" for line in range(6, 11)]
    notes: list[str] = []
    prompts = read_prompts(path, PromptSettings(skip_bad_rows=True), note=notes.append)
    assert [p.messages for p in prompts] == [row["messages"][:1] for row in good]
    assert "5 of 15 rows are bad and left out" in notes[0]
    write_rows(path, BAD * 9)
    with pytest.raises(UserError, match=r"45 of its 45 rows cannot be used[^$]*and 25 more"):
        read_prompts(path, PromptSettings(skip_bad_rows=True))


def test_token_ids_are_a_prompt(tmp_path: Path) -> None:
    row = {"id": "x", "root": "ab", "prompt_token_ids": [5, 6], "response_token_ids": [7]}
    found = only(tmp_path, row)
    assert (found.ids, found.response_ids, found.text) == ((5, 6), (7,), None)
    assert found.split_key == "ab"
    alone = only(tmp_path, {"prompt_token_ids": [5, 6]})
    assert alone.response_ids == ()
    assert alone.root != only(tmp_path, {"prompt_token_ids": [5, 7]}).root
    assert content_sha256([alone]) != content_sha256([only(tmp_path, {"prompt_token_ids": [5]})])
    said = only(tmp_path, {"prompt": "hello", "prompt_token_ids": [5]})
    assert (said.text, said.ids) == ("hello", None)
    for bad in ([], "5 6", [5, -1], [5, "6"], [5, True], [5, None]):
        with pytest.raises(UserError, match=r"rows.jsonl:1: \"prompt_token_ids\" (is|has)"):
            only(tmp_path, {"prompt_token_ids": bad})


def test_a_greeting_before_the_question_is_no_fault(tmp_path: Path) -> None:
    greeting = {"role": "assistant", "content": "Hello."}
    row = {"messages": [greeting, ASK, {**ASK, "content": "Are you there?"}, SAID]}
    found = only(tmp_path, row)
    assert (found.messages, found.answer) == (row["messages"][:3], SAID)


def test_fields_of_other_rows(tmp_path: Path) -> None:
    row = {"log": {"turns": [{"who": "human", "says": {"text": "Hi."}}]}, "prompt": "not this",
           "meta": [{"kind": "chat"}]}  # fmt: skip
    fields = ["messages=log.turns", "role=who", "content=says.text", "category=meta.0.kind"]
    found = only(tmp_path, row, field=fields)
    assert found.messages == [{"role": "user", "content": "Hi."}]
    assert found.category == "chat"
    with pytest.raises(UserError, match=r"has no 'log.turn' .it has log, meta, prompt"):
        only(tmp_path, row, field=["messages=log.turn"])
    with pytest.raises(UserError, match=r"no row has 'meta.1.kind', the field category"):
        only(tmp_path, row, field=[*fields[:3], "category=meta.1.kind"])
    with pytest.raises(ValueError, match="expected NAME=PATH, with a NAME of messages"):
        PromptSettings(field=["mesages=x"])

"""Where prompts begin: sides that hold, and measuring on what a draft was trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.prompts.read import read_prompts
from bench.prompts.rows import Prompt
from bench.prompts.trained_on import NAME, read_roots, trained_on_warnings, write_roots
from bench.records.arms import Arm
from bench.records.settings import PromptSettings
from drafts.errors import UserError
from drafts.registry import read_draft


def growing_log(rows: int, chat: bool) -> list[dict[str, Any]]:
    """Conversations that are logged anew at every turn, as an agent's requests are."""
    log: list[dict[str, Any]] = []
    for number in range(rows // 5):
        messages = [{"role": "system", "content": "Be  brief."},
                    {"role": "user", "content": f"Question {number}?"}]  # fmt: skip
        for turn in range(5):
            text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>" for m in messages)
            plain = {"prompt": f"{text}<|im_start|>assistant\n"}
            log.append({"messages": list(messages)} if chat else plain)
            messages += [{"role": "assistant", "content": f"Answer {turn}."},
                         {"role": "user", "content": f"And {turn}?"}]  # fmt: skip
    return log


@pytest.mark.parametrize("chat", [True, False])
def test_a_growing_log_of_500_rows_has_no_root_on_both_sides(chat: bool, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in growing_log(500, chat)))
    train, held = (
        read_prompts(path, PromptSettings(split=side, eval_fraction=0.2))
        for side in ("train", "eval")
    )
    assert len(train) + len(held) == 500
    assert not {prompt.root for prompt in train} & {prompt.root for prompt in held}
    assert len({prompt.root for prompt in train + held}) == 100
    assert 50 < len(held) < 200


def test_near_copies_begin_alike(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "Sort  this:\n 3 1"}]},
            {"question": "Sort this: 3 1", "answer": "1 3"},
            {"prompt": "Sort this: 3 1 "},
            {"conversations": [{"from": "human", "value": "Sort this: 3\t1"}]}]  # fmt: skip
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len({prompt.root for prompt in read_prompts(path)}) == 1


def test_roots_are_written_sorted_and_read_again(tmp_path: Path) -> None:
    roots = {Prompt("", split_key=f"key {i}").root for i in range(50)}
    write_roots(tmp_path, [*roots, *roots])
    stored = json.loads((tmp_path / NAME).read_text())["trained_on"]
    assert stored == sorted(stored)
    assert all(len(root) == 16 for root in stored)
    assert read_roots(tmp_path) == roots
    assert read_roots(tmp_path / "elsewhere") == frozenset()
    (tmp_path / NAME).write_text('{"trained_on": ["x"]}')
    with pytest.raises(UserError, match="16 hexadecimal digits"):
        read_roots(tmp_path)


def test_measuring_on_what_was_trained_on_is_warned_of(tiny_draft: Path, tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(tiny_draft, tmp_path / "draft"))
    roots = [Prompt("", split_key=f"key {i}").root for i in range(10)]
    write_roots(folder, roots[:4])
    arms = [Arm("none"), Arm("ngram", "ngram"), Arm("base", read_draft(tiny_draft)),
            Arm("mine", read_draft(folder))]  # fmt: skip
    found = trained_on_warnings(arms, [*roots[2:], None])
    assert set(found) == {"mine"}
    assert "mine was trained on 2 of the 9 prompts measured" in found["mine"]
    assert trained_on_warnings(arms, roots[4:]) == {}

"""Prompts: every row shape, source folders, datasets, splits, samples and tokenising."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from bench.prompts.read import read_prompts
from bench.prompts.rows import Prompt
from bench.records.settings import PromptSettings
from drafts.errors import UserError


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def said(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


SHAPES: dict[str, tuple[dict[str, Any], Prompt]] = {
    "conversation": (
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]},
        Prompt("", [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]),
    ),
    "answered conversation": (
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        Prompt("", [{"role": "user", "content": "q"}], answer=said("a")),
    ),
    "prompt": ({"prompt": "p"}, Prompt("", text="p")),
    "prompt and response": ({"prompt": "p", "response": "r"}, Prompt("", text="p", response="r")),
    "MT-bench": (
        {"question_id": 1, "category": "math", "turns": ["first", "second"]},
        Prompt("", [{"role": "user", "content": "first"}], category="math", turns=("second",)),
    ),
    "gsm8k": (
        {"question": "q", "answer": "a"},
        Prompt("", [{"role": "user", "content": "q"}], answer=said("a")),
    ),
    "HumanEval": (
        {"task_id": "HumanEval/0", "prompt": "def f():\n", "canonical_solution": "    pass\n"},
        Prompt("", text="def f():\n", response="    pass\n"),
    ),
    "document": ({"path": "a.md", "text": "short"}, Prompt("", text="short", head_tokens=128)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_row_shapes(name: str, tmp_path: Path) -> None:
    row, expected = SHAPES[name]
    path = write_rows(tmp_path / "rows.jsonl", [row])
    (prompt,) = read_prompts(path)
    for field in ("messages", "text", "response", "answer", "category", "head_tokens", "turns"):
        assert getattr(prompt, field) == getattr(expected, field), field
    assert prompt.id.startswith(f"{path}:1")


def test_gzip_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write('\n{"prompt": "a"}\n\n{"prompt": "b"}\n')
    assert [(p.id, p.text) for p in read_prompts(path)] == [(f"{path}:2", "a"), (f"{path}:4", "b")]


def test_split_is_a_partition_that_keeps_copies_together(tmp_path: Path) -> None:
    rows = [{"prompt": f"question {i}"} for i in range(200)]
    path = write_rows(tmp_path / "rows.jsonl", [*rows, *rows])
    train, held = (
        [p.text for p in read_prompts(path, PromptSettings(split=side, eval_fraction=0.25))]
        for side in ("train", "eval")
    )
    assert len(train) + len(held) == 400
    assert not set(train) & set(held)
    assert 60 <= len(held) <= 140
    alone = write_rows(tmp_path / "alone.jsonl", [{"prompt": held[0]}])
    assert read_prompts(alone, PromptSettings(split="eval", eval_fraction=0.25))


def test_limit_draws_by_seed_in_file_order(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"{i:03}"} for i in range(100)])
    one, again, other = (
        [p.text for p in read_prompts(path, PromptSettings(limit=10), seed=seed)]
        for seed in (0, 0, 1)
    )
    assert one == again == sorted(one)
    assert len(one) == 10
    assert one != other


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    root = tmp_path / "src"
    (root / "deep").mkdir(parents=True)
    (root / ".hidden").mkdir()
    line = "int value_{} = {}; // a line of code that is long enough\n"
    long = "".join(line.format(i, i) for i in range(800))
    (root / "long.h").write_text(long)
    (root / "deep" / "other.cpp").write_text("// licence\n" + long[::-1])
    (root / "binary.h").write_bytes(b"\0" * 900)
    (root / "latin.h").write_bytes("é".encode("latin-1") * 900)
    (root / "empty.h").write_text("\n")
    (root / "short.h").write_text("int x;\n")
    (root / "huge.h").write_text("x" * (1 << 20) + "y")
    (root / "notes.xyz").write_text(long)
    (root / ".hidden" / "secret.h").write_text(long)
    return root


def test_source_folder_cuts_long_files_at_line_starts(sources: Path) -> None:
    notes: list[str] = []
    prompts = read_prompts(sources, PromptSettings(prompt_tokens=32), note=notes.append)
    assert "passed over: 2 binary, 1 empty, 1 huge, 1 too short" in notes[0]
    long = [p for p in prompts if "/long.h:" in p.id]
    assert len(long) == 8
    assert len({p.text for p in long}) == 8
    assert all(p.text and p.text.startswith("int value_") for p in long)
    lines = (sources / "long.h").read_text().splitlines(keepends=True)
    number = int(long[3].id.rsplit(":", 1)[1])
    assert (long[3].text or "").startswith(lines[number - 1])
    assert prompts == read_prompts(sources, PromptSettings(prompt_tokens=32))
    assert prompts != read_prompts(sources, PromptSettings(prompt_tokens=32), seed=1)


def test_suffixes_choose_the_files(sources: Path) -> None:
    ids = {p.id.split("/")[-1].split(":")[0] for p in read_prompts(sources, suffixes=(".xyz",))}
    assert ids == {"notes.xyz"}


def test_near_copies_do_not_crowd_out_the_rest(tmp_path: Path) -> None:
    body = "void same_beginning();\n" * 60
    for i in range(12):
        (tmp_path / f"copy{i}.h").write_text(f"// file {i}\n{body}int last_{i};\n")
    notes: list[str] = []
    assert len(read_prompts(tmp_path, PromptSettings(prompt_tokens=64), note=notes.append)) == 4
    assert "8 near-copies" in notes[0]


def test_source_folder_of_this_machine_gives_hundreds() -> None:
    import json as module

    settings = PromptSettings(limit=300, prompt_tokens=64)
    prompts = read_prompts(Path(module.__file__).parents[1], settings)
    assert len(prompts) == 300
    assert len({p.id for p in prompts}) == 300


@pytest.mark.parametrize("form", ["saved", "parquet file", "parquet folder"])
def test_local_datasets(form: str, tmp_path: Path) -> None:
    import datasets

    dataset = datasets.Dataset.from_list([{"question": "q1", "answer": "a"}, {"question": "q2"}])
    folder = tmp_path / "data"
    folder.mkdir()
    if form == "saved":
        datasets.DatasetDict({"train": dataset}).save_to_disk(str(folder))
    else:
        dataset.to_parquet(str(folder / "rows.parquet"))
    prompts = read_prompts(folder / "rows.parquet" if form == "parquet file" else folder)
    assert [p.split_key for p in prompts] == ["q1", "q2"]
    assert [p.answer for p in prompts] == [said("a"), None]


@pytest.mark.parametrize(
    ("source", "asked", "expected"),
    [
        ("owner/name", ("owner/name", None), "train"),
        ("owner/name@test", ("owner/name", None), "test"),
        ("owner/name:main@test", ("owner/name", "main"), "test"),
        ("name", ("name", None), "train"),
    ],
)
def test_hub_datasets(
    source: str, asked: tuple[str, str | None], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dataset id with and without configuration and split; the hub itself is played here."""
    import datasets

    seen: list[tuple[Any, ...]] = []

    def load_dataset(*arguments: Any) -> datasets.DatasetDict:
        seen.append(arguments)
        rows = {side: [{"prompt": f"{side} {i}"} for i in range(2)] for side in ("test", "train")}
        return datasets.DatasetDict(
            {side: datasets.Dataset.from_list(found) for side, found in rows.items()}
        )

    monkeypatch.setattr("bench.prompts.hub._reachable", lambda name: None)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    prompts = read_prompts(source)
    assert seen == [asked]
    assert [prompt.text for prompt in prompts] == [f"{expected} 0", f"{expected} 1"]
    assert prompts[1].id == f"{source}:2"
    with pytest.raises(UserError, match="has no split dev; found test, train"):
        read_prompts("owner/name@dev")

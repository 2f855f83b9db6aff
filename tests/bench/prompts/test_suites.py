"""Suites: what is in them, that their hashes mean their content, and how they are refused."""

from __future__ import annotations

import json
import os
import random
import socket
from collections import Counter
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from bench.prompts.read import read_prompts
from bench.prompts.suites import FOLDER_VARIABLE, MT_BENCH, SUITES, prompt_source, read_suite
from bench.records.arms import Arm
from bench.records.config import BenchConfig
from bench.records.settings import PromptSettings
from bench.report.provenance import settings_of
from drafts.errors import UserError
from tests.command import run_command
from tests.opened import no_target_at

DATA = Path(os.environ.get(FOLDER_VARIABLE) or Path(__file__).parents[4] / "shared" / "data")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise OSError("a test without a network")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)


def published(name: str) -> None:
    if not (DATA / SUITES[name].file).is_file():
        pytest.skip(f"no {SUITES[name].file} in {DATA}; set {FOLDER_VARIABLE}")


@pytest.mark.parametrize(
    ("name", "full", "turns"),
    [("spec-bench", 480, 560), ("mt-bench", 80, 160), ("humaneval", 164, 164),
     ("gsm8k", 1319, 1319)],
)  # fmt: skip
def test_published_suites(name: str, full: int, turns: int) -> None:
    published(name)
    whole = read_suite(f"suite:{name}@full", PromptSettings(suite_folder=DATA))
    assert len(whole.prompts) == full
    assert sum(1 + len(prompt.turns) for prompt in whole.prompts) == turns
    assert len({prompt.id for prompt in whole.prompts}) == full
    categories = Counter(prompt.category for prompt in whole.prompts)
    assert {name for name in categories if name} == set(SUITES[name].categories)
    assert len(set(categories.values())) == 1
    quick = read_suite(f"suite:{name}", PromptSettings(suite_folder=DATA))
    shares = Counter(prompt.category for prompt in quick.prompts)
    assert shares == dict.fromkeys(categories, SUITES[name].quick)
    assert {prompt.id for prompt in quick.prompts} < {prompt.id for prompt in whole.prompts}


def test_documents_are_passages_with_names_of_their_own() -> None:
    published("rust-rfcs")
    for side in ("train", "eval"):
        found = read_suite(
            "suite:rust-rfcs@full",
            PromptSettings(suite_folder=DATA, split=side, eval_fraction=0.25),
        )
        assert len(found.prompts) == 512
        assert len({prompt.id for prompt in found.prompts}) == 512
        assert all(prompt.id.startswith("rust-rfcs:") for prompt in found.prompts)


def test_a_suite_that_nobody_publishes_says_how_to_make_it(
    tmp_path: Path, no_network: None
) -> None:
    with pytest.raises(UserError, match="nobody publishes") as caught:
        read_suite("suite:rust-rfcs", PromptSettings(suite_folder=tmp_path))
    assert str(tmp_path / "rust_rfcs.jsonl.gz") in (caught.value.hint or "")


def test_mt_bench_is_a_task_of_spec_bench() -> None:
    published("spec-bench")
    published("mt-bench")
    alone = read_suite("suite:mt-bench@full", PromptSettings(suite_folder=DATA)).prompts
    task = read_suite("suite:spec-bench/mt_bench@full", PromptSettings(suite_folder=DATA)).prompts
    assert [(p.messages, p.turns) for p in task] == [(p.messages, p.turns) for p in alone]
    sides = [
        {
            p.split_key
            for p in read_suite(
                f"suite:{name}@full", PromptSettings(suite_folder=DATA, split="eval")
            ).prompts
        }
        for name in ("mt-bench", "spec-bench/mt_bench")
    ]
    assert sides[0] == sides[1]


def write_suite(folder: Path, rows: list[dict[str, Any]]) -> Path:
    file = folder / SUITES["mt-bench"].file
    file.parent.mkdir(parents=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def made_rows() -> list[dict[str, Any]]:
    return [
        {"category": category, "turns": [f"{category} question {i}", f"and then {i}?"]}
        for category in MT_BENCH
        for i in range(12)
    ]


def test_the_hash_is_of_the_content(tmp_path: Path) -> None:
    rows = made_rows()
    here, there = write_suite(tmp_path / "here", rows), write_suite(tmp_path / "there", rows)
    changed = json.loads(json.dumps(rows))
    changed[5]["turns"][1] += "!"
    other = write_suite(tmp_path / "other", changed)
    for size in ("quick", "full"):
        source = f"suite:mt-bench@{size}"
        assert (
            read_suite(source, PromptSettings(suite_folder=here)).sha256
            == read_suite(source, PromptSettings(suite_folder=there)).sha256
        )
    found = read_suite("suite:mt-bench@full", PromptSettings(suite_folder=other))
    assert (
        found.sha256 != read_suite("suite:mt-bench@full", PromptSettings(suite_folder=here)).sha256
    )
    quick, full = (
        read_suite(f"suite:mt-bench@{size}", PromptSettings(suite_folder=here))
        for size in ("quick", "full")
    )
    assert quick.sha256 != full.sha256


def test_quick_is_chosen_by_content_and_not_by_place(tmp_path: Path) -> None:
    rows = made_rows()
    mixed = rows[:]
    random.Random(0).shuffle(mixed)
    one, other = (
        read_suite(
            "suite:mt-bench", PromptSettings(suite_folder=write_suite(tmp_path / name, order))
        ).prompts
        for name, order in (("one", rows), ("other", mixed))
    )
    assert Counter(p.category for p in one) == dict.fromkeys(MT_BENCH, 4)
    assert {p.split_key for p in one} == {p.split_key for p in other}
    assert [p.split_key for p in one] != [p.split_key for p in other]
    first_four = {row["turns"][0] for i, row in enumerate(rows) if i % 12 < 4}
    assert {p.split_key for p in one} != first_four


def test_sides_share_nothing_and_miss_nothing(tmp_path: Path) -> None:
    folder = write_suite(tmp_path / "data", made_rows())
    train, held, whole = (
        {
            p.split_key
            for p in read_suite(
                "suite:mt-bench@full", PromptSettings(suite_folder=folder, split=side)
            ).prompts
        }
        for side in ("train", "eval", None)
    )
    assert not train & held
    assert train | held == whole
    assert held


@pytest.mark.parametrize("name", ["builtin", "code"])
def test_built_in_suites_need_no_network(name: str, no_network: None) -> None:
    quick, full = (read_suite(f"suite:{name}@{size}") for size in ("quick", "full"))
    shares = Counter(prompt.category for prompt in quick.prompts)
    assert len(shares) >= 3
    assert None not in shares
    assert set(shares.values()) == {SUITES[name].quick}
    assert len(full.prompts) > len(quick.prompts)
    assert any(prompt.turns for prompt in full.prompts) == (name == "builtin")
    assert not any(Path(prompt.id.split(":")[1]).is_absolute() for prompt in full.prompts)


def test_a_suite_is_a_source_of_prompts() -> None:
    prompts = read_prompts("suite:builtin/code@full", PromptSettings(limit=3))
    assert len(prompts) == 3
    assert {prompt.category for prompt in prompts} == {"code"}


def test_settings_name_the_suite() -> None:
    config = BenchConfig(
        target=no_target_at(Path("t")), prompts="suite:builtin/chat", arms=(Arm("none"),)
    )
    suite = read_suite("suite:builtin/chat")
    assert settings_of(config, [[1]])["suite"] == {
        "name": "builtin/chat", "size": "quick", "split": None, "sha256": suite.sha256,
    }  # fmt: skip
    assert "suite" not in settings_of(config.model_copy(update={"prompts": "file"}), [[1]])


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("suite:nonsense", "spec-bench"),
        ("suite:", "no such suite"),
        ("suite:builtin/poems", "chat"),
        ("suite:spec-bench/poems", "mt_bench"),
        ("suite:builtin@tiny", "quick or full"),
    ],
)
def test_unknown_names_are_refused(source: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_prompts(source)


def test_a_missing_file_is_named(no_network: None, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read_suite("suite:spec-bench", PromptSettings(suite_folder=tmp_path))
    assert str(tmp_path / "spec_bench" / "question.jsonl") in str(caught.value)
    with pytest.raises(UserError, match="no such folder"):
        read_suite("suite:spec-bench", PromptSettings(suite_folder=tmp_path / "nowhere"))


def test_a_published_file_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    folder = write_suite(tmp_path, made_rows())
    handler = partial(QuietHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/{SUITES['mt-bench'].file}"
        there = replace(
            SUITES["mt-bench"], name="published", origin=address, file="published.jsonl"
        )
        monkeypatch.setitem(SUITES, "published", there)
        fetched = read_suite("suite:published")
        server.shutdown()
    assert fetched.where == address
    assert (
        fetched.sha256 == read_suite("suite:mt-bench", PromptSettings(suite_folder=folder)).sha256
    )


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


def test_bad_rows_name_file_and_line(tmp_path: Path) -> None:
    folder = write_suite(tmp_path, [{"turns": ["a", "b"]}, {"turns": ["a", ""]}])
    with pytest.raises(UserError, match=r'question\.jsonl:2: "turns"\[1\] is empty'):
        read_suite("suite:mt-bench", PromptSettings(suite_folder=folder))


def test_prompts_or_suite() -> None:
    assert prompt_source(None, "mt-bench/math", "full") == "suite:mt-bench/math@full"
    assert prompt_source("file.jsonl", None, None) == "file.jsonl"
    for arguments in (("file", "builtin", None), (None, None, None), ("file", None, "full")):
        with pytest.raises(UserError):
            prompt_source(*arguments)
    code, error = run_command("bench", "embedded", "--prompts", "x.jsonl", "--suite", "builtin")
    assert code == 2
    assert "not both" in error


def test_the_list_says_what_is_here(
    no_network: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_suite(tmp_path, made_rows())
    code, _ = run_command("suites", "--json", "--suite-folder", folder)
    assert code == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(rows) == set(SUITES)
    assert not rows["gsm8k"]["here"]
    assert not rows["rust-rfcs"]["here"]
    found = rows["mt-bench"]
    assert found["where"] == str(folder / SUITES["mt-bench"].file)
    assert found["sizes"]["quick"]["requests"] == 2 * found["sizes"]["quick"]["prompts"] == 64
    assert (
        found["sizes"]["full"]["sha256"]
        == read_suite("suite:mt-bench@full", PromptSettings(suite_folder=folder)).sha256
    )

"""The report's schema, its page and its plots, and that a kill leaves whole files only."""

from __future__ import annotations

import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from bench.records.arms import Arm
from bench.records.run import ArmRun
from bench.records.speeds import DECODE
from bench.report.build import build_report
from bench.report.console import render_table
from bench.report.csv import csv_rows
from bench.report.files import read_report, write_report
from bench.report.page import render_page
from bench.report.schema import Report
from bench.report.words import also, headline, table_rows
from drafts.errors import UserError
from serving.metrics import SpecCounters
from tests.bench.synthetic import ARMS, PROMPTS, K, arm_run, report, settings
from tests.opened import no_draft_at

FIGURES = ("acceptance_length", "acceptance_rate", DECODE.rate, DECODE.speedup)
PLOTS = (
    "acceptance_length",
    "per_position",
    "conditional",
    "accepted_per_step",
    "per_request",
    DECODE.rate,
    DECODE.speedup,
    "latency",
    "training",
)
VOID = {"meta", "link", "br", "img", "hr", "input"}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Path]:
    """A report of made-up arms, and the folder it was written to."""
    folder = tmp_path_factory.mktemp("bench") / "run"
    made = report("<script>alert('prompts & more')</script>")
    write_report(made, folder)
    return made, folder


def is_figure(value: object) -> bool:
    return isinstance(value, dict) and set(value) == {"value", "low", "high"}


def test_schema(written: tuple[Report, Path]) -> None:
    content = json.loads((written[1] / "report.json").read_text())
    assert content["schema"] == "afaspec-report/3"
    assert [arm["name"] for arm in content["arms"]] == list(ARMS)
    for arm in content["arms"]:
        drafted = arm["name"] != "none"
        for name in FIGURES:
            assert is_figure(arm[name]) == (drafted or "acceptance" not in name)
            if arm[name]:
                assert arm[name]["low"] <= arm[name]["value"] <= arm[name]["high"]
        for name in ("per_position", "conditional"):
            assert arm[name] is None if not drafted else len(arm[name]) == K
        assert arm["lossless"]["prompts"] == PROMPTS
        assert {"k", "temperature", "target", "draft", "method"} <= set(arm["provenance"])
    base = content["arms"][2]
    assert is_figure(base["offline_acceptance_length"])
    assert base["offline_acceptance_length"]["value"] == base["acceptance_length"]["value"]
    assert base["lossless"]["matching"] == PROMPTS - 1
    assert base["lossless"]["differences"][0]["gap"] == 0.01


def test_figures_follow_from_the_data(written: tuple[Report, Path]) -> None:
    """Time is one step per draft here, so speedup must equal acceptance length."""
    made, _ = written
    assert made.arm("none")[DECODE.speedup]["value"] == 1.0
    for name in ("ngram", "base", "afa-lora"):
        arm = made.arm(name)
        measured = sum(arm["per_position"][i]["value"] for i in range(K))
        assert arm["acceptance_length"]["value"] == pytest.approx(1 + measured)
        assert arm["acceptance_rate"]["value"] == pytest.approx(measured / K)
        speed = arm[DECODE.speedup]["value"] * made.arm("none")[DECODE.rate]["value"]
        assert arm[DECODE.rate]["value"] == pytest.approx(speed)
    gain = made.arm("afa-lora")["acceptance_length_gain_over_base"]
    lengths = [made.arm(name)["acceptance_length"]["value"] for name in ("afa-lora", "base")]
    assert gain["value"] == pytest.approx(lengths[0] - lengths[1])
    assert gain["low"] > 0


def test_reading_back(written: tuple[Report, Path], tmp_path: Path) -> None:
    made, folder = written
    again = read_report(folder / "report.json")
    assert again.as_json() == made.as_json()
    (tmp_path / "other.json").write_text('{"schema": "other/2"}')
    with pytest.raises(UserError, match="expected 'afaspec-report/3'"):
        read_report(tmp_path / "other.json")


class Page(HTMLParser):
    """Collects whatever a browser might fetch, and checks that elements close."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "iframe", "object", "embed")
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "srcset", "data", "poster"):
                self.fetched.append(value or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_self_contained(written: tuple[Report, Path]) -> None:
    text = (written[1] / "report.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert page.open == []
    assert all(link.startswith(("#", "data:")) for link in page.fetched)
    assert "@import" not in text
    assert not re.search(r"url\((?!['\"]?(#|data:))", text)
    assert text.count("<svg ") == text.count("</title>") - 1 == len(PLOTS)
    assert "prefers-color-scheme: dark" in text
    assert "&lt;script&gt;" in text  # what users hand over is text, never markup


def test_page_says_the_main_things_first(written: tuple[Report, Path]) -> None:
    text = render_page(written[0])
    order = [
        "The AFA-LoRA draft decodes",
        "near-tie",
        "<table",
        "<svg",
        "Where outputs differ",
        "How it was measured",
    ]
    assert [text.index(part) for part in order] == sorted(text.index(part) for part in order)


def test_words_and_table(written: tuple[Report, Path]) -> None:
    arms = written[0].arms
    assert "1 differs from the one without speculation, at a measured near-tie" in also(arms)
    assert headline(arms).startswith("The AFA-LoRA draft decodes 2.")
    rows = table_rows(arms)
    assert [row[0].text for row in rows] == [
        "No speculation",
        "N-gram",
        "Base draft",
        "AFA-LoRA",
    ]
    assert rows[2][6].text == f"{PROMPTS - 1} of {PROMPTS}"
    assert rows[2][6].detail == "1 near-tie"
    assert [row[1].best for row in rows] == [False, False, False, True]
    assert render_table(written[0]).row_count == len(ARMS)


def test_tokens_per_step_count_every_step_and_what_answers_kept() -> None:
    """N-gram drafted at 10 of 100 steps and accepted 24: 1.24 a step, not 3.40. Another draft's
    last step accepted 3 tokens that an answer of 12 had no room for: 12 tokens of 7 steps."""

    def run_of(name: str, drafts: int, accepted: tuple[int, ...], kept: int) -> ArmRun:
        counters = SpecCounters(drafts, drafts * K, sum(accepted), accepted)
        run = ArmRun(Arm(name, no_draft_at(Path(name))), {"method": "any"})
        run.outputs, run.kept, run.tokens = [[[1] * (kept + 1)] * 2], [[kept] * 2], [[kept] * 2]
        run.seconds, run.prefill_seconds, run.counters = [[1.0] * 2], [[0.1] * 2], [[counters] * 2]
        return run

    runs = [run_of("ngram", 10, (10, 8, 6), 124), run_of("base", 7, (4, 2, 2), 12)]
    common = settings()
    made = build_report(
        runs, common=common, provenance={run.arm.name: {**common, **run.engine} for run in runs},
        prompts=["a", "b"], ks={"ngram": K, "base": K}, differences=None, noise=None,
    )  # fmt: skip
    ngram, base = made.arms
    assert ngram["acceptance_length"]["value"] == pytest.approx(3.4)
    assert ngram["tokens_per_step"]["value"] == pytest.approx(1.24)
    assert base["acceptance_length"]["value"] == pytest.approx(15 / 7)
    assert base["tokens_per_step"]["value"] == pytest.approx(12 / 7)
    assert headline([ngram]).startswith("N-gram yields 1.24 tokens per target step")
    assert "acceptance length 3.40" in headline([ngram])


def test_an_unexplained_difference_is_said_plainly() -> None:
    from dataclasses import replace

    from bench.lossless.greedy import Difference

    wrong = replace(Difference("prompt 1", 3, 5, 6, 2.5), near_tie=False)
    made = report(differences={"ngram": [], "base": [wrong], "afa-lora": []})
    assert "not at a near-tie" in also(made.arms)
    assert table_rows(made.arms)[2][6].detail == "1 unexplained"


def test_sampled_runs_have_no_losslessness() -> None:
    made = report(differences=None, noise=None, training={}, offline={})
    assert all(arm["lossless"] is None for arm in made.arms)
    assert "Where outputs differ" not in render_page(made)


def test_plots_are_pictures(written: tuple[Report, Path]) -> None:
    pictures = sorted(path.name for path in written[1].glob("*.png"))
    assert pictures == sorted(f"{stem}.png" for stem in PLOTS)
    for name in pictures:
        data = (written[1] / name).read_bytes()
        assert data.startswith(b"\x89PNG")
        assert data.endswith(b"IEND\xaeB`\x82")


WRITER = """
import os, sys
from pathlib import Path
from bench.report.files import write_report
from tests.bench.synthetic import report
made = [report("first"), report("second")]
for _ in sys.stdin:
    child = os.fork()
    while child == 0:
        for one in made:
            write_report(one, Path(sys.argv[1]))
    print(child, flush=True)
    os.waitpid(child, 0)
    print("ended", flush=True)
"""


def test_a_kill_leaves_whole_files_only(tmp_path: Path) -> None:
    chance = random.Random(0)
    seen = 0
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[3],
        text=True,
        bufsize=1,
    ) as writers:
        assert writers.stdin is not None
        assert writers.stdout is not None
        for _ in range(6):
            print("next", file=writers.stdin)
            writer = int(writers.stdout.readline())
            time.sleep(chance.uniform(0.5, 3))
            os.kill(writer, signal.SIGKILL)
            assert writers.stdout.readline() == "ended\n"
            for path in [*tmp_path.glob("*.json")]:
                json.loads(path.read_text(encoding="utf-8"))
                seen += 1
            for path in tmp_path.glob("*.html"):
                assert path.read_text(encoding="utf-8").rstrip().endswith("</html>")
            for path in tmp_path.glob("*.png"):
                if not path.name.startswith("."):
                    assert path.read_bytes().endswith(b"IEND\xaeB`\x82")
        writers.stdin.close()
    assert seen > 0


KEPT = (("base", 0.5), ("afa-lora", 0.45))  # the chance that a draft is accepted there


def test_what_was_kept_on_general_prompts() -> None:
    found = {name: arm_run(name, seed=7, chance=chance).acceptance(K) for name, chance in KEPT}
    made = report(general=found)
    assert made.arm("ngram")["general"] is None
    base, mine = made.arm("base")["general"], made.arm("afa-lora")["general"]
    assert (base["prompts"], base["kept"]) == (PROMPTS, None)
    lengths = [figures["acceptance_length"]["value"] for figures in (mine, base)]
    assert mine["kept"]["value"] == pytest.approx(lengths[0] / lengths[1])
    assert mine["kept"]["low"] < mine["kept"]["value"] < mine["kept"]["high"]

    with_it, without = table_rows(made.arms), table_rows(report().arms)
    assert [row[:-1] for row in with_it] == without
    share = f"{100 * mine['kept']['value']:.1f}%"
    assert [row[-1].text for row in with_it] == ["–", "–", "–", share]
    assert f"general prompts AFA-LoRA keeps {share}." in also(made.arms)
    assert "general prompts" not in also(report().arms)
    assert "General kept" in render_page(made)
    rows = {(row["arm"], row["measure"]): row for row in csv_rows(made)}
    assert rows["afa-lora", "general_kept"]["low"] == mine["kept"]["low"]
    assert rows["base", "general_acceptance_length"]["value"] == lengths[1]
    assert ("base", "general_kept") not in rows

    shown = Console(width=80, record=True, file=io.StringIO())
    shown.print(render_table(made))
    text = shown.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    ends = [f"{100 * mine['kept'][end]:.1f}" for end in ("low", "high")]
    assert f"{ends[0]}–{ends[1]}%" in text
    assert "rate" not in text  # it gives way

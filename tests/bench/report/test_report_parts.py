"""What schema 2 adds: categories, histograms, latencies, CSV; and that schema 1 still reads."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel, ConfigDict
from rich.console import Console

from bench.records.speeds import DECODE
from bench.report.build import build_report
from bench.report.console import render_table
from bench.report.csv import FIGURES, write_csv
from bench.report.files import read_report
from bench.report.html import TEMPLATES, PageTable
from bench.report.page import render_page
from bench.report.provenance import command_line
from bench.report.schema import Report
from bench.runs.saved import read_run
from tests.bench.synthetic import (
    CATEGORIES,
    KINDS,
    LOADS,
    PROMPTS,
    ROUNDS,
    STEP_SECONDS,
    TOKENS,
    K,
    arm_run,
    as_before,
    report,
    report_of_everything,
    settings,
)


@pytest.fixture(scope="module")
def everything() -> Report:
    return report_of_everything()


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Figure(Strict):
    value: float | None
    low: float | None
    high: float | None


class Spread(Strict):
    mean: float
    p50: float
    p90: float
    p99: float


class Latency(Strict):
    ttft_ms: Spread | None
    tpot_ms: Spread | None
    itl_ms: Spread | None
    e2e_ms: Spread | None
    requests: int
    failed: int


class Category(Strict):
    prompts: int
    acceptance_length: Figure | None
    acceptance_rate: Figure | None
    decode_tokens_per_second: Figure | None
    decode_speedup: Figure | None
    throughput_tokens_per_second: Figure | None
    throughput_speedup: Figure | None
    request_tokens_per_second: Figure | None
    request_speedup: Figure | None


class AcceptedLengths(Strict):
    per_step: list[int]
    per_request: list[float | None]


class Lossless(Strict):
    matching: int
    prompts: int
    not_comparable: int
    near_ties: int
    examined: int
    differences: list[dict[str, Any]]


class General(Strict):
    prompts: int
    acceptance_length: Figure
    kept: Figure | None


class ArmObject(Strict):
    """Every arm in process has these keys; a server's has more, and arms trained from base too."""

    model_config = ConfigDict(extra="allow")
    name: str
    label: str
    acceptance_length: Figure | None
    acceptance_rate: Figure | None
    tokens_per_step: Figure | None
    per_position: list[Figure] | None
    conditional: list[Figure] | None
    accepted_lengths: AcceptedLengths | None
    offline_acceptance_length: Figure | None
    general: General | None
    speed: str
    decode_tokens_per_second: Figure
    decode_speedup: Figure | None
    throughput_tokens_per_second: None
    throughput_speedup: None
    request_tokens_per_second: None
    request_speedup: None
    prefill_ms: Figure | None
    latency: Latency | None
    categories: dict[str, Category] | None
    lossless: Lossless | None
    distribution: dict[str, Any] | None
    repeatable: bool | None
    provenance: dict[str, Any]


class ComparisonObject(Strict):
    arm: str
    against: str
    metric: str
    difference: Figure
    relative: Figure
    p_value: float
    p_holm: float
    among: int
    verdict: str
    words: str


class LoadStep(Strict):
    concurrency: int
    arms: list[ArmObject]


class ReportObject(Strict):
    schema_: str
    arms: list[ArmObject]
    comparisons: list[ComparisonObject]
    load: list[LoadStep] | None
    numerical_noise: dict[str, Any] | None
    training: dict[str, Any]
    example: dict[str, str] | None
    provenance: dict[str, Any]


def test_the_json_is_what_the_schema_says(everything: Report) -> None:
    content = json.loads(json.dumps(everything.as_json(), allow_nan=False))
    ReportObject.model_validate({"schema_": content.pop("schema"), **content})


def test_a_category_is_a_report_of_its_prompts(everything: Report) -> None:
    """Its figures equal those of a run that measured only them, and weigh up to the whole."""
    for name in ("base", "afa-lora"):
        arm = everything.arm(name)
        assert list(arm["categories"]) == list(KINDS)
        run = arm_run(name)
        for kind, found in arm["categories"].items():
            rows = [i for i, category in enumerate(CATEGORIES) if category == kind]
            counters = [run.counters[0][i] for i in rows]
            drafts = sum(c.drafts for c in counters)
            length = 1 + sum(c.accepted_tokens for c in counters) / drafts
            seconds = sum(run.seconds[r][i] for r in range(ROUNDS) for i in rows)
            assert found["prompts"] == len(rows)
            assert found["acceptance_length"]["value"] == pytest.approx(length)
            speed = found[DECODE.rate]["value"]
            assert speed == pytest.approx(ROUNDS * len(rows) * TOKENS / seconds)
            figure = found[DECODE.speedup]
            assert figure["low"] < figure["value"] < figure["high"]
            plain = everything.arm("none")["categories"][kind]
            assert plain["acceptance_length"] is None
            assert figure["value"] == pytest.approx(speed / plain[DECODE.rate]["value"])


def test_prompts_without_a_category_are_others_and_one_prompt_has_no_interval() -> None:
    made = report(categories=["code", *[None] * (PROMPTS - 1)])
    found = made.arm("base")["categories"]
    assert {name: entry["prompts"] for name, entry in found.items()} == {
        "code": 1,
        "other": PROMPTS - 1,
    }
    assert found["code"]["acceptance_length"]["low"] is None
    assert report(categories=[None] * PROMPTS).arm("base")["categories"] is None
    by_category = re.search("<h2>By category</h2>.*?</section>", render_page(made), flags=re.DOTALL)
    assert by_category is not None
    assert by_category.group().count("<table") == 2


def test_requests_that_ran_together_have_no_latency_and_no_speed_by_category() -> None:
    runs = [arm_run(name) for name in ("none", "base")]
    for run in runs:  # four prompts at once: a time per block
        for table in (run.tokens, run.seconds):
            table[:] = [list(np.reshape(row, (-1, 4)).sum(axis=1)) for row in table]
    common = {**settings(), "concurrency": 4}
    made = build_report(
        runs, common=common, provenance={r.arm.name: {**common, **r.engine} for r in runs},
        prompts=[str(i) for i in range(PROMPTS)], ks={"none": K, "base": K}, differences=None,
        noise=None, offline={}, training={}, categories=CATEGORIES,
    )  # fmt: skip
    base = made.arm("base")
    assert base["latency"] is None
    assert base["categories"]["code"][DECODE.speedup] is None
    assert base["categories"]["code"]["acceptance_length"]["value"] > 1
    assert base[DECODE.speedup]["value"] > 1


def test_histograms_add_up(everything: Report) -> None:
    run = arm_run("base")
    counters = [c for row in run.counters for c in row if c is not None]
    spread = everything.arm("base")["accepted_lengths"]
    assert sum(spread["per_step"]) == sum(c.drafts for c in counters)
    accepted = sum(tokens * steps for tokens, steps in enumerate(spread["per_step"]))
    assert accepted == sum(c.accepted_tokens for c in counters)
    lengths = [1 + c.accepted_tokens / c.drafts for c in counters[:PROMPTS]]
    assert spread["per_request"] == pytest.approx(lengths)
    assert everything.arm("none")["accepted_lengths"] is None


def test_latencies_of_requests_that_ran_alone(everything: Report) -> None:
    run, found = arm_run("base"), everything.arm("base")["latency"]
    seconds = np.array(run.seconds).ravel()
    assert found["ttft_ms"]["p99"] == pytest.approx(20)
    assert found["tpot_ms"]["mean"] == pytest.approx(1000 * seconds.mean() / TOKENS)
    assert found["e2e_ms"]["p90"] == pytest.approx(20 + 1000 * np.percentile(seconds, 90))
    assert found["itl_ms"] is None
    assert found["requests"] == ROUNDS * PROMPTS
    assert found["tpot_ms"]["p50"] < 1000 * STEP_SECONDS  # more than a token a step


def test_comparisons_find_what_was_planted(everything: Report) -> None:
    found = {(c["arm"], c["against"], c["metric"]): c for c in everything.comparisons}
    assert set(found) == {
        ("ngram", "none", DECODE.speedup),
        ("base", "none", DECODE.speedup),
        ("afa-lora", "none", DECODE.speedup),
        ("afa-lora", "base", "acceptance_length"),
        ("afa-lora", "base", DECODE.rate),
    }
    assert all(c["verdict"] == "higher" for c in found.values())
    gain = everything.arm("afa-lora")["acceptance_length_gain_over_base"]
    longer = found["afa-lora", "base", "acceptance_length"]["difference"]
    assert longer["value"] == pytest.approx(gain["value"])


def test_the_csv_equals_the_json(everything: Report, tmp_path: Path) -> None:
    path = write_csv(everything, tmp_path / "report.csv")
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    values = {
        (r["arm"], r["against"], r["load"], r["category"], r["measure"]): [
            float(r[end]) if r[end] else None for end in ("value", "low", "high")
        ]
        for r in rows
    }
    assert len(values) == len(rows)

    def ends(figure: dict[str, float]) -> list[float]:
        return [figure["value"], figure["low"], figure["high"]]

    for arm in everything.arms:
        for measure in FIGURES:
            key = (arm["name"], "", "", "", measure)
            assert (key in values) == (arm.get(measure) is not None)
            if arm.get(measure):
                assert values[key] == ends(arm[measure])
    base = everything.arm("base")
    third = base["per_position"][2]
    assert values["base", "", "", "", "per_position_3"] == ends(third)
    by_kind = base["categories"]["math"][DECODE.speedup]
    assert values["base", "", "", "math", DECODE.speedup] == ends(by_kind)
    assert values["base", "", "", "", "tpot_p90_ms"][0] == base["latency"]["tpot_ms"]["p90"]
    steps = base["accepted_lengths"]["per_step"]
    assert [values["base", "", "", "", f"steps_accepting_{n}"][0] for n in range(K + 1)] == steps
    loaded = everything.load[-1]["arms"][2][DECODE.rate]
    assert values["base", "", f"concurrency={LOADS[-1]}", "", DECODE.rate] == ends(loaded)
    longer = ("afa-lora", "base", "", "", "acceptance_length_difference")
    assert values[longer][1] > 0


def test_reports_of_schema_1_read_and_render(tmp_path: Path) -> None:
    """A report as this package wrote it before: without the new keys, and with no measurements."""
    content = as_before(report(), "afaspec-report/1")
    (tmp_path / "report.json").write_text(json.dumps(content))
    old = read_run(tmp_path).report
    assert old.comparisons == []
    assert old.load is None
    assert old.arm("base")["categories"] is None
    assert old.measurements == {}
    assert old.as_json()["schema"] == "afaspec-report/3"
    assert old.arm("base")[DECODE.speedup] == report().arm("base")[DECODE.speedup]
    assert "Speed and latency" in render_page(old)
    assert write_csv(old, tmp_path / "report.csv").stat().st_size > 1000


def test_a_report_of_schema_2_says_what_it_said(everything: Report, tmp_path: Path) -> None:
    everything = replace(everything, load=None)
    content = as_before(everything, "afaspec-report/2")
    (tmp_path / "report.json").write_text(json.dumps(content))
    measured = everything.measurements
    arms = {
        name: {{"tokens": "decode_tokens", "seconds": "decode_seconds"}.get(key, key): value
               for key, value in arm.items()}
        for name, arm in measured["arms"].items()
    }  # fmt: skip
    (tmp_path / "measurements.json").write_text(json.dumps({**measured, "arms": arms}))
    old = read_run(tmp_path).report
    assert old.as_json() == json.loads(json.dumps(everything.as_json()))
    assert old.measurements == json.loads(json.dumps(measured))


def test_every_section_is_on_the_page_and_none_twice(everything: Report) -> None:
    text = render_page(everything)
    headings = re.findall(r"<h2>(.*?)</h2>", text)
    assert headings == [
        "By category",
        "Acceptance in detail",
        "Speed and latency",
        "Under load",
        "Training",
        "Where outputs differ",
        "Sampling at temperature",
        "How it was measured",
    ]
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert "1 of 96 requests failed" in text
    for row in re.findall(r"<table class='result'>.*?</table>", text, flags=re.DOTALL):
        assert "scope='col'" in row
        assert "scope='row'" in row


def test_reading_an_unfinished_folder_is_a_clear_error(tmp_path: Path) -> None:
    from drafts.errors import UserError

    with pytest.raises(UserError, match="no such file"):
        read_run(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        read_report(tmp_path / "report.json")


def test_only_long_texts_break_inside_words() -> None:
    content = PageTable(("Prompt", "Position"), [["a/path/that/is/rather/long.h:7", "17"]])
    table = TEMPLATES.get_template("macros.html").module.plain_table(content)
    assert "<td class='long'>a/path/that" in table
    assert "<td>17</td>" in table


def test_a_terminal_of_80_columns_loses_nothing(everything: Report) -> None:
    """Nor does a narrower one: cells are folded, never cut."""
    for width in (80, 60):
        console = Console(width=width, file=io.StringIO(), color_system=None)
        console.print(render_table(everything))
        text = console.file.getvalue()  # type: ignore[attr-defined]
        assert "…" not in text
        if width == 80:
            for arm in everything.arms:
                for key in (DECODE.rate, "acceptance_length"):
                    if figure := arm[key]:
                        form = "{:,.1f}" if key == DECODE.rate else "{:.2f}"
                        ends = [form.format(figure[end]) for end in ("low", "high")]
                        assert "–".join(ends) in text


def test_the_command_is_told_without_what_headers_say(monkeypatch: pytest.MonkeyPatch) -> None:
    here, header = str(Path.cwd() / "runs" / "a b"), "X-Token: secret"
    given = ["bench", f"base={here}", "--header", header, f"--header={header}", "--k", "3"]
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/afaspec", *given])
    said = command_line()
    assert said == (
        "afaspec bench 'base=runs/a b' --header 'X-Token: ...' '--header=X-Token: ...' --k 3"
    )
    monkeypatch.setattr("sys.argv", ["pytest", *given])
    assert command_line() is None

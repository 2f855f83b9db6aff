"""Every kind of page in a real browser, at two widths, in light and dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from afaspec.compare.page import render_study
from afaspec.compare.study import read_study
from bench.report.html import write_page
from bench.report.page import render_page
from bench.runs.compare import compare_runs
from bench.runs.page import render_comparison
from bench.runs.saved import SavedRun
from bench.server.arrivals import Load
from bench.sweep.page import render_page as render_sweep
from bench.sweep.report import build_sweep
from tests.bench.server.test_report import pair, report_of
from tests.bench.sweep.made_cells import Truth, make_cell
from tests.bench.synthetic import report, report_of_everything
from tests.browser import browser, find_browser, look, require_shown_well

STUDY = Path(__file__).parents[1] / "docs" / "study" / "main.json.gz"
WORD = "averylongwordwithoutanyplacetobreakit" * 8


def of_everything() -> str:
    made = report_of_everything()
    example = {"id": "prompt 0", "prompt": f"def f(x):\n    {WORD}", "answer": "<b>no markup</b>"}
    made.arms[2]["label"] = WORD[:70]
    long = {**made.provenance, "command": f"afaspec bench --prompts {WORD}"}
    return render_page(replace(made, example=example, provenance=long))


def of_servers() -> str:
    return render_page(report_of(*(pair(Load(rate=rate)) for rate in (2.0, 4.0, math.inf))))


def of_two_runs() -> str:
    runs = [SavedRun(name, Path(name), report()) for name in ("before", WORD[:60])]
    return render_comparison(compare_runs(runs))


def of_a_sweep() -> str:
    results = [make_cell(k, load, Truth(per_drafted_token=1e-3)) for k in (1, 3) for load in (1, 2)]
    about = {"rounds": 3, "prompts": 16, "dtype": "bfloat16", "time": "now"}
    return render_sweep(build_sweep(results, about))


def of_a_study() -> str:
    return render_study(read_study(STUDY))


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    if find_browser() is None:
        pytest.skip("no Chromium here")
    with browser() as found:
        yield found


@pytest.mark.parametrize("page", [of_everything, of_servers, of_two_runs, of_a_sweep, of_a_study])
def test_a_page_is_seen_whole_and_asks_for_nothing(
    page: Callable[[], str], address: str, tmp_path: Path
) -> None:
    require_shown_well(address, write_page(page(), tmp_path / "page.html"))


BAD = """<!doctype html><body style="background: white"><p style="width: 900px">wide</p>
<img src="picture.png"><script>console.error("wrong")</script></body>"""


def test_a_page_that_is_wrong_is_found(address: str, tmp_path: Path) -> None:
    (tmp_path / "bad.html").write_text(BAD)
    seen = look(address, tmp_path / "bad.html", 390)
    assert any("P " in element for element in seen.beyond)
    assert any(url.endswith("picture.png") for url in seen.requests)
    assert len(seen.errors) >= 1
    with pytest.raises(AssertionError):
        require_shown_well(address, tmp_path / "bad.html")

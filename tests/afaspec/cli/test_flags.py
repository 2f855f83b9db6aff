"""Flags made from a configuration: names, values, the file below them, and the help page."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from pydantic import AliasChoices, Field, field_validator

from afaspec.cli import MODULES
from afaspec.cli.flags import configured, metavar
from afaspec.config import flag_of, load_config, settings
from bench.records.settings import Settings
from drafts.errors import UserError

CONFIGS = {  # what each command is made from
    "capture": "afaspec.capture.config.CaptureConfig",
    "copy": "afaspec.cli.adapt.copy.CopyConfig",
    "train": "afaspec.train.config.TrainConfig",
    "merge": "afaspec.cli.adapt.merge.MergeConfig",
    "plan": "afaspec.planning.config.PlanConfig",
    "compare": "afaspec.cli.adapt.compare.StudyConfig",
    "serve": "afaspec.cli.live.serve.ServeConfig",
    "swap": "afaspec.cli.live.swap.SwapConfig",
    "watch": "afaspec.cli.live.watch.WatchConfig",
    "loop": "afaspec.cli.live.loop.LoopCommand",
    "collect": "afaspec.cli.live.collect.CollectConfig",
    "traffic": "afaspec.cli.live.traffic.TrafficConfig",
    "bench": "afaspec.cli.measure.bench.BenchCommand",
    "report": "afaspec.cli.measure.report.ReportConfig",
    "sweep": "afaspec.cli.measure.sweep.SweepCommand",
    "tune": "afaspec.cli.measure.tune.TuneConfig",
    "what-if": "afaspec.cli.measure.what_if.WhatIfConfig",
    "suites": "afaspec.cli.measure.suites.SuitesConfig",
    "inspect": "afaspec.cli.draft.inspect.InspectConfig",
    "convert": "afaspec.cli.draft.convert.ConvertConfig",
    "init": "afaspec.checkpoints.config.InitConfig",
    "build-embedded": "afaspec.pretrain.config.BuildConfig",
    "demo": "afaspec.demo.config.DemoConfig",
    "doctor": "afaspec.cli.doctor.DoctorConfig",
}
SHORT = {"target.minutes": "--minutes", "target.tokens": "--tokens"}  # of build-embedded


class Inner(Settings):
    GROUP: ClassVar[str] = "Inner settings"

    shape: Literal["round", "flat"] = Field("round", description="how it looks")


class Base(Settings):
    GROUP: ClassVar[str] = "Basic settings"

    place: Path = Field(description="where it lies")
    size: int = Field(3, ge=1, le=9, description="how large [it] is")
    tokens: int = Field(
        1, validation_alias=AliasChoices("tokens", "new_tokens"), description="how many"
    )


class Config(Base):
    files: list[str] = Field([], description="what is read")
    fast: bool = Field(True, description="hurry")
    values: tuple[int, ...] = Field((1, 2), validation_alias="value", description="an axis")
    inner: Inner = Inner()

    @field_validator("values", mode="before")
    @classmethod
    def _listed(cls, given: Any) -> Any:
        return tuple(given.split(",")) if isinstance(given, str) else given

    @field_validator("values")
    @classmethod
    def _some(cls, values: tuple[int, ...]) -> tuple[int, ...]:
        if sum(values) > 9:
            raise UserError("the values are too many", hint="give fewer")
        return values


def run(*arguments: str) -> Config:
    """The configuration that the command line means."""
    import typer

    seen: list[Config] = []
    app = typer.Typer(add_completion=False)
    app.command()(configured(Config, arguments=("place", "files"))(seen.append))
    app(list(arguments), standalone_mode=False)
    return seen[0]


def test_every_kind_of_setting() -> None:
    config = run("here", "a", "b", "--size", "4", "--no-fast", "--value", "3,4")
    assert (config.place, config.files, config.size) == (Path("here"), ["a", "b"], 4)
    assert (config.fast, config.values, config.inner.shape) == (False, (3, 4), "round")
    assert run("here", "--inner-shape", "flat").inner.shape == "flat"
    assert run("here", "--new-tokens", "5").tokens == run("here", "--tokens", "5").tokens == 5
    assert run("here").fast


def test_a_file_holds_the_same_settings_and_flags_win(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(
        "place: there\nfast: false\nvalue: [5]\nnew_tokens: 7\nfiles: [x]\ninner: {shape: flat}\n"
    )
    given = ("--config", str(file))
    config = run(*given)
    assert (config.place, config.fast, config.values) == (Path("there"), False, (5,))
    assert (config.tokens, config.files, config.inner.shape) == (7, ["x"], "flat")
    config = run("here", *given, "--fast", "--tokens", "1", "--inner-shape", "round")
    assert (config.place, config.fast, config.values) == (Path("here"), True, (5,))
    assert (config.tokens, config.inner.shape) == (1, "round")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["here", "--size", "0"], "--size is 0\nTo mend it: give 1 or more"),
        (["here", "--size", "ten"], "--size is 'ten'\nTo mend it: give a whole number"),
        (["here", "--inner-shape", "x"], "inner.shape is 'x'\nTo mend it: give round or flat"),
        (["here", "--value", "5,6"], "the values are too many\nTo mend it: give fewer"),
        ([], "the setting place is missing\nTo mend it: give PLACE, or place in the file"),
    ],
)
def test_mistakes_on_the_command_line(arguments: list[str], said: str) -> None:
    with pytest.raises(UserError) as raised:
        run(*arguments)
    assert str(raised.value).startswith(said)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("size: 0", "c.yaml:2: size is 0\nTo mend it: give 1 or more"),
        ("value: [5, 6]", "c.yaml: the values are too many\nTo mend it: give fewer"),
        ("vlaue: [5]", "c.yaml:2: unknown setting vlaue\nTo mend it: did you mean value?"),
        (
            "inner: {shap: flat}",
            "unknown setting inner.shap\nTo mend it: did you mean inner.shape?",
        ),
    ],
)
def test_mistakes_in_a_file(line: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(f"place: there\n{line}\n")
    with pytest.raises(UserError) as raised:
        load_config(Config, file, {})
    assert said in str(raised.value)


def test_what_stands_for_a_value() -> None:
    assert metavar(int | None) == "INT"
    assert metavar(list[Path] | None) == "PATH"
    assert metavar(tuple[float, ...]) == "FLOAT,..."
    assert metavar(Literal["a", "b"] | None) == "a|b"


def test_a_setting_stands_in_the_panel_of_the_class_that_declares_it() -> None:
    groups = {setting.name: setting.group for setting in settings(Config)}
    assert groups["size"] == "Basic settings"
    assert groups["fast"] is None
    assert groups["inner.shape"] == "Inner settings"


def test_every_command_has_a_configuration() -> None:
    assert set(CONFIGS) == set(MODULES)


@pytest.mark.parametrize("command", CONFIGS)
def test_help_shows_every_setting_whole_in_80_columns(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    done = subprocess.run(
        [sys.executable, "-m", "afaspec", command, "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "…" not in done.stdout
    module, _, name = CONFIGS[command].rpartition(".")
    said = " ".join(re.sub("[│╭╮╰╯─]", " ", done.stdout).split())
    for setting in settings(getattr(importlib.import_module(module), name)):
        flag = SHORT.get(setting.name, flag_of(setting.name))
        assert f" {flag}" in said or f" {setting.name.upper()}" in said.replace("[", ""), flag
        for word in (setting.field.description or "").split():
            assert word in said, f"{flag}: {word}"
        assert setting.field.description, flag
        choices = metavar(setting.field.annotation)
        assert choices in said or f" {flag}" not in said, choices  # arguments show none
    assert " --config FILE " in said

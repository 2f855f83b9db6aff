"""The environment of processes that run vLLM: which cores its model gets."""

from __future__ import annotations

import os

import pytest

from bench.records.settings import VllmSettings
from serving import runtime
from serving.runtime import CORES, FEW_CORES, compute_dtype, runtime_environment

RESERVED = "VLLM_CPU_NUM_OF_RESERVED_CPU"


@pytest.fixture(autouse=True)
def cpu_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "has_gpu", lambda: False)
    for name in CORES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("cores", "reserved"), [(1, "0"), (2, "0"), (FEW_CORES, "0"), (FEW_CORES + 1, None)]
)
def test_no_core_of_few_is_kept_from_the_model(
    cores: int, reserved: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "usable_cores", lambda: cores)
    assert runtime_environment().get(RESERVED) == reserved


@pytest.mark.parametrize("name", CORES)
def test_a_user_who_says_which_cores_is_heard(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "usable_cores", lambda: 2)
    monkeypatch.setenv(name, "1")
    assert RESERVED not in runtime_environment()
    assert os.environ[name] == "1"


def test_on_a_gpu_nothing_is_said_of_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "has_gpu", lambda: True)
    monkeypatch.setattr(runtime, "usable_cores", lambda: 2)
    assert RESERVED not in runtime_environment()


@pytest.mark.parametrize(("there", "chosen"), [(True, "bfloat16"), (False, "float32")])
def test_bf16_is_chosen_where_the_processor_has_it(
    there: bool, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("drafts.tensors.has_bf16", lambda device: there)
    assert compute_dtype("auto") == VllmSettings().dtype == chosen
    assert VllmSettings(dtype="float16").dtype == compute_dtype("float16") == "float16"
    monkeypatch.setattr(runtime, "has_gpu", lambda: True)
    assert compute_dtype("auto") == "bfloat16"


def test_on_a_cpu_vllm_writes_nothing_that_it_cannot_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "has_gpu", lambda: False)
    assert runtime_environment()["VLLM_USE_AOT_COMPILE"] == "0"
    monkeypatch.setenv("VLLM_USE_AOT_COMPILE", "1")
    assert "VLLM_USE_AOT_COMPILE" not in runtime_environment()
    monkeypatch.delenv("VLLM_USE_AOT_COMPILE")
    monkeypatch.setattr(runtime, "has_gpu", lambda: True)
    assert "VLLM_USE_AOT_COMPILE" not in runtime_environment()

"""Which flags for vLLM get through, by vLLM's own parser, and whom a server lets in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from drafts.errors import UserError
from drafts.target.info import read_target
from serving.server import flags
from serving.server.flags import NO_FLAGS, REFUSED, read_flags, require_key
from serving.server.serve import serve
from tests.command import run_command
from tests.vllm_client import VllmWorker

# What is written, and the setting that it gives; all are refused.
GIVEN = [
    (["--host", "0.0.0.0"], "host"),
    (["--hos", "0.0.0.0"], "host"),
    (["--host=::"], "host"),
    (["--port", "8000"], "port"),
    (["--por=1"], "port"),
    (["--trust-remote-code"], "trust_remote_code"),
    (["--trust_remote_code"], "trust_remote_code"),
    (["--trust-remote"], "trust_remote_code"),
    (["--speculative-config", "{}"], "speculative_config"),
    (["--speculative_config.num_speculative_tokens", "9"], "speculative_config"),
    (["--speculative-config.num_speculative_tokens=9"], "speculative_config"),
    (["--speculative-con", "null"], "speculative_config"),
    (["-sc", "{}"], "speculative_config"),
    (["-sc.num_speculative_tokens", "9"], "speculative_config"),
    (["--model", "another"], "model"),
    (["--model="], "model"),
    (["another"], "model_tag"),
    (["--hf-config-path", "x"], "hf_config_path"),
    (["--api-key", "secret"], "api_key"),
    (["--api-k=secret"], "api_key"),
    (["--hf-token", "secret"], "hf_token"),
    (["--ud", "x"], "uds"),
    (["--ssl-keyf", "x"], "ssl_keyfile"),
    (["--headless"], "headless"),
    (["--enforce-eager", "--trust-remote"], "trust_remote_code"),
    (["--config=flags.yaml"], "config"),
]  # fmt: skip


@pytest.fixture(scope="module")
def parsed(
    tmp_path_factory: pytest.TempPathFactory, vllm_worker: VllmWorker
) -> dict[str, dict[str, Any]]:
    """What vLLM's parser says of many command lines, read by one process."""
    folder = tmp_path_factory.mktemp("flags")
    file = folder / "flags.yaml"
    file.write_text("host: 0.0.0.0\ntrust-remote-code: true\nspeculative-config: '{}'\n")
    cases = [
        *(given for given, _ in GIVEN),
        ["--config", str(file)],
        ["--config", "missing.yaml"],
        ["--no-such-flag"],
        ["--max-model-len", "many"],
        ["--help"],
        ["--no-trust-remote-code", "--shutdown-timeout", "60", "--max-model", "2k"],
    ]
    found = vllm_worker.parse_flags(cases)
    named = ["file" if str(file) in case else " ".join(case) for case in cases]
    return dict(zip(named, found, strict=True))


def refusal(monkeypatch: pytest.MonkeyPatch, found: dict[str, Any]) -> str:
    """The error for flags of which the parser said `found`."""
    monkeypatch.setattr(flags, "_parsed", lambda args: found)
    with pytest.raises(UserError) as caught:
        read_flags(["x"])
    return str(caught.value)


@pytest.mark.parametrize(("given", "name"), GIVEN, ids=lambda value: str(value))
def test_flags_that_undo_what_is_promised_are_refused(
    given: list[str],
    name: str,
    parsed: dict[str, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = parsed[" ".join(given)]
    assert name in found["given"]
    assert REFUSED[name] in refusal(monkeypatch, found)
    assert "secret" not in json.dumps(found)


def test_a_file_of_flags_is_read_as_vllm_reads_it(
    parsed: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert {"host", "trust_remote_code", "speculative_config"} <= set(parsed["file"]["given"])
    assert "cannot be passed through" in refusal(monkeypatch, parsed["file"])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--config missing.yaml", "missing.yaml"),
        ("--no-such-flag", "unrecognized arguments: --no-such-flag"),
        ("--max-model-len many", "--max-model-len"),
        ("--help", "no flags to serve with"),
    ],
)
def test_flags_that_vllm_does_not_read(
    given: str,
    said: str,
    parsed: dict[str, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    error = refusal(monkeypatch, parsed[given])
    assert "vLLM cannot read its flags" in error
    assert said in error
    assert "usage:" not in error


@pytest.mark.parametrize(
    "command",
    [
        ["serve", "TARGET", "--", "--no-such-flag"],
        ["bench", "TARGET", "--serve", "in-turn", "--server-args", "--no-such-flag"],
    ],
)
def test_a_flag_vllm_does_not_know_shows_its_complaint(
    command: list[str],
    tiny_target: Path,
    tmp_path: Path,
    parsed: dict[str, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(flags, "_parsed", lambda args: parsed[" ".join(args)])
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "import os"}\n')
    given = [str(tiny_target) if word == "TARGET" else word for word in command]
    if "bench" in given:
        given += ["--prompts", str(rows), "--out", str(tmp_path / "out")]
    code, error = run_command(*given)
    assert code == 2
    assert error.count("Error:") == 1
    assert "--no-such-flag" in error
    assert "Traceback" not in error


def test_other_flags_get_through_and_draining_gets_its_time(
    parsed: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = "--no-trust-remote-code --shutdown-timeout 60 --max-model 2k"
    monkeypatch.setattr(flags, "_parsed", lambda args: parsed[given])
    found = read_flags(given.split())
    assert found.args == tuple(given.split())
    assert found.given == {"trust_remote_code", "shutdown_timeout", "max_model_len"}
    assert found.drain_seconds == 60
    assert read_flags([]) is NO_FLAGS


def test_serve_refuses_a_prefix_before_anything_starts(tiny_target: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    code, error = run_command("serve", tiny_target, "--log", log, "--", "--hos", "0.0.0.0")
    assert code == 2
    assert "--host cannot be passed through to vLLM" in error
    assert not log.exists()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "10.1.2.3", "example.org", "127.0.0.1.x"])
def test_nobody_else_is_let_in_without_a_key(
    host: str, tiny_target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with pytest.raises(UserError, match="put a key into the environment as VLLM_API_KEY"):
        serve(read_target(tiny_target), None, host=host)
    require_key(host, allow_no_key=True)
    monkeypatch.setenv("VLLM_API_KEY", "")
    with pytest.raises(UserError):
        require_key(host)
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    require_key(host)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_this_machine_needs_no_key(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    require_key(host)

"""A target with sampling settings of its own, behind a server with a key."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from bench.server.config import ServerConfig
from bench.server.measure import measure_servers
from bench.server.run import prepare
from drafts.target.info import read_target
from serving.remote import connect
from serving.runtime import FEW_CORES, usable_cores
from serving.sampling import sampling_defaults
from tests.serving.server.servers import FAST, serving
from tests.vllm_client import VllmWorker

KEY, TOKENS = "not-for-others", 24
DEFAULTS = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.3}


@pytest.fixture
def own_sampling(tiny_target: Path, tmp_path: Path) -> Path:
    """The tiny target with a generation_config.json as published models have it."""
    folder = Path(shutil.copytree(tiny_target, tmp_path / "target"))
    file = folder / "generation_config.json"
    before = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**before, "do_sample": True, **DEFAULTS}))
    return folder


def test_the_targets_own_sampling_is_found(own_sampling: Path, tiny_target: Path) -> None:
    assert sampling_defaults(own_sampling) == DEFAULTS
    assert sampling_defaults(tiny_target) == {}
    file = own_sampling / "generation_config.json"
    file.write_text('{"top_k": 0, "top_p": 1.0, "temperature": 1.0, "repetition_penalty": 1}')
    assert sampling_defaults(own_sampling) == {}


def test_served_outputs_are_the_engines_whatever_the_targets_settings(
    own_sampling: Path,
    tmp_path: Path,
    vllm_worker: VllmWorker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # where nobody listens
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("bench.server.measure.PAUSE_SECONDS", 0)
    file = tmp_path / "prompts.jsonl"
    texts = ["def add(a, b):", "class Parser:", "import os", "for line in file:"]
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    target = read_target(own_sampling)
    config = ServerConfig(
        prompts=str(file), target=target, max_tokens=TOKENS, rounds=1, ignore_eos=True, warmup=1
    )
    arguments = [str(own_sampling), "--port", "0", "--", "--dtype", "float32", *FAST]
    with serving(tmp_path / "server", *arguments) as command:
        command.wait_ready()
        assert "repetition_penalty 1.3" in " ".join(command.err.split())
        lines = [" ".join(process.cmdline()) for process in command.children()]
        assert len(lines) >= 4
        assert not [line for line in lines if KEY in line]
        line = next(line for line in command.out.splitlines() if line.startswith("curl"))
        assert KEY not in command.out + command.err
        assert f'"model": "{own_sampling.name}"' in line
        cores = re.search(r"The model runs on (\d+) of (\d+) cores", " ".join(command.err.split()))
        assert cores is not None
        assert cores[1] == cores[2] == str(min(usable_cores(), FEW_CORES))
        answer = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=60)
        assert json.loads(answer.stdout)["usage"]["completion_tokens"] > 0
        server = connect(re.findall(r"http://127\.0\.0\.1:\d+", command.out)[0])
        requests = prepare(config, [server])
        ((run,),) = measure_servers(config, {"mine": server}, requests)
        served = [list(answer.token_ids or []) for answer in run.answers]
        body = {"max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
        silent = [
            server.post("/v1/completions", {"prompt": r.prompt, "return_token_ids": True, **body})[
                "choices"
            ][0]["token_ids"]
            for r in requests
        ]
    prompts = [r.prompt for r in requests if isinstance(r.prompt, list)]
    found = vllm_worker.serve(own_sampling, None, 1, prompts, TOKENS)
    assert served == [run["output"] for run in found["runs"]]
    assert silent != served  # the settings do change outputs where a request leaves them open

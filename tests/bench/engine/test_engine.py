"""Engine processes with real vLLM: counters, log-probabilities, company, failure and death."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from bench.engine.measure import measure
from bench.engine.run import compare_outputs, count_not_comparable
from bench.lossless.greedy import Difference, explain
from bench.prompts.conversation import Turns
from bench.prompts.encode import encode_prompts, make_encoder
from bench.prompts.rows import Prompt
from bench.prompts.template import ChatTemplate
from bench.records.arms import Arm
from bench.records.config import BenchConfig
from drafts.errors import UserError
from drafts.target.info import read_target
from serving.engine.engine import EngineProcess, EngineSettings
from tests.opened import arm, drafter
from tests.tiny.models import write_target

TOKENS, K = 48, 3
PROMPTS = [[7, 300, 21, 9], list(range(100, 130)), [44] * 12]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Two threads of a tiny model only wait for each other when the machine is busy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def looping_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target whose next token depends on the last one alone, so that its text falls into a loop
    and prompt lookup is right ever after."""
    from safetensors.torch import load_file, save_file

    folder = write_target(tmp_path_factory.mktemp("models") / "looping", seed=3)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor.zero_()
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def engines(looping_target: Path, tiny_draft: Path) -> Iterator[dict[str, EngineProcess]]:
    """Three engines at once on one target: no draft, prompt lookup, EAGLE-3."""
    drafts = {"none": None, "ngram": "ngram", "eagle3": tiny_draft}
    started = {}
    try:
        for name, draft in drafts.items():
            settings = EngineSettings(
                read_target(looping_target),
                drafter(draft),
                k=K,
                max_model_len=128,
                enforce_eager=True,
            )
            started[name] = EngineProcess(settings, wait=False)
        for engine in started.values():
            engine.wait_ready()
        yield started
    finally:
        for engine in started.values():
            engine.close()


def test_speculation_changes_no_token(engines: dict[str, EngineProcess]) -> None:
    outputs = {
        name: [r.output_ids for r in engine.generate(PROMPTS, TOKENS, ignore_eos=True).requests]
        for name, engine in engines.items()
    }
    assert [len(ids) for ids in outputs["none"]] == [TOKENS] * len(PROMPTS)
    assert outputs["ngram"] == outputs["none"]
    assert outputs["eagle3"] == outputs["none"]


def test_prompts_are_read_in_pieces_by_requests_with_seeds(
    looping_target: Path, tiny_draft: Path
) -> None:
    """Together they are more than vLLM reads at once, so that the last one waits half read."""
    settings = EngineSettings(
        read_target(looping_target), drafter(tiny_draft), k=K, temperature=1.0, max_model_len=256,
        enforce_eager=True, batch=32,
    )  # fmt: skip
    long = [[(7 * i + j) % 300 for j in range(200)] for i in range(32)]
    with EngineProcess(settings) as engine:
        first, again = (engine.generate(long, TOKENS, ignore_eos=True) for _ in range(2))
    assert [len(request.output_ids) for request in first.requests] == [TOKENS] * 32
    assert [r.output_ids for r in again.requests] == [r.output_ids for r in first.requests]


@pytest.mark.parametrize("name", ["ngram", "eagle3"])
def test_counters_per_request_add_up_to_vllms_own(
    engines: dict[str, EngineProcess], name: str
) -> None:
    engine = engines[name]
    before = engine.engine_counters()
    generation = engine.generate(PROMPTS, TOKENS, ignore_eos=True)
    assert generation.counters == engine.engine_counters() - before
    for request in generation.requests:
        spec = request.counters
        assert spec is not None
        assert spec.accepted_tokens == sum(spec.accepted_per_position)
        if name == "eagle3":  # drafts at every step: steps and accepted tokens make the output
            assert TOKENS - 1 <= spec.drafts + spec.accepted_tokens < TOKENS + K
            assert spec.draft_tokens == K * spec.drafts
    if name == "ngram":
        assert generation.counters is not None
        assert generation.counters.draft_tokens > 20
        assert generation.counters.accepted_tokens == generation.counters.draft_tokens


def test_times_are_consistent(engines: dict[str, EngineProcess]) -> None:
    generation = engines["none"].generate(PROMPTS, TOKENS, ignore_eos=True)
    parts = sum(r.prefill_seconds + r.decode_seconds for r in generation.requests)
    assert all(r.prefill_seconds > 0 and r.decode_seconds > 0 for r in generation.requests)
    assert parts <= generation.wall_seconds
    assert max(r.decode_seconds for r in generation.requests) <= generation.decode_seconds
    assert generation.decode_seconds < generation.wall_seconds
    assert generation.counters is None


def test_gap_is_the_targets_own(engines: dict[str, EngineProcess], looping_target: Path) -> None:
    """The gap explained by vLLM is the gap of a float32 forward pass, up to bf16 rounding."""
    import torch
    from transformers import AutoModelForCausalLM

    engine, prompt, position = engines["none"], PROMPTS[0], 5
    request = engine.generate([prompt], 12, ignore_eos=True, logprobs=5).requests[0]
    assert request.logprobs is not None
    best, second = (token for token, _ in request.logprobs[position][:2])
    assert best == request.output_ids[position]
    found, noise = explain(
        engine,
        {"p": prompt},
        {"p": request.output_ids},
        {"arm": [Difference("p", position, best, second)]},
    )
    difference = found["arm"][0]
    model = AutoModelForCausalLM.from_pretrained(looping_target, dtype=torch.float32)
    with torch.no_grad():
        ids = torch.tensor([prompt + request.output_ids[:position]])
        truth = model(ids).logits[0, -1].log_softmax(-1)
    assert difference.gap == pytest.approx(float(truth[best] - truth[second]), abs=0.1)
    assert difference.gap_prefill == pytest.approx(difference.gap, abs=0.1)
    assert noise is not None
    assert noise.positions == 11  # all but the one that is judged
    assert difference.near_tie == (abs(difference.gap or 0.0) <= noise.limit)


def test_conversations_go_on_with_the_arms_own_answers(
    engines: dict[str, EngineProcess], looping_target: Path, tiny_draft: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(looping_target)
    arms = (Arm("none"), arm("eagle3", tiny_draft))
    config = BenchConfig(
        target=read_target(looping_target),
        prompts="",
        arms=arms,
        k=K,
        max_tokens=6,
        rounds=2,
        ignore_eos=True,
    )
    rows = [("import os", ("def f",)), ("x = 1", ()), ("class A", ("self", "return"))]
    encoder = make_encoder(ChatTemplate(tokenizer), max_positions=128, new_tokens=6 + K + 1)
    prompts = encode_prompts(
        [Prompt(text, [{"role": "user", "content": text}], turns=later) for text, later in rows],
        encoder,
    )
    turns = Turns(prompts, encoder, max_tokens=6)
    inputs = [prompt.input_ids for prompt in prompts]
    runs = measure(config, arms, engines, inputs, turns=turns)
    order = [(0, 0), (1, 0), (2, 0), (0, 1), (2, 1), (2, 2)]
    for run in runs:
        assert run.cut == 0
        assert [len(row) for row in run.outputs] == [len(order)] * 2
        assert [len(row) for row in run.seconds] == [len(order)] * 2
        for unit, (conversation, turn) in enumerate(order):
            said = tokenizer.decode(run.inputs[unit])
            assert said.endswith(f"{[rows[conversation][0], *rows[conversation][1]][turn]}\n"
                                 "<|assistant|>\n")  # fmt: skip
            for earlier in range(turn):
                answer = run.outputs[0][order.index((conversation, earlier))]
                assert tokenizer.decode(answer, skip_special_tokens=True) in said
    assert count_not_comparable(runs) == {"none": 0, "eagle3": 0}

    eagle3 = runs[1]  # had an answer differed, the turn after it would not be compared
    names = [str(unit) for unit in order]
    last = order.index((2, 1))
    eagle3.outputs[0][last] = [eagle3.outputs[0][last][0] ^ 1, *eagle3.outputs[0][last][1:]]
    eagle3.inputs[order.index((2, 2))] = [1, 2, 3]
    eagle3.outputs[0][order.index((2, 2))] = [9]
    found, _ = compare_outputs(config, engines, names, runs, lambda stage, done, total: None)
    assert found is not None
    assert [(d.prompt, d.position) for d in found["eagle3"]] == [(names[last], 0)]
    assert count_not_comparable(runs) == {"none": 0, "eagle3": 1}


def test_idle_engines_rest(engines: dict[str, EngineProcess]) -> None:
    for engine in engines.values():
        engine.generate(PROMPTS[:1], 4)
    processes = [psutil.Process(engine.pid) for engine in engines.values()]
    before = [sum(process.cpu_times()[:2]) for process in processes]
    time.sleep(2)
    used = [sum(process.cpu_times()[:2]) - b for process, b in zip(processes, before, strict=True)]
    assert max(used) < 0.3  # of 2 seconds


def test_failure_shows_the_log(tiny_target: Path, tmp_path: Path) -> None:
    settings = EngineSettings(read_target(tiny_target), max_model_len=100_000, enforce_eager=True)
    with pytest.raises(UserError, match="engine failed") as caught:
        EngineProcess(settings, tmp_path / "engine.log")
    assert "max_model_len" in str(caught.value)
    assert str(tmp_path / "engine.log") in str(caught.value)
    assert "Traceback" in (tmp_path / "engine.log").read_text()


DRIVER = """
import sys, time
from pathlib import Path
from drafts.target.info import read_target
from serving.engine.engine import EngineProcess, EngineSettings
target = read_target(Path(sys.argv[1]))
settings = EngineSettings(target, max_model_len=128, enforce_eager=True)
engine = EngineProcess(settings, Path(sys.argv[2]), wait=sys.argv[3] == "ready")
print(engine.pid, flush=True)
if sys.argv[3] == "ready":
    while True:
        engine.generate([[1, 2, 3]], 100, ignore_eos=True)
time.sleep(600)
"""


@pytest.mark.parametrize("when", ["loading", "ready"])
def test_engines_die_with_their_driver(tiny_target: Path, tmp_path: Path, when: str) -> None:
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tiny_target), str(tmp_path / "log"), when],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[3],
    )
    assert driver.stdout is not None
    group = int(driver.stdout.readline())
    time.sleep(1)
    assert members(group)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    driver.stdout.close()
    deadline = time.monotonic() + 60
    while members(group) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not members(group)


def members(group: int) -> list[int]:
    """The living processes of a process group."""
    found = []
    for process in psutil.process_iter(["pid", "status"]):
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found

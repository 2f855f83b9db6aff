"""`afaspec bench --url` against a server that answers oddly: right figures, or one clear error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.records.config import BenchConfig
from bench.records.speeds import THROUGHPUT
from bench.report.schema import Report
from bench.server.config import ServerConfig
from bench.server.run import run_server_bench
from drafts.errors import UserError
from serving.remote import connect
from serving.sampling import NEUTRAL
from tests.bench.server.stand_in import FIRST, HTML, NEXT, TOKENS, StandIn
from tests.command import run_command

REFUSED = "top_p,top_k,min_p,repetition_penalty,presence_penalty,frequency_penalty,return_token_ids"


@pytest.fixture(params=["chat", "text"])
def prompts(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    chat = {"messages": [{"role": "user", "content": "hello"}]}
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps(chat if request.param == "chat" else {"prompt": "hello"}) + "\n")
    return path


def bench(server: StandIn, prompts: Path, **settings: Any) -> Report:
    config = ServerConfig(prompts=str(prompts), max_tokens=TOKENS, rounds=2, requests=1, **settings)
    with server.serve() as running:
        return run_server_bench(config, {"mine": running.url + server.prefix})


@pytest.mark.parametrize(
    "server",
    [
        StandIn(),
        StandIn(usage="last", writes_to="reasoning"),
        StandIn(usage="each", writes_to="reasoning_content", html=("/version",)),
        StandIn(usage="none", writes_to="reasoning", html=("/version",), prefix="/llm"),
    ],
    ids=lambda server: f"{server.usage}-{server.writes_to}",
)
def test_latencies_and_counts_are_right(server: StandIn, prompts: Path) -> None:
    (arm,) = bench(server, prompts).arms
    latency = arm["latency"]
    assert (latency["requests"], latency["failed"]) == (2, 0)
    assert latency["ttft_ms"]["p50"] >= 1000 * FIRST  # not the role piece, which comes at once
    # Two pieces after the first. A busy machine reads any of them late, the first one too, so that
    # the others seem to follow sooner; none is early.
    assert latency["e2e_ms"]["mean"] >= 1000 * (FIRST + 2 * NEXT) - 5
    spread = latency["e2e_ms"]["mean"] - latency["ttft_ms"]["mean"]
    assert latency["tpot_ms"]["mean"] == pytest.approx(spread / (TOKENS - 1))
    assert arm["server_counters"]["requests"] == 2  # and none of those of the page's other model
    assert arm["server_counters"]["tokens"] == 2 * TOKENS
    said = [line for line in arm["warnings"] if "tokenising" in line]
    assert len(said) == (server.usage == "none")
    assert not [line for line in arm["warnings"] if "counts" in line or "other traffic" in line]
    assert arm["provenance"]["server_vllm"] == (None if server.html else "0.32.0")
    assert arm[THROUGHPUT.rate]["value"] > 0


def test_sampling_is_stated_whole(prompts: Path) -> None:
    server = StandIn()
    (arm,) = bench(server, prompts, temperature=0.5).arms
    for body in server.asked:
        assert {name: body[name] for name in NEUTRAL} == NEUTRAL
        assert body["temperature"] == 0.5
    assert arm["provenance"]["sampling"] == {"temperature": 0.5, **NEUTRAL}


def test_nobody_who_counts_tokens_is_an_error_that_says_what_to_give(prompts: Path) -> None:
    with pytest.raises(UserError, match="no /tokenize to count them with; give TARGET"):
        bench(StandIn(usage="none", tokenizes=False), prompts)


def test_the_target_counts_tokens_where_the_server_does_not(
    prompts: Path, tiny_target: Path
) -> None:
    from transformers import AutoTokenizer

    from drafts.target.info import read_target

    server = StandIn(usage="none", tokenizes=False)
    (arm,) = bench(server, prompts, target=read_target(tiny_target)).arms
    tokenizer = AutoTokenizer.from_pretrained(tiny_target)
    tokens = len(tokenizer.encode("one two three ż", add_special_tokens=False))
    spread = arm["latency"]["e2e_ms"]["mean"] - arm["latency"]["ttft_ms"]["mean"]
    assert arm["latency"]["tpot_ms"]["mean"] == pytest.approx(spread / (tokens - 1))
    assert any("tokenising" in line for line in arm["warnings"])


def test_a_strict_server_names_its_fields_and_gets_none_of_them(prompts: Path) -> None:
    with pytest.raises(UserError) as caught:
        bench(StandIn(strict=True), prompts)
    assert f"--omit-fields {REFUSED},cache_salt" in str(caught.value)
    server = StandIn(strict=True)
    (arm,) = bench(server, prompts, omit_fields=f"{REFUSED}, cache_salt").arms
    assert arm["latency"]["failed"] == 0
    assert arm["provenance"]["sampling"]["top_p"] == "the server's own"
    assert any("say nothing of top_p" in line for line in arm["warnings"])
    assert any("no cache_salt" in line for line in arm["warnings"])


def test_older_servers_get_max_tokens(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "hello"}]}) + "\n")
    server = StandIn()
    bench(server, path, omit_fields="max_completion_tokens")
    assert {body["max_tokens"] for body in server.asked} == {TOKENS}


@pytest.mark.parametrize(
    ("names", "more", "said"),
    [
        ("model", {}, "--omit-fields names model"),
        ("top_p,tpo_k", {}, "--omit-fields names tpo_k"),
        ("ignore_eos", {"ignore_eos": True}, "--ignore-eos is a field"),
    ],
)
def test_fields_that_cannot_be_left_out(names: str, more: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        ServerConfig(prompts="x", omit_fields=names, **more)


@pytest.mark.parametrize(
    ("server", "model", "said"),
    [
        (StandIn(html=("/v1/models",)), None, "/v1/models answered with something that is no JSON"),
        (StandIn(html=("/metrics",)), None, "/metrics page has none of vLLM's counters"),
        (StandIn(pages={"/v1/models": "[]"}), None, "/v1/models does not list models"),
        (StandIn(pages={"/v1/models": '{"data": [{}]}'}), None, "does not list models"),
        (StandIn(pages={"/v1/models": '{"data": []}'}), None, "names no model"),
        (
            StandIn(pages={"/v1/models": '{"data": [{"id": "a"}, {"id": "b"}]}'}),
            None,
            "serves several models: a, b",
        ),
        (StandIn(pages={"/v1/models": '{"data": [{"id": "a"}]}'}), None, "counters for a"),
        (StandIn(), "nobody", "serves no model 'nobody'; it has mine, mine-lora"),
    ],
)
def test_pages_that_are_not_what_they_should_be(
    server: StandIn, model: str | None, said: str
) -> None:
    with server.serve() as running, pytest.raises(UserError, match=said):
        connect(running.url, model)


@pytest.mark.parametrize("page", ['{"data": []}', '{"data": {}}'])
def test_a_server_that_lists_no_models_is_asked_for_the_named_one(page: str) -> None:
    with StandIn(pages={"/v1/models": page}).serve() as running:
        assert connect(running.url, "mine", counted=False).model == "mine"
        with pytest.raises(UserError, match=r"names no model|does not list models"):
            connect(running.url, counted=False)


def test_an_adapter_is_counted_as_its_model() -> None:
    with StandIn().serve() as running:
        assert connect(running.url).model == "mine"
        found = connect(running.url, "mine-lora")
        assert (found.root, found.max_model_len) == ("/lora", 512)
        assert (found.counters().requests, found.counters().tokens) == (0, 0)


def test_a_prefix_is_kept_and_v1_is_not() -> None:
    with StandIn(prefix="/llm").serve() as running:
        for end in ("/llm", "/llm/", "/llm/v1", "/llm/v1/"):
            assert connect(running.url + end).url == f"{running.url}/llm"
        with pytest.raises(UserError, match="/v1/models answered 404"):
            connect(running.url)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://me:secret@h:1", "more than host, port and path"),
        ("http://h:1/v1?key=secret", "more than host, port and path"),
        ("http://h:port", "is no address"),
        ("httpx://h", "is no address"),
    ],
)
def test_addresses_that_hold_more_or_less(url: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        connect(url)
    assert "secret" not in str(caught.value)


def test_a_refusal_in_html_is_one_line(prompts: Path, tmp_path: Path) -> None:
    async def refuse(stream: Any, body: Any) -> None:
        await stream.whole(HTML, "text/html", 502)

    server = StandIn()
    server.answer = refuse  # type: ignore[method-assign]
    with server.serve() as running:
        code, error = run_command(
            "bench", "--url", running.url, "--prompts", prompts, "--out", tmp_path / "out"
        )
    assert code == 2
    assert "HTTP 502: <!DOCTYPE html>" in error
    assert "Traceback" not in error


def test_engines_state_the_same_sampling(tiny_target: Path) -> None:
    from bench.report.provenance import settings_of
    from drafts.target.info import read_target

    config = BenchConfig(prompts="x", target=read_target(tiny_target), arms=(), temperature=0.5)
    assert settings_of(config, [[1]])["sampling"] == {"temperature": 0.5, **NEUTRAL}

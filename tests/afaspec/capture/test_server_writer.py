"""Answers that a server writes: what it says is kept, and what it lacks is said."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from afaspec.capture import run as capturing
from afaspec.capture.config import CaptureConfig
from afaspec.capture.writers import server as writing
from drafts.errors import UserError
from tests.bench.server.sse_server import SseServer, Stream
from tests.opened import capture

MODEL = {"id": "tiny", "root": "tiny", "max_model_len": 4096}


class Server(SseServer):
    """Answers each prompt with `choice`, after as many failures, and not before as many requests
    have run `together`."""

    def __init__(
        self, failures: int = 0, model: dict[str, Any] = MODEL, together: int = 1, **choice: Any
    ):
        super().__init__(self.complete, self.look)
        self.failures, self.model, self.choice = failures, model, choice
        self.together = together
        self.bodies: list[dict[str, Any]] = []
        self.tried: dict[str, int] = {}

    async def look(self, stream: Stream) -> None:
        listed = {"data": [self.model]} if stream.path == "/v1/models" else {"version": "0.99"}
        await stream.whole(json.dumps(listed))

    async def complete(self, stream: Stream, body: dict[str, Any]) -> None:
        if stream.path != "/v1/completions":
            await stream.whole("no", status=404)
            return
        while self.most < self.together:
            await asyncio.sleep(0.01)
        who = str(body["prompt"])
        self.tried[who] = self.tried.get(who, 0) + 1
        if self.tried[who] <= self.failures:
            await stream.whole("busy", status=503)
            return
        self.bodies.append(body)
        choice = self.choice or {"token_ids": [7, len(body["prompt"]), 9]}
        await stream.whole(json.dumps({"choices": [choice]}))


@pytest.fixture
def settings(tiny_target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(writing, "PAUSES", (0.01, 0.01, 0.01))
    rows = tmp_path / "prompts.jsonl"
    rows.write_text("".join(f'{{"prompt": "def f{i}(x{"y" * i})"}}\n' for i in range(9)))
    return {
        "target": str(tiny_target), "prompts": str(rows), "out": tmp_path / "store",
        "layer_ids": "1,2,3", "max_new_tokens": 5, "batch_size": 4, "device": "cpu",
    }  # fmt: skip


def test_its_tokens_are_stored_and_what_fails_is_asked_again(settings: dict[str, Any]) -> None:
    with Server(failures=2, together=3) as server:
        store = capture(CaptureConfig(**settings, generate_with=server.url, requests=3))
    assert server.most == 3
    assert set(server.tried.values()) == {3}
    for sequence in store:
        prompt = sequence.input_ids[~sequence.loss_mask]
        assert sequence.input_ids[sequence.loss_mask].tolist() == [7, len(prompt), 9]
    assert store.manifest.settings["written_with"] == "server"
    body = server.bodies[0]
    assert (body["max_tokens"], body["temperature"], body["top_p"]) == (5, 0.0, 1.0)
    assert body["return_token_ids"]
    assert body["stop_token_ids"]
    assert len({body["seed"] for body in server.bodies}) == 9


def test_it_goes_on_with_what_was_answered(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing.ServerWriter, "block", 4)
    with Server() as server:
        config = CaptureConfig(**settings, generate_with=server.url)

        def stop(now: capturing.CaptureProgress) -> None:
            if now.done >= 6:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            capture(config, stop)
        before = len(server.bodies)
        store = capture(config)
    assert len(store) == 9
    assert len(server.bodies) - before == 9 - 4  # the first block was kept


@pytest.mark.parametrize(
    ("server", "said"),
    [
        ({"text": "x = 1"}, "answers without token ids"),
        ({"token_ids": [5, 99999]}, "answers with token 99999; the target has"),
        ({"failures": 9}, "/v1/completions answered 503: busy"),
        ({"model": {**MODEL, "max_model_len": 8}}, r"takes 8 tokens \(--max-model-len\)"),
    ],
)
def test_what_it_lacks_is_said(server: dict[str, Any], said: str, settings: dict[str, Any]) -> None:
    with Server(**server) as running, pytest.raises(UserError, match=said) as caught:
        capture(CaptureConfig(**settings, generate_with=running.url))
    assert str(caught.value.where).startswith("http://127.0.0.1:")


def test_nobody_there_is_said_before_the_model_is_loaded(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("afaspec.capture.readers.transformers_model.load_target", None)
    with pytest.raises(UserError, match="no server answers here"):
        capture(CaptureConfig(**settings, generate_with="http://127.0.0.1:1"))
    with pytest.raises(ValueError, match="found 'sglang'"):
        CaptureConfig(**settings, generate_with="sglang")

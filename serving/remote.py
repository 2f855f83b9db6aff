"""A running vLLM server of the OpenAI API, seen from outside: what it serves, and its counters."""

from __future__ import annotations

import json
import os
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit

from drafts.errors import UserError
from serving.metrics import ServerCounters, server_counters

SETTLE_SECONDS = 3.0


@dataclass(frozen=True)
class RemoteServer:
    """A server that answered. `url` has no path.

    `model` is the name to ask for, `root` the folder or hub id behind it as the server says, `k`
    its speculative tokens per step (0 without speculation), `version` its vLLM's.
    """

    url: str
    model: str
    root: str
    max_model_len: int | None
    version: str | None
    k: int

    def counters(self) -> ServerCounters:
        """vLLM's counters now. Raises `UserError` where /metrics does not show them."""
        return _counters(self.url)

    def settled_counters(self, requests: int) -> ServerCounters:
        """The counters once `requests` requests have ended by them, or after a few seconds.

        vLLM counts a step just after it has sent what the step gave.
        """
        deadline = time.monotonic() + SETTLE_SECONDS
        while (found := self.counters()).requests < requests and time.monotonic() < deadline:
            time.sleep(0.05)
        return found

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The answer to a request that is not streamed. Raises `UserError` with what was said."""
        return json.loads(_ask(self.url, path, {"model": self.model, **body}))

    def tokenize(self, **content: Any) -> list[int] | None:
        """Token ids of `prompt` or `messages`; None where the server offers no /tokenize."""
        try:
            return list(self.post("/tokenize", content)["tokens"])
        except UserError:
            return None


def connect(url: str, model: str | None = None) -> RemoteServer:
    """Ask the server at `url` what it serves.

    Raises `UserError` when nobody answers there, when it does not serve `model` (None takes the
    first that it names), or when its /metrics page lacks vLLM's counters.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(
            f"{url!r} is no address of a server", hint="write it whole: http://127.0.0.1:8000"
        )
    url = url.rstrip("/").removesuffix("/v1")
    listed = json.loads(_ask(url, "/v1/models"))["data"]
    names = [entry["id"] for entry in listed]
    if model is not None and model not in names:
        raise UserError(
            f"serves no model {model!r}; it has {', '.join(names) or 'none'}",
            where=url,
            hint="give --model one of these names, or the address of another server",
        )
    entry = next(entry for entry in listed if model in (None, entry["id"]))
    return RemoteServer(
        url=url,
        model=entry["id"],
        root=entry.get("root") or entry["id"],
        max_model_len=entry.get("max_model_len"),
        version=_version(url),
        k=len(_counters(url).spec.accepted_per_position),
    )


def api_headers() -> dict[str, str]:
    """The header with the key that the environment holds, if it holds one."""
    key = os.environ.get("OPENAI_API_KEY") or os.environ.get("VLLM_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


def _counters(url: str) -> ServerCounters:
    found = server_counters(_ask(url, "/metrics"))
    if found is None:
        raise UserError(
            "its /metrics page has none of vLLM's counters",
            where=url,
            hint="measure a vLLM server that runs without --disable-log-stats",
        )
    return found


def _version(url: str) -> str | None:
    try:
        return str(json.loads(_ask(url, "/version"))["version"])
    except (UserError, KeyError):
        return None


def _ask(url: str, path: str, body: Mapping[str, Any] | None = None) -> str:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", **api_headers()}
    try:
        request = urllib.request.Request(url + path, data, headers)
        with direct.open(request, timeout=60) as answer:
            text: str = answer.read().decode()
    except HTTPError as error:
        raise UserError(
            f"{path} answered {error.code}: {error.read().decode(errors='replace')[:300]}",
            where=url,
            hint=_hint(error.code, path),
        ) from None
    except (OSError, HTTPException, ValueError) as error:
        raise UserError(
            f"no server answers here ({error})",
            where=url,
            hint="start one with `afaspec serve`, or check the address and port",
        ) from None
    return text


def _hint(status: int, path: str) -> str:
    if status == 401:
        return "put the server's key into the environment as OPENAI_API_KEY"
    if status == 404 and path == "/metrics":
        return "measure the vLLM server itself: a proxy in front of it hides its counters"
    return "check that this is a vLLM server of the OpenAI API"

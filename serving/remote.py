"""A running vLLM server of the OpenAI API, seen from outside: what it serves, and its counters."""

from __future__ import annotations

import json
import os
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit

from drafts.errors import UserError
from serving.metrics import ServerCounters, server_counters

SETTLE_SECONDS = 3.0
SHOWN = 300  # characters of a strange answer that an error shows
SECONDS = 60.0  # until a request has failed
OVERRUN = (429, 500, 502, 503, 504)  # what a server or the proxy before it says while it cannot


class TransientError(UserError):
    """A request that may succeed later: the server is gone, starting, or has too much to do."""


@dataclass(frozen=True)
class RemoteServer:
    """A server that answered. `url` is what its paths are put behind, a prefix of its own included.

    `model` is the name to ask for, `root` the folder or hub id behind it as the server says, `k`
    its speculative tokens per step (0 without speculation), `version` its vLLM's (None where it
    does not say). `counted_as` are the names by which its counters may know the model; `pages` show
    them (none: its own /metrics), unless nobody does and it is not `counted`: then `k` is not known
    either, and 0. `headers` go with every request.
    """

    url: str
    model: str
    root: str
    max_model_len: int | None
    version: str | None
    k: int
    counted_as: tuple[str, ...] = ()
    counted: bool = True
    pages: tuple[str, ...] = ()
    headers: Mapping[str, str] = field(default_factory=lambda: api_headers(), repr=False)

    def counters(self) -> ServerCounters:
        """vLLM's counters now. Raises `UserError` where its pages do not show them."""
        return _counters(self.url, self.counted_as, self.pages, self.headers)

    def check(self) -> None:
        """Raise `TransientError` while nobody answers."""
        _models(self.url, self.headers)

    def settled_counters(self, requests: int) -> ServerCounters:
        """The counters once `requests` requests have ended by them, or after a few seconds.

        vLLM counts a step just after it has sent what the step gave.
        """
        deadline = time.monotonic() + SETTLE_SECONDS
        while (found := self.counters()).requests < requests and time.monotonic() < deadline:
            time.sleep(0.05)
        return found

    def post(self, path: str, body: Mapping[str, Any], *, seconds: float = SECONDS) -> Any:
        """The answer to a request that is not streamed. Raises `UserError` with what was said."""
        return _ask_json(
            self.url, path, {"model": self.model, **body}, seconds, headers=self.headers
        )

    def tokenize(self, **content: Any) -> list[int] | None:
        """Token ids of `prompt` or `messages`; None where the server offers no /tokenize."""
        try:
            found = self.post("/tokenize", content)
        except UserError:
            return None
        ids = found.get("tokens") if isinstance(found, dict) else None
        return ids if isinstance(ids, list) and all(isinstance(one, int) for one in ids) else None


def connect(
    url: str,
    model: str | None = None,
    *,
    counted: bool | None = True,
    pages: Sequence[str] = (),
    headers: Mapping[str, str] | None = None,
) -> RemoteServer:
    """Ask the server at `url` what it serves.

    The address may have a prefix before /v1, and /v1 itself. Raises `UserError` when nobody answers
    there, when it does not serve `model` or it is not clear which of several is meant (None takes
    the one model, under its first name and without an adapter; one that lists none is taken at its
    word for `model`), or, where it is to be `counted`,
    when its /metrics page lacks vLLM's counters (None: then it is not). `pages` are the addresses
    that show its counters instead, such as those of the engines behind a router. `headers` go with
    every request (default: the environment's key).
    """
    url = _base(url)
    headers = api_headers() if headers is None else headers
    entries = _listed(url, headers, model)
    names = [entry["id"] for entry in entries]
    if model is not None and model not in names:
        raise UserError(
            f"serves no model {model!r}; it has {', '.join(names) or 'none'}",
            where=url,
            hint="give --model one of these names, or the address of another server",
        )
    bases = [entry for entry in entries if not entry.get("parent")] or entries
    if model is None and len({_root(entry) for entry in bases}) != 1:
        raise UserError(
            f"serves several models: {', '.join(names)}" if names else "names no model",
            where=url,
            hint="say which with --model",
        )
    entry = next(entry for entry in entries if entry["id"] == model) if model else bases[0]
    base = next((one for one in entries if one["id"] == entry.get("parent")), entry)
    # vLLM counts an adapter's requests, and those by another name, under its model's first name.
    counted_as = tuple(one["id"] for one in entries if _root(one) == _root(base) or one is entry)
    seen = _seen(url, counted_as, pages, headers, counted)
    return RemoteServer(
        url=url,
        model=entry["id"],
        root=_root(entry),
        max_model_len=entry.get("max_model_len") or base.get("max_model_len"),
        version=_version(url, headers),
        k=len(seen.spec.accepted_per_position) if seen else 0,
        counted_as=counted_as,
        counted=seen is not None,
        pages=tuple(pages),
        headers=headers,
    )


def _listed(url: str, headers: Mapping[str, str], model: str | None) -> list[dict[str, Any]]:
    """The models that the server lists; `model` where it lists none, or cannot."""
    try:
        entries = _models(url, headers)
    except TransientError:
        raise
    except UserError:
        if model is None:
            raise
        entries = []
    return entries or ([{"id": model}] if model is not None else [])


def _seen(
    url: str,
    names: tuple[str, ...],
    pages: Sequence[str],
    headers: Mapping[str, str],
    counted: bool | None,
) -> ServerCounters | None:
    """The counters now; None where nobody counts, or is to."""
    if counted is False:
        return None
    try:
        return _counters(url, names, pages, headers)
    except UserError:
        if counted or pages:
            raise
        return None


def _base(url: str) -> str:
    """The address without /v1 and what stands behind it. Raises `UserError` where it is none."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number
        usable = False
    if not usable:
        raise UserError(
            f"{url!r} is no address of a server", hint="write it whole: http://127.0.0.1:8000"
        )
    if parts.query or parts.fragment or parts.username is not None:
        raise UserError(
            "the address has more than host, port and path",
            where=f"{parts.scheme}://{parts.hostname}",
            hint="put a key into the environment as VLLM_API_KEY, and leave out ? and #",
        )
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def _models(url: str, headers: Mapping[str, str]) -> list[dict[str, Any]]:
    listed = _ask_json(url, "/v1/models", headers=headers)
    entries = listed.get("data") if isinstance(listed, dict) else None
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and isinstance(entry.get("id"), str) for entry in entries
    ):
        raise UserError(
            f"/v1/models does not list models: {str(listed)[:SHOWN]}",
            where=url,
            hint="check that this is a server of the OpenAI API, and its path",
        )
    return entries


def _root(entry: Mapping[str, Any]) -> str:
    return str(entry.get("root") or entry["id"])


def api_headers() -> dict[str, str]:
    """The header with the key that the environment holds, if it holds one."""
    key = os.environ.get("VLLM_API_KEY") or os.environ.get("OPENAI_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


def _counters(
    url: str, names: tuple[str, ...], pages: Sequence[str], headers: Mapping[str, str]
) -> ServerCounters:
    """Those of all pages together, each of which must have some."""
    texts = {page: _ask(page, "", headers=headers) for page in pages}
    texts = texts or {url: _ask(url, "/metrics", headers=headers)}
    for page, text in texts.items():
        if server_counters(text, names) is None:
            raise UserError(
                f"its /metrics page has none of vLLM's counters for {' or '.join(names)}",
                where=page,
                hint="give the address of a vLLM engine that runs without --disable-log-stats",
            )
    together = server_counters("\n".join(texts.values()), names)
    assert together is not None
    return together


def _version(url: str, headers: Mapping[str, str]) -> str | None:
    try:
        found = _ask_json(url, "/version", headers=headers)
    except UserError:
        return None
    return str(found["version"]) if isinstance(found, dict) and found.get("version") else None


def _ask_json(
    url: str,
    path: str,
    body: Mapping[str, Any] | None = None,
    seconds: float = SECONDS,
    *,
    headers: Mapping[str, str],
) -> Any:
    text = _ask(url, path, body, seconds, headers=headers)
    try:
        return json.loads(text)
    except ValueError:
        raise UserError(
            f"{path} answered with something that is no JSON: {' '.join(text.split())[:SHOWN]}",
            where=url,
            hint=_hint(200, path),
        ) from None


def _ask(
    url: str,
    path: str,
    body: Mapping[str, Any] | None = None,
    seconds: float = SECONDS,
    *,
    headers: Mapping[str, str],
) -> str:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    data = None if body is None else json.dumps(body).encode()
    sent = {"Content-Type": "application/json", **headers}
    try:
        request = urllib.request.Request(url + path, data, sent)
        with direct.open(request, timeout=seconds) as answer:
            found: bytes = answer.read()
    except HTTPError as error:
        text = " ".join(error.read().decode(errors="replace").split())
        kind = TransientError if error.code in OVERRUN else UserError
        raise kind(
            f"{path} answered {error.code}: {text[:SHOWN]}",
            where=url,
            hint=_hint(error.code, path),
        ) from None
    except (OSError, HTTPException, ValueError) as error:
        raise TransientError(
            f"no server answers here ({error})",
            where=url,
            hint="start one with `afaspec serve`, or check the address and port",
        ) from None
    return found.decode(errors="replace")


def _hint(status: int, path: str) -> str:
    if status in (401, 403):
        return "put the server's key into the environment as VLLM_API_KEY or OPENAI_API_KEY"
    if path == "/metrics":
        return "measure the vLLM server itself: a proxy in front of it hides its counters"
    return "check that this is a vLLM server of the OpenAI API, and its path"

"""What a user says of single servers or of all requests, read from its flags."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

from drafts.errors import UserError

NO_PAGE = "none"
LATENCIES = ("ttft", "ttfa", "tpot", "e2e")
# Fields that make a request what is measured; another way to set them stands behind each.
OURS = {
    "model": "--model",
    "prompt": "--prompts",
    "messages": "--prompts",
    "stream": "nothing: answers are streamed",
    "stream_options": "--omit-fields stream_options",
    "max_tokens": "--max-tokens",
    "max_completion_tokens": "--max-tokens",
    "temperature": "--temperature",
    "ignore_eos": "--ignore-eos",
    "n": "nothing: one answer a request",
}


def read_pages(given: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The pages with counters by arm, from `NAME=URL`; none for `NAME=none`."""
    pages: dict[str, tuple[str, ...]] = {}
    for text in given:
        name, value = _pair(text, "--metrics-url NAME=http://host:8000/metrics or NAME=none")
        if value == NO_PAGE:
            pages[name] = ()
        elif not urlsplit(value).scheme.startswith("http"):
            raise UserError(
                f"cannot read the address {value!r}", hint="write it whole: http://host/metrics"
            )
        else:
            pages[name] = (*pages.get(name, ()), value)
    return pages


def read_keys(given: Sequence[str]) -> dict[str, str]:
    """Keys by arm, from `NAME=VARIABLE`, an environment variable that holds one."""
    keys = {}
    for text in given:
        name, variable = _pair(text, "--key NAME=VARIABLE, an environment variable")
        if variable not in os.environ:
            raise UserError(
                f"the environment has no {variable}, which is to hold the key of {name!r}",
                hint=f"export {variable}=...",
            )
        keys[name] = os.environ[variable]
    return keys


def read_headers(given: Sequence[str]) -> dict[str, str]:
    """Headers from `NAME: VALUE`."""
    headers = {}
    for text in given:
        name, found, value = text.partition(":")
        if not found or not name.strip() or "\n" in text:
            raise UserError(
                f"cannot read the header {text!r}", hint="write --header 'X-Tenant: mine'"
            )
        if name.strip().lower() == "authorization":
            raise UserError(
                "a key in a command line is seen by all of the machine",
                hint="put it into the environment as VLLM_API_KEY, or name it: --key NAME=VARIABLE",
            )
        headers[name.strip()] = value.strip()
    return headers


def require_free_fields(body: Mapping[str, object]) -> None:
    """Raise `UserError` where a request's own fields are set by hand."""
    for name, instead in OURS.items():
        if name in body:
            raise UserError(
                f"--request-body sets {name!r}, which is set by the run", hint=f"use {instead}"
            )


def read_slo(given: str | None) -> dict[str, float]:
    """Limits in ms by latency, from `ttft:500,tpot:50`."""
    limits = {}
    for part in (given or "").split(",") if given else ():
        name, _, value = (piece.strip() for piece in part.partition(":"))
        try:
            limits[name] = float(value)
        except ValueError:
            limits[name] = 0.0
        if name not in LATENCIES or not limits[name] > 0:
            raise UserError(
                f"cannot read the limit {part!r}",
                hint=f"write --slo ttft:500,tpot:50, in ms; there are {', '.join(LATENCIES)}",
            )
    return limits


def _pair(text: str, how: str) -> tuple[str, str]:
    name, found, value = text.partition("=")
    if not found or not name or not value:
        raise UserError(f"cannot read {text!r}", hint=f"write {how}")
    return name, value

"""Asking a running server for another draft, from any process: the other end of `admin`."""

from __future__ import annotations

import http.client
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from drafts.errors import UserError
from serving.server.admin import TOKEN, read_note

SECONDS = 3600.0  # of silence: a server that takes over loads a whole model, and says so meanwhile


def ask_for_versions(url: str) -> list[dict[str, Any]]:
    """What serves at `url` and what has served before it, the oldest first."""
    (answer,) = _asked(url, "GET", None)
    versions: list[dict[str, Any]] = answer["versions"]
    return versions


def ask_for_change(
    url: str, folder: Path | None, how: str = "auto", report: Callable[[str], object] = print
) -> dict[str, Any]:
    """Put the draft of `folder` in (None: the one that served before); the version that results.

    `report` gets what happens meanwhile. Raises `UserError` where the server refuses, and then it
    goes on as it was.
    """
    asked: dict[str, Any] = {"how": how, **({"folder": str(folder)} if folder else {"back": True})}
    for answer in _asked(url, "POST", asked):
        if "version" in answer:
            done: dict[str, Any] = answer["version"]
            return done
        if "error" in answer:
            raise UserError(answer["error"])
        report(answer["report"])
    raise UserError("the server left before it was done", where=url, hint="read its log")


def _asked(url: str, method: str, body: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """The answer's lines."""
    note = read_note(url) or {}
    address = urlsplit(note.get("url", url))
    token = os.environ.get(TOKEN) or note.get("token")
    if not token:
        raise UserError(
            "nothing on this machine says how its draft is changed",
            where=url,
            hint="start it with `afaspec serve ... --swappable`; from another machine, give the "
            f"address that it printed for changes, and its token in {TOKEN}",
        )
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=SECONDS)
    try:
        headers = {"Authorization": f"Bearer {token}"}
        connection.request(method, "/draft", json.dumps(body) if body else None, headers)
        answer = connection.getresponse()
        if answer.status != 200:
            raise UserError(
                f"the address for changes answers {answer.status}: {answer.read()[:200]!r}",
                where=url,
                hint=f"is the token in {TOKEN} the one that the server was started with?",
            )
        for line in answer:
            yield json.loads(line)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise UserError(f"no answer: {error}", where=url, hint="is the server running?") from None
    finally:
        connection.close()

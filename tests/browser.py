"""A real browser, headless: how a page looks at a width and in a colour scheme, and what it does.

Speaks the Chrome DevTools Protocol to the Chromium that this machine has.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
WIDE, NARROW = 1200, 390  # pixels: a laptop's window, a telephone's
SETTLED = 0.3  # seconds that a page has for what it does after it was loaded
# What stands beyond the right edge and cannot be scrolled to inside of something that scrolls.
BEYOND = """
((width) => {
  const scrolls = (e) => e && (
    ["auto", "scroll"].includes(getComputedStyle(e).overflowX) || scrolls(e.parentElement));
  return [...document.body.querySelectorAll("*")]
    .filter((e) => e.getBoundingClientRect().right > width + 1 && !scrolls(e.parentElement))
    .map((e) => `${e.tagName} ${e.className} ${e.textContent.slice(0, 60)}`);
})(WIDTH)
"""


@dataclass(frozen=True)
class Seen:
    """A page as it was shown: a picture, what went wrong, what it asked for, what is outside."""

    picture: bytes
    errors: list[str]
    requests: list[str]
    beyond: list[str]
    background: str
    text: str


def find_browser() -> str | None:
    """The browser's program; None where there is none."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


@contextlib.contextmanager
def browser() -> Iterator[str]:
    """The address of a browser that runs until the block ends."""
    program = find_browser()
    assert program
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [program, "--headless", "--remote-debugging-port=0", f"--user-data-dir={profile}",
             "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--no-first-run",
             *(["--no-sandbox"] if os.getuid() == 0 else [])],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            assert process.stderr
            line = next(line for line in process.stderr if "DevTools listening on" in line)
            yield line.rpartition(" ")[2].strip()
        finally:
            process.kill()
            process.wait()


def look(address: str, page: Path, width: int = WIDE, *, dark: bool = False) -> Seen:
    """The page at that width, in a light or dark scheme."""
    return asyncio.run(_look(address, page, width, dark))


async def _look(address: str, page: Path, width: int, dark: bool) -> Seen:
    async with aiohttp.ClientSession() as http, http.ws_connect(address, max_msg_size=0) as socket:
        numbers, events = itertools.count(1), list[dict[str, Any]]()
        session: dict[str, str] = {}

        async def ask(method: str, **parameters: Any) -> dict[str, Any]:
            number = next(numbers)
            await socket.send_json(
                {"id": number, "method": method, "params": parameters, **session}
            )
            while True:
                message = await socket.receive_json(timeout=60)
                if message.get("id") == number:
                    assert "error" not in message, message
                    return dict(message["result"])
                events.append(message)

        target = await ask("Target.createTarget", url="about:blank")
        attached = await ask("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        session["sessionId"] = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            await ask(f"{domain}.enable")
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        await ask("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await ask("Emulation.setEmulatedMedia", features=[scheme])
        url = page.absolute().as_uri()
        await ask("Page.navigate", url=url)
        while not any(event.get("method") == "Page.loadEventFired" for event in events):
            events.append(await socket.receive_json(timeout=60))
        await asyncio.sleep(SETTLED)

        async def value(expression: str) -> Any:
            found = await ask("Runtime.evaluate", expression=expression, returnByValue=True)
            return found["result"].get("value")

        beyond = await value(BEYOND.replace("WIDTH", str(width)))
        background = await value("getComputedStyle(document.body).backgroundColor")
        text = await value("document.body.innerText")
        picture = await ask("Page.captureScreenshot", captureBeyondViewport=True, clip={
            "x": 0, "y": 0, "scale": 1, "width": width,
            "height": await value("document.documentElement.scrollHeight"),
        })  # fmt: skip
        await ask("Target.closeTarget", targetId=target["targetId"])
    return Seen(
        base64.b64decode(picture["data"]),
        [str(event["params"]) for event in events if _is_wrong(event)],
        [
            event["params"]["request"]["url"]
            for event in events
            if event.get("method") == "Network.requestWillBeSent"
            and event["params"]["request"]["url"] != url
        ],
        beyond,
        background,
        text,
    )


def _is_wrong(event: dict[str, Any]) -> bool:
    method, parameters = event.get("method"), event.get("params", {})
    if method == "Runtime.consoleAPICalled":
        return parameters["type"] in ("error", "warning", "assert")
    if method == "Log.entryAdded":
        return parameters["entry"]["level"] in ("error", "warning")
    return method == "Runtime.exceptionThrown"


def require_shown_well(address: str, page: Path) -> None:
    """Fail where a page asks for anything, complains, or has what cannot be seen, at both widths
    and in both schemes."""
    shown = {
        (width, dark): look(address, page, width, dark=dark)
        for width in (WIDE, NARROW)
        for dark in (False, True)
    }
    for how, seen in shown.items():
        assert seen.errors == [], (page, how)
        assert seen.requests == [], (page, how)
        assert seen.beyond == [], (page, how, seen.beyond)
        assert "Traceback" not in seen.text
        assert "undefined" not in seen.text
    assert shown[WIDE, False].background != shown[WIDE, True].background
    assert shown[NARROW, False].picture != shown[NARROW, True].picture

"""How tokens are drawn while something is measured: the same in engines and on servers.

A vLLM server fills in what a request leaves open from the target's generation_config.json, an
engine in process does not. So every setting is stated in each request, at the value that leaves
the target's own distribution alone but for the temperature.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from drafts.errors import UserError
from drafts.files import read_json

# By vLLM's names. -1 means all tokens to every server that knows top_k.
NEUTRAL: dict[str, float] = {
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
OFF = {"top_k": (-1, 0), "temperature": (1.0,)}  # values that change nothing, beside NEUTRAL's


def sampling_defaults(target: Path) -> dict[str, Any]:
    """What the target's generation_config.json asks for beside neutral sampling, by name.

    vLLM's server gives these to requests that do not say; a temperature of 1 is no such thing.
    """
    file = target / "generation_config.json"
    try:
        config = read_json(file) if file.is_file() else {}
    except UserError:
        return {}  # vLLM goes without it as well
    found = {name: config.get(name) for name in ("temperature", *NEUTRAL)}
    return {
        name: value
        for name, value in found.items()
        if value is not None and value not in OFF.get(name, (NEUTRAL.get(name),))
    }


def defaults_words(target: Path) -> str | None:
    """A sentence about the target's own sampling settings; None where it has none."""
    found = sampling_defaults(target)
    if not found:
        return None
    listed = ", ".join(f"{name} {value}" for name, value in found.items())
    return f"the target's generation_config.json sets {listed}"

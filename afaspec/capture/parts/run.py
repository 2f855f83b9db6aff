"""A capture by several workers: who does which part, and what happens when one dies."""

from __future__ import annotations

import logging
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

from afaspec.capture.config import CaptureConfig
from afaspec.capture.memory import choose_batch_size
from afaspec.capture.parts.part import FOLDER, SIZE, begin, begun, is_done, join, remove
from afaspec.capture.parts.worker import Board, RemoteWorker, Worker
from afaspec.capture.plan import CapturePlan, choose_device, plan_capture, settle
from afaspec.capture.run import (
    CaptureProgress,
    announce,
    capture,
    compare,
    require_own,
    write_prompts,
)
from afaspec.capture.writers.choose import open_writer
from afaspec.store.manifest import NAME
from afaspec.store.read import FeatureStore
from afaspec.store.write import locked
from bench.prompts.template import today
from drafts.checkpoint.info import DraftInfo
from drafts.errors import UserError
from drafts.target.info import TargetInfo
from serving.runtime import usable_cores

POLL = 1.0  # seconds
RESTARTS, RETRIES = 1000, 10  # of a worker that dies, and of one part whose worker died
Tell = Callable[[CaptureProgress], None]
Say = Callable[[str], None]


def wanted(config: CaptureConfig) -> bool:
    """Whether this capture is one by parts, or was begun as one."""
    return config.workers > 1 or config.ray is not None or (config.out / FOLDER).is_dir()


def capture_in_parts(
    config: CaptureConfig,
    target: TargetInfo,
    draft: DraftInfo | None = None,
    on_progress: Tell | None = None,
    note: Say | None = None,
) -> FeatureStore:
    """As `afaspec.capture.run.capture`, by `config.workers` processes or on the cluster of
    `config.ray`, whose machines must all see `config.out`.

    The store depends on `config.part_prompts` too, and not on the workers: how many there are, what
    each does, and which of them die. Raises `UserError`.
    """
    say, tell = note or (lambda _: None), on_progress or (lambda _: None)
    with locked(config.out):
        if config.overwrite:
            remove(config.out)
        if not (config.out / NAME).is_file():
            return _captured(config, target, draft, tell, say)
        shutil.rmtree(config.out / FOLDER, ignore_errors=True)  # joined, and then killed
    say(f"{config.out} holds a store already: what it lacks is captured by one process")
    return capture(config, target, draft, on_progress, note)


def _captured(
    config: CaptureConfig, target: TargetInfo, draft: DraftInfo | None, tell: Tell, say: Say
) -> FeatureStore:
    """The store, in a folder that is held and has none yet."""
    found = begun(config.out)
    if found is None:
        require_own(config.out)
    date = found.settings.get("chat_date") if found else None
    config = config.model_copy(
        update={"chat_date": config.chat_date or date or today(), "overwrite": False}
    )
    setup = settle(config, target, draft)
    with closing(open_writer(setup)) as writer:
        write_prompts(setup, writer, say, tell)
    plan = plan_capture(setup, say)
    if found is None:
        found = plan.manifest(config.batch_size or choose_batch_size(plan))
        found.settings[SIZE] = config.part_prompts
        announce(plan, found, say)
        begin(config.out, found)
    compare(found, plan)
    if found.settings[SIZE] != config.part_prompts:
        raise UserError(
            f"this capture was begun with parts of {found.settings[SIZE]} prompts, now it is "
            f"{config.part_prompts}",
            where=config.out,
            hint=f"give --part-prompts {found.settings[SIZE]}, or --overwrite",
        )
    parts = -(-len(plan.prompts) // config.part_prompts)
    _all_parts(plan, found.settings["batch_size"], parts, tell, say)
    join(config.out, found, parts)
    return FeatureStore.open(config.out)


def _all_parts(plan: CapturePlan, batch_size: int, parts: int, tell: Tell, say: Say) -> None:
    """Capture the parts that are left, by this process alone or over Ray."""
    config, total = plan.config, len(plan.prompts)
    left = [number for number in range(parts) if not is_done(config.out, number)]
    done = set(range(parts)) - set(left)
    stored = sum(min(config.part_prompts, total - n * config.part_prompts) for n in done)
    workers = min(config.workers, len(left))
    say(f"{parts} parts, {len(done)} of them done; {workers} at once")
    told = config.model_copy(update={"batch_size": batch_size}).model_dump(mode="json")
    board, tokens = Board(), 0

    def show(found: Board) -> None:
        nonlocal tokens
        tokens = found.tokens
        tell(CaptureProgress(min(stored + found.prompts, total), total, found.tokens))

    if config.ray is None and workers <= 1:

        def report(number: int, stage: str, done: float, tokens: int) -> None:
            board.write(number, stage, done, tokens)
            show(board)

        worker = Worker(told, config.part_prompts, report)
        for number in left:
            worker.capture(number)
    else:
        with _ray(config, workers) as ray:
            _over_ray(ray, config, told, left, workers, show)
    tell(CaptureProgress(total, total, tokens))


def _over_ray(
    ray: Any,
    config: CaptureConfig,
    told: dict[str, Any],
    left: list[int],
    workers: int,
    show: Callable[[Board], None],
) -> None:
    lives = {"max_restarts": RESTARTS, "max_task_retries": RETRIES}
    board = ray.remote(num_cpus=0, **lives)(Board).remote()
    remote = ray.remote(
        num_cpus=1 if config.ray else _cores(workers),
        num_gpus=config.tensor_parallel if choose_device(config.device) == "cuda" else 0,
        **lives,
    )(RemoteWorker)
    idle = deque(remote.remote(told, config.part_prompts) for _ in range(workers))
    todo = deque(left)
    running: dict[Any, Any] = {}
    while todo or running:
        while todo and idle:
            worker = idle.popleft()
            running[worker.capture_for.remote(board, todo.popleft())] = worker
        for finished in ray.wait(list(running), timeout=POLL)[0]:
            _result(ray, finished)
            idle.append(running.pop(finished))
        show(ray.get(board.copy.remote()))


def _cores(workers: int) -> int:
    """Of this machine for each worker."""
    return max(1, usable_cores() // workers)


def _result(ray: Any, finished: Any) -> None:
    """Raises what the worker raised, and `UserError` for one that died again and again."""
    try:
        ray.get(finished)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        raise UserError(
            f"a worker died {RETRIES + 1} times at the same part ({str(error).splitlines()[0]})",
            hint="see whether the machine's memory suffices: --workers, --batch-size; the same "
            "command goes on",
        ) from None


@contextmanager
def _ray(config: CaptureConfig, workers: int) -> Iterator[Any]:
    """Ray, on the given cluster or on one of this machine's own that ends with the block."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise UserError(
            "Ray is not installed; captures by several workers need it",
            hint="pip install 'afaspec[ray]', or leave out --workers",
        ) from None
    own = {
        "address": "local",
        "num_cpus": workers * _cores(workers),
        "include_dashboard": False,
        "_system_config": {"worker_niceness": 0},  # by default they yield to all that runs here
        "_node_ip_address": "127.0.0.1",
    }
    where: dict[str, Any] = own if config.ray is None else {"address": config.ray}
    try:
        ray.init(**where, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(
            f"cannot be reached ({str(error).splitlines()[0]})",
            where=config.ray or "Ray",
            hint="give the address that `ray start --head` printed, or leave out --ray",
        ) from None
    try:
        yield ray
    finally:
        ray.shutdown()

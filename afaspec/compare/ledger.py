"""The results of finished tasks: one JSON file each, which is there whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

from afaspec.compare.plan import Json, Task
from bench.report.provenance import git_commit, machine, versions
from drafts.files import atomic_file, read_json


class Ledger(Mapping[str, Json]):
    """Results by task key, from the folder that holds them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._records: dict[str, Json] = {}
        self._maker = {"git": git_commit(), "versions": versions(), "machine": machine()}
        for path in sorted(folder.glob("*.json")):
            record = read_json(path)
            self._records[record["key"]] = record

    def __getitem__(self, key: str) -> Json:
        result: Json = self._records[key]["result"]
        return result

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)

    def record(self, task: Task) -> Json:
        """All that is stored of a finished task."""
        return self._records[task.key]

    def seconds(self, task: Task) -> float:
        return float(self.record(task)["seconds"])

    def add_records(self, records: Iterable[Json]) -> None:
        """Keep records that another ledger wrote, where this one has no such task yet."""
        for record in records:
            if record["key"] not in self._records:
                self._keep(record)

    def drop_stale(self, tasks: list[Task]) -> bool:
        """Forget results made with other settings than the tasks now have; were there any?

        A key holds what differs from the defaults, and these may have been others then.
        """
        stale = [
            task.key
            for task in tasks
            if task.key in self and _other(self.record(task)["settings"], task.settings)
        ]
        for key in stale:
            del self._records[key]
        return bool(stale)

    def add(self, task: Task, result: Json, seconds: float) -> None:
        """Keep the result of a task, with what made it."""
        record = {
            "kind": task.kind,
            "name": task.name,
            "key": task.key,
            "domain": task.domain,
            "seed": task.seed,
            "learning_rate": task.rate,
            "inputs": task.inputs,
            "settings": task.settings,
            "result": result,
            "seconds": round(seconds, 3),
            "made": {"time": datetime.now(UTC).isoformat(timespec="seconds"), **self._maker},
        }
        self._keep(record)

    def _keep(self, record: Json) -> None:
        with atomic_file(self.folder / f"{record['kind']}-{record['key']}.json") as temporary:
            temporary.write_text(json.dumps(record) + "\n", encoding="utf-8")
        self._records[record["key"]] = record


def _other(made_with: Json, settings: Json) -> bool:
    """Whether a setting had another value then; one that it lacks, or had besides, says nothing."""
    return any(
        _other(before, value)
        if isinstance(before := made_with.get(name, value), dict) and isinstance(value, dict)
        else before != value
        for name, value in settings.items()
    )

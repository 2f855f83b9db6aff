"""The results of finished cells: one JSON file each, which is there whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

from afaspec.compare.plan import Cell, Json
from bench.report.provenance import git_commit, machine, versions
from drafts.files import atomic_file, read_json


class Ledger(Mapping[str, Json]):
    """Results by cell key, from the folder that holds them."""

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

    def record(self, cell: Cell) -> Json:
        """All that is stored of a finished cell."""
        return self._records[cell.key]

    def seconds(self, cell: Cell) -> float:
        return float(self._records[cell.key]["seconds"])

    def adopt(self, records: Iterable[Json]) -> None:
        """Keep records that another ledger wrote, where this one has no such cell yet."""
        for record in records:
            if record["key"] not in self._records:
                self._keep(record)

    def drop_stale(self, cells: list[Cell]) -> bool:
        """Forget results made with other settings than the cells now have; were there any?

        A key holds what differs from the first defaults; such a default may have been forgotten.
        """
        stale = [cell.key for cell in cells if cell.key in self and self._differs(cell)]
        for key in stale:
            del self._records[key]
        return bool(stale)

    def _differs(self, cell: Cell) -> bool:
        return _other(self._records[cell.key]["settings"], cell.settings)

    def add(self, cell: Cell, result: Json, seconds: float) -> None:
        """Keep the result of a cell, with what made it."""
        record = {
            "kind": cell.kind,
            "name": cell.name,
            "key": cell.key,
            "domain": cell.domain,
            "seed": cell.seed,
            "learning_rate": cell.rate,
            "inputs": cell.inputs,
            "settings": cell.settings,
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

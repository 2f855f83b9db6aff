"""Rows of a Hugging Face dataset: a hub id, a folder saved by `datasets`, or parquet files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from drafts.errors import UserError

HUB_ID = re.compile(r"^(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<config>[\w.-]+))?(@(?P<split>[\w.-]+))?$")
PREFERRED_SPLITS = ("train", "test", "validation")
SECONDS = 10  # that the hub or an address may take to answer


def is_dataset_folder(folder: Path) -> bool:
    """Whether `folder` was written by `datasets` or holds parquet files."""
    saved = ("dataset_info.json", "dataset_dict.json", "state.json")
    return any((folder / name).is_file() for name in saved) or bool(_parquet(folder))


def dataset_rows(source: str) -> Iterator[tuple[str, Any]]:
    """Yield (`source:number`, row) of a local dataset or a hub id `owner/name[:config][@split]`."""
    dataset = _local(Path(source)) if Path(source).exists() else _from_hub(source)
    for number, row in enumerate(dataset, 1):
        yield f"{source}:{number}", _without_nulls(row)


def url_rows(address: str) -> Iterator[tuple[str, bytes]]:
    """Yield (`address:number`, line) of a JSONL file on the web, fetched anew each time."""
    from urllib.request import urlopen

    try:
        with urlopen(address, timeout=SECONDS) as answer:
            lines = answer.read().splitlines()
    except OSError as error:  # no network, no such name, no such file
        raise UserError(
            f"the address cannot be reached: {_first_line(error)}",
            where=address,
            hint="give the file itself",
        ) from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield f"{address}:{number}", line


def _without_nulls(value: Any) -> Any:
    """A row without the keys that Arrow adds with null, as all rows of a column share them."""
    if isinstance(value, dict):
        return {k: _without_nulls(item) for k, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _local(path: Path) -> Any:
    import datasets

    files = [path] if path.is_file() else _parquet(path)
    try:
        if files:
            names = [str(file) for file in files]
            return datasets.Dataset.from_parquet(names, keep_in_memory=True)
        return _one_split(datasets.load_from_disk(str(path)), None, str(path))
    except UserError:
        raise
    except Exception as error:  # the library raises a dozen kinds for damaged files
        raise UserError(
            f"cannot be read as a dataset ({type(error).__name__}: {_first_line(error)})",
            where=path,
            hint="save it again with datasets, or give a JSONL file",
        ) from error


def _from_hub(source: str) -> Any:
    match = HUB_ID.match(source)
    if not match:
        raise UserError("no such file or folder", where=source, hint="check the path")
    try:
        import datasets
        import huggingface_hub
    except ImportError:
        raise UserError(
            "reading a hub dataset needs the datasets package",
            where=source,
            hint="pip install datasets, or give a JSONL file",
        ) from None
    try:
        _reachable(match["name"])
        loaded = datasets.load_dataset(match["name"], match["config"])
    except Exception as error:  # network, access, name and format errors of many kinds
        offline = huggingface_hub.constants.HF_HUB_OFFLINE
        why = "the hub cannot be reached" if offline else _first_line(error)
        raise UserError(
            f"no such file or folder here, and as a hub dataset it could not be fetched ({why})",
            where=source,
            hint="check the path or name; without a network, give a JSONL file or a folder saved "
            "with datasets' save_to_disk",
        ) from error
    return _one_split(loaded, match["split"], source)


def _one_split(loaded: Any, wanted: str | None, source: str) -> Any:
    if not isinstance(loaded, dict):
        return loaded
    names = list(loaded)
    if wanted is None:
        wanted = next((name for name in PREFERRED_SPLITS if name in names), names[0])
    if wanted not in names:
        raise UserError(
            f"has no split {wanted}; found {', '.join(names)}",
            where=source,
            hint=f"write {source.split('@')[0]}@{names[0]}",
        )
    return loaded[wanted]


def _reachable(name: str) -> None:
    """Ask the hub once; without an answer go on with what is cached, and not through retries."""
    import datasets
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    try:
        huggingface_hub.HfApi().dataset_info(name, timeout=SECONDS)
    except HfHubHTTPError:
        raise  # it answered: no such dataset, or no access
    except Exception:  # no answer; the kind depends on the HTTP library in use
        huggingface_hub.constants.HF_HUB_OFFLINE = True
        datasets.config.HF_HUB_OFFLINE = True


def _parquet(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*.parquet"), *folder.glob("*/*.parquet")])


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]

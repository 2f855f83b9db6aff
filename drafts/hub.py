"""Models on the Hugging Face hub: `owner/name` or `owner/name@revision`, fetched into its cache.

The cache, the token and the address are those of `huggingface_hub`. Of a repository only what a
model is read from is fetched; never code.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from glob import escape
from pathlib import Path
from typing import Any

from drafts.errors import UserError, first_line
from drafts.files import PAPERS, TEXTS, read_json
from drafts.pickles import INDEX as PICKLED_INDEX
from drafts.pickles import MASK_EMBEDDING, OF_TRAINING
from drafts.tensors import PICKLES

HUB_ID = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")
SNAPSHOT = re.compile(r"models--(?P<name>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})$")
INDEX = "model.safetensors.index.json"
SECONDS = 10  # that the hub may take to answer
LOG_IN = "ask for access on its page, and log in with `hf auth login` or set HF_TOKEN"
LOCAL = "check name, network and token, or give the folder of a copy"


def is_hub_id(text: str) -> bool:
    """Is `text` a model on the hub? A file or folder of that name here comes first."""
    return HUB_ID.fullmatch(text) is not None and not Path(text).exists()


def source(folder: Path) -> str | None:
    """`owner/name@commit` of a folder in the hub's cache; None for any other."""
    found = SNAPSHOT.search(folder.as_posix())
    return f"{found['name'].replace('--', '/', 1)}@{found['commit']}" if found else None


def folder_name(folder: Path) -> str:
    """What a model's folder is called: by its own name, or `owner/name` in the hub's cache."""
    whole = Path(os.path.abspath(folder))  # no resolving: a link has been given a name to be used
    return (source(whole) or whole.name).partition("@")[0] or str(whole)


@lru_cache
def fetch(text: str, *, pickles: bool = False) -> Path:
    """The folder of the hub's cache with the model `text`, downloaded where it is not there yet.

    Its name is the commit. `pickles` fetches those where there are no safetensors. Without an
    answer of the hub it is what the cache has. Raises `UserError` for what is not there, or not
    open to this user.
    """
    import huggingface_hub as hub
    from huggingface_hub import errors

    match = HUB_ID.fullmatch(text)
    assert match is not None
    name, revision = match["name"], match["revision"]
    with hub_errors(text):
        try:
            info = hub.HfApi().model_info(name, revision=revision, timeout=SECONDS)
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
            raise
        except Exception as error:  # no answer, or none that says anything of the repository
            return cached(name, revision, text, error)
        files = chosen(name, info, pickles, text)
        known = (hub.try_to_load_from_cache(name, file, revision=info.sha) for file in files)
        quiet = all(isinstance(path, str) for path in known)
        with progress_bars(not quiet):
            patterns = [escape(file) for file in files]
            return Path(hub.snapshot_download(name, revision=revision, allow_patterns=patterns))


def cached(name: str, revision: str | None, text: str, error: Exception) -> Path:
    """What the cache has of a repository, without the network."""
    from huggingface_hub import errors, snapshot_download

    try:
        found = snapshot_download(
            name, revision=revision, local_files_only=True, allow_patterns=["config.json"]
        )
    except errors.LocalEntryNotFoundError:
        answered = isinstance(error, errors.HfHubHTTPError)
        what = "answers with an error" if answered else "cannot be reached"
        offline = isinstance(error, errors.OfflineModeIsEnabled)
        why = "HF_HUB_OFFLINE is set" if offline else first_line(error) or type(error).__name__
        raise UserError(
            f"no such folder here, not in the hub's cache, and the hub {what} ({why})",
            where=text,
            hint=LOCAL,
        ) from None
    return Path(found)


def chosen(name: str, info: Any, pickles: bool, text: str) -> list[str]:
    """The files of a repository that are fetched: config, tokenizer, texts, and the weights."""
    import huggingface_hub as hub

    everything = [file.rfilename for file in info.siblings or []]
    top = {file for file in everything if "/" not in file}
    texts = [file for file in everything if file.startswith("additional_chat_templates/")]
    texts += [file for file in sorted(top) if is_text(file)]
    indices = [PICKLED_INDEX] if pickles else []
    weights = sorted(file for file in top if is_weights(file))
    if weights or INDEX in top:
        indices = [INDEX]
    elif found := [f for f in sorted(top) if is_pickle(f)]:
        if not pickles:
            raise UserError(
                f"has no .safetensors file (only {found[0]}, a pickle)",
                where=text,
                hint=f"write it with safetensors: afaspec convert {text} --out NEW",
            )
        weights = found
    else:
        raise UserError("holds no weights", where=text, hint="give a repository of a model")
    if index := top.intersection(indices):
        path = hub.hf_hub_download(name, index.pop(), revision=info.sha)
        weights = sorted(set(read_json(Path(path))["weight_map"].values()))
        texts += [Path(path).name]
    # A draft that has one is refused, which it could not be without the file.
    return [*texts, *weights, *top.intersection([MASK_EMBEDDING])]


def is_text(file: str) -> bool:
    return bool(Path(file).suffix in TEXTS or PAPERS.match(file)) and not file.endswith(
        ".index.json"
    )


def is_weights(file: str) -> bool:
    """Not a model's second copy, in a layout of another program."""
    return file.endswith(".safetensors") and not file.startswith("consolidated")


def is_pickle(file: str) -> bool:
    of_weights = not OF_TRAINING.match(file) and file != MASK_EMBEDDING
    return Path(file).suffix in PICKLES and of_weights


@contextmanager
def progress_bars(shown: bool) -> Iterator[None]:
    """Let `huggingface_hub` show bars, or none: not for what is in its cache already."""
    from huggingface_hub import utils

    if shown or utils.are_progress_bars_disabled():
        yield
        return
    utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.enable_progress_bars()


@contextmanager
def hub_errors(text: str) -> Iterator[None]:
    """Turn what goes wrong between here and the hub into one `UserError`."""
    from huggingface_hub import errors

    try:
        yield
    except UserError:
        raise
    except errors.GatedRepoError:
        raise UserError(
            "is gated: the hub gives no access to it", where=text, hint=LOG_IN
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            "no such folder here, and the hub has no such model, or a private one",
            where=text,
            hint="check the name; for a private one log in with `hf auth login` or set HF_TOKEN",
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(
            "the hub has this model, but not this revision",
            where=text,
            hint="give a branch, a tag or a commit of it: owner/name@revision",
        ) from None
    except Exception as error:  # network, disk and server errors of many kinds
        raise UserError(
            f"cannot be fetched from the hub ({type(error).__name__}: {first_line(error)})",
            where=text,
            hint="run the command again: what was fetched is kept",
        ) from error

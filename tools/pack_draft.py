"""Pack a draft of SmolLM2 as `smollm2-draft`: `python tools/pack_draft.py DRAFT [--out FOLDER]`.

What ships is the packed draft, so evaluate that one: after this, `smollm2-draft` is it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from afaspec.embedded.unpack import ASSETS, SMOLLM2_DRAFT
from afaspec.pairs.names import open_draft, resolve_model
from afaspec.pairs.smollm2_draft import pack_draft
from drafts.errors import UserError
from drafts.target.info import read_target
from serving.compatibility import require_compatible


def main() -> int:
    """Pack; the exit status is 2 for a draft that cannot ship."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("draft", help="folder of the merged draft, or a hub id")
    parser.add_argument("--out", type=Path, default=ASSETS / SMOLLM2_DRAFT, help="folder to write")
    given = parser.parse_args()
    try:
        target, draft = read_target(resolve_model("smollm2")), open_draft(given.draft)
        require_compatible(target, draft)
        size = pack_draft(draft, given.out, target)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"packed: {given.out} ({size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())

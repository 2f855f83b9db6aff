"""Pack a draft of SmolLM2 as `smollm2-draft`: `python tools/pack_draft.py DRAFT [--out FOLDER]`.

What ships is the packed draft, so evaluate that one: after this, `smollm2-draft` is it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from afaspec.embedded.unpack import ASSETS, SMOLLM2_DRAFT, pack
from afaspec.pairs.names import open_draft, resolve_model
from drafts.errors import UserError
from drafts.target.info import TargetInfo, read_target
from serving.compatibility import require_compatible

BITS = 8
LARGEST = 16 * 10**6  # bytes of the packed draft


def main() -> int:
    """Pack; the exit status is 2 for a draft that cannot ship."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("draft", help="folder of the merged draft, or a hub id")
    parser.add_argument("--out", type=Path, default=ASSETS / SMOLLM2_DRAFT, help="folder to write")
    given = parser.parse_args()
    try:
        size = pack_draft(given.draft, given.out, read_target(resolve_model("smollm2")))
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"packed: {given.out} ({size / 1e6:.1f} MB)")
    return 0


def pack_draft(draft: str, out: Path, target: TargetInfo) -> int:
    """Write `draft`, which must fit `target`, packed to `out`; its weights' size in bytes."""
    info = open_draft(draft)
    require_compatible(target, info)
    return pack(info.folder, out, BITS, LARGEST)


if __name__ == "__main__":
    sys.exit(main())

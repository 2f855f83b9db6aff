"""Which server a swap is for: the one at the address that was given, and no other."""

from __future__ import annotations

from pathlib import Path

import pytest

from drafts.errors import UserError
from serving.server.admin import TOKEN, note_path, read_note, write_note
from serving.server.ask import ask_for_versions

HERE = "http://127.0.0.1:8000"


def test_a_port_of_another_machine_is_not_the_one_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AFASPEC_CACHE", str(tmp_path))
    monkeypatch.delenv(TOKEN, raising=False)
    write_note(note_path(HERE), "http://127.0.0.1:9", "token")
    for url in (HERE, f"{HERE}/", f"{HERE}/v1", "http://localhost:8000"):
        assert read_note(url) == {"url": "http://127.0.0.1:9", "token": "token"}
    assert read_note("http://127.0.0.1:8001") is None
    for url in ("http://10.0.0.7:8000", "http://example.org:8000"):
        assert read_note(url) is None
        with pytest.raises(UserError, match="nothing on this machine says"):
            ask_for_versions(url)

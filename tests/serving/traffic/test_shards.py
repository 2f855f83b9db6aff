"""A folder of traffic stays within its limits, keeps whole rows alone, and forgets what it must."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.fernet import Fernet

from drafts.errors import UserError
from serving.traffic.shards import Limits, Traffic, now


def row(number: int, *, time: str | None = None, **more: Any) -> dict[str, Any]:
    return {"id": f"a{number}", "time": time or now(), "text": "x" * 1000, **more}


def numbers(traffic: Traffic) -> list[int]:
    return [int(one["id"][1:]) for one in traffic.rows()]


def test_rows_come_back_in_order_and_are_for_their_owner_alone(tmp_path: Path) -> None:
    traffic = Traffic(tmp_path / "t")
    traffic.append([row(0), row(1)])
    traffic.append([row(2, text="ü\u2028\n")])
    assert numbers(Traffic(tmp_path / "t")) == [0, 1, 2]
    assert [*traffic.rows()][2]["text"] == "ü\u2028\n"
    assert stat.S_IMODE((tmp_path / "t").stat().st_mode) == 0o700
    for path in (tmp_path / "t").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def test_the_size_holds_and_the_newest_rows_stay(tmp_path: Path) -> None:
    traffic = Traffic(tmp_path, Limits(max_mib=0.25))
    for number in range(1000):
        traffic.append([row(number)])
        assert traffic.size() <= 0.25 * 2**20
    kept = numbers(traffic)
    assert kept == list(range(kept[0], 1000))
    assert len(kept) > 150  # of some 250 that there is room for


def test_old_rows_leave(tmp_path: Path) -> None:
    traffic = Traffic(tmp_path, Limits(max_days=8))
    old = datetime.now(UTC) - timedelta(days=9)
    traffic.append([row(0, time=old.isoformat())])
    os.utime(traffic.shards()[0], (old.timestamp(), old.timestamp()))
    traffic.append([row(1)])  # a file of its own: the first one's rows are too old to share it
    assert numbers(traffic) == [1]


def test_a_line_that_a_kill_cut_off_is_dropped(tmp_path: Path) -> None:
    traffic = Traffic(tmp_path)
    traffic.append([row(0), row(1)])
    with traffic.shards()[0].open("ab") as file:
        file.write(json.dumps(row(2)).encode()[:500])
    assert numbers(traffic) == [0, 1]
    traffic.append([row(3)])
    assert numbers(Traffic(tmp_path)) == [0, 1, 3]


def test_purged_rows_are_gone_from_the_disk(tmp_path: Path) -> None:
    traffic = Traffic(tmp_path, Limits(max_mib=0.1))
    for number in range(40):
        traffic.append([row(number, secret=f"secret-{number}-")])
    before = numbers(traffic)
    gone = [before[0], before[5], before[-1]]
    assert traffic.purge(lambda one: int(one["id"][1:]) in gone) == 3
    assert numbers(traffic) == [n for n in before if n not in gone]
    stored = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert not any(f"secret-{n}-".encode() in stored for n in gone)
    assert traffic.purge(lambda one: True) == len(before) - 3
    assert traffic.shards() == []
    traffic.append([row(99)])
    assert numbers(traffic) == [99]


def test_with_a_key_nothing_can_be_read_without_it(tmp_path: Path) -> None:
    key = Fernet.generate_key().decode()
    traffic = Traffic(tmp_path, key=key)
    traffic.append([row(0, text="a secret"), row(1)])
    assert b"secret" not in traffic.shards()[0].read_bytes()
    assert numbers(Traffic(tmp_path, key=key)) == [0, 1]
    assert traffic.purge(lambda one: one["id"] == "a0") == 1
    for other in (None, Fernet.generate_key().decode()):
        with pytest.raises(UserError, match=r"000001\.jsonl:1"):
            list(Traffic(tmp_path, key=other).rows())
    with pytest.raises(UserError, match="is no key"):
        Traffic(tmp_path, key="no")


WRITER = """
import sys
from pathlib import Path
from serving.traffic.shards import Limits, Traffic, now
traffic = Traffic(Path(sys.argv[1]), Limits(max_mib=0.5))
number = int(sys.argv[2])
while True:
    traffic.append([{"id": f"a{number + i}", "time": now(), "text": "x" * 700} for i in range(5)])
    number += 5
    print(number, flush=True)
"""


def test_writers_may_be_killed_at_any_moment(tmp_path: Path) -> None:
    """What a writer has said that it wrote is there, whole and once."""
    number = 0
    for round_ in range(8):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(number)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert writer.stdout is not None
        said = [int(writer.stdout.readline())]
        time.sleep(0.05 + 0.03 * round_)
        writer.send_signal(signal.SIGKILL)
        said += [int(line) for line in writer.stdout.read().split("\n")[:-1]]
        writer.wait()
        found = numbers(Traffic(tmp_path))
        assert found == sorted(set(found))
        assert found[-1] + 1 >= said[-1]
        number = found[-1] + 1

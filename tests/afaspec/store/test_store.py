"""The feature store: what is appended comes back, and damage is found."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from afaspec.store.int8 import GROUP, from_int8, to_int8
from afaspec.store.manifest import Features, Manifest, TargetRecord, token_bytes
from afaspec.store.read import FeatureStore
from afaspec.store.write import StoreWriter, locked
from drafts.errors import UserError

D = 8


def empty_manifest() -> Manifest:
    target = TargetRecord(path="t", sha256="0", hidden_size=D, vocab_size=100, num_layers=4)
    return Manifest(target, (1, 2, 3), "bfloat16", {"seed": 0})


def random_batch(seed: int, rows: int = 3) -> list[tuple[list[int], torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    batch = []
    for row in range(rows):
        n = 5 + row + seed
        ids = torch.randint(100, (n,), generator=generator).tolist()
        states = torch.randn(n, 4 * D, generator=generator).to(torch.bfloat16)
        batch.append((ids, states[:, : 3 * D], states[:, 3 * D :]))
    return batch


def append(writer: StoreWriter, batch: list[tuple[list[int], torch.Tensor, torch.Tensor]]) -> None:
    ids, hidden, final = zip(*batch, strict=True)
    masks = [[i >= 2 for i in range(len(one))] for one in ids]
    writer.append(ids, masks, list(range(len(batch))), hidden, final)


def write_store(
    folder: Path, batches: int = 4, shard_bytes: int = 3000, features: Features = "bf16"
) -> FeatureStore:
    with locked(folder):
        manifest = replace(empty_manifest(), features=features)
        writer = StoreWriter(folder, manifest, shard_bytes)
        writer.prepare()
        for seed in range(batches):
            append(writer, random_batch(seed))
        writer.finish()
    return FeatureStore.open(folder)


def test_few_shards_are_open_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is a memory map, of which a process may have only so many."""
    monkeypatch.setattr("afaspec.store.read.OPEN", 3)
    store = write_store(tmp_path / "s", batches=16, shard_bytes=1)
    assert len(store.manifest.shards) == 16
    expected = [row for seed in range(16) for row in random_batch(seed)]
    for i in (*range(len(store)), *reversed(range(len(store)))):
        assert store[i].input_ids.tolist() == expected[i][0]
        assert len(store._shards) <= 3
    assert len(store.lengths) == len(store)
    assert len(store._shards) <= 3


def test_round_trip(tmp_path: Path) -> None:
    store = write_store(tmp_path / "s")
    assert len(store.manifest.shards) == 2  # a shard closes at a batch's end, past its size
    expected = [row for seed in range(4) for row in random_batch(seed)]
    assert len(store) == len(expected)
    assert store.lengths.tolist() == [len(ids) for ids, _, _ in expected]
    assert store.tokens == store.lengths.sum()
    assert store.manifest.response_tokens == store.tokens - 2 * len(store)
    for i, (ids, hidden, final) in enumerate(expected):
        sequence = store[i]
        assert sequence.input_ids.tolist() == ids
        assert sequence.input_ids.dtype == torch.int64
        assert sequence.loss_mask.tolist() == [False] * 2 + [True] * (len(ids) - 2)
        assert torch.equal(sequence.hidden, hidden)
        assert torch.equal(sequence.final, final)
        assert sequence.prompt_index == i % 3
        assert len(sequence) == len(ids)
    with pytest.raises(IndexError):
        store[len(store)]


def test_survives_pickling(tmp_path: Path) -> None:
    store = write_store(tmp_path / "s")
    first = store[0]
    assert torch.equal(pickle.loads(pickle.dumps(store))[0].hidden, first.hidden)


def test_unfinished_store_is_refused_unless_allowed(tmp_path: Path) -> None:
    with locked(tmp_path / "s"):
        writer = StoreWriter(tmp_path / "s", empty_manifest(), 1)
        writer.prepare()
        append(writer, random_batch(0))
    with pytest.raises(UserError, match="is not finished: 3 sequences"):
        FeatureStore.open(tmp_path / "s")
    assert len(FeatureStore.open(tmp_path / "s", allow_incomplete=True)) == 3


def test_prepare_removes_what_a_killed_run_left(tmp_path: Path) -> None:
    store = write_store(tmp_path / "s")
    names = sorted(p.name for p in store.folder.iterdir())
    (store.folder / "shard-00002.safetensors").write_text("finished, but not in the manifest")
    (store.folder / ".shard-00003.safetensors.999999.tmp").write_text("half")
    (store.folder / ".tmpA9RSce").write_text("half, as safetensors leaves it")
    StoreWriter(store.folder, store.manifest, 1).prepare()
    assert sorted(p.name for p in store.folder.iterdir()) == names


def test_damage_is_found(tmp_path: Path) -> None:
    store = write_store(tmp_path / "s")
    shard = store.folder / store.manifest.shards[0].file
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(UserError, match="bytes, the manifest promises"):
        FeatureStore.open(store.folder)
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    FeatureStore.open(store.folder)
    with pytest.raises(UserError, match="content has changed"):
        FeatureStore.open(store.folder, verify=True)
    shard.unlink()
    with pytest.raises(UserError, match="shard is missing"):
        FeatureStore.open(store.folder)


def test_shards_of_other_shapes_are_refused(tmp_path: Path) -> None:
    store = write_store(tmp_path / "s")
    store.manifest.layer_ids = (1, 2)
    store.manifest.write(store.folder)
    with pytest.raises(UserError, match="tensor hidden is"):
        FeatureStore.open(store.folder)


def test_two_writers_exclude_each_other(tmp_path: Path) -> None:
    with (
        locked(tmp_path / "s"),
        pytest.raises(UserError, match="another afaspec capture"),
        locked(tmp_path / "s"),
    ):
        pass


def test_a_failed_start_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "s"):
        raise ZeroDivisionError
    assert not (tmp_path / "s").exists()


def test_disk_that_fills_up_leaves_no_half_shard(small_disk: Path) -> None:
    folder = small_disk / "s"
    with locked(folder):
        writer = StoreWriter(folder, empty_manifest(), 1 << 30)
        writer.prepare()
        append(writer, random_batch(0))
        writer.flush()
        wide = torch.zeros(40_000, 4 * D, dtype=torch.bfloat16)
        append(writer, [([1] * 40_000, wide[:, : 3 * D], wide[:, 3 * D :])])
        with pytest.raises(UserError, match="the disk is full"):
            writer.flush()
    assert sorted(p.name for p in folder.iterdir()) == ["manifest.json", "shard-00000.safetensors"]
    assert len(FeatureStore.open(folder, allow_incomplete=True, verify=True)) == 3


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda raw: raw["target"].pop("sha256"), "target.sha256"),
        (lambda raw: raw["shards"][0].update(tokens="many"), "shards.0.tokens"),
        (lambda raw: raw["shards"][0].update(token=3), "shards.0.token"),
        (lambda raw: raw.pop("dtype"), "dtype"),
    ],
)
def test_a_garbled_manifest_is_refused_by_name(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], named: str
) -> None:
    manifest = write_store(tmp_path / "store").folder / "manifest.json"
    raw = json.loads(manifest.read_text())
    change(raw)
    manifest.write_text(json.dumps(raw))
    with pytest.raises(UserError, match=f"lacks or garbles '{named}'"):
        FeatureStore.open(tmp_path / "store")


@pytest.mark.parametrize("width", [GROUP, 3 * GROUP, GROUP + 5, 7])
def test_eight_bits_are_within_half_a_step_of_each_group(width: int) -> None:
    torch.manual_seed(0)
    states = torch.randn(6, width) * torch.tensor([1e-6, 1e-2, 1.0, 7.0, 1e4, 0.0]).unsqueeze(1)
    states[2, 3] = 900.0  # as a few channels of a model are
    codes, scales = to_int8(states)
    found = from_int8(codes, scales).float()
    for first in range(0, width, GROUP):
        group = slice(first, first + GROUP)
        most = states[:, group].abs().amax(-1, keepdim=True)
        assert (
            (found - states)[:, group].abs() <= most / 127 * 0.51 + states[:, group].abs() / 256
        ).all()
    assert (codes.dtype, scales.dtype) == (torch.int8, torch.bfloat16)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_still_not_finite_in_eight_bits(value: float) -> None:
    states = torch.randn(3, 2 * GROUP)
    states[1, GROUP + 4] = value
    finite = from_int8(*to_int8(states)).isfinite()
    assert finite[0].all()
    assert finite[1, :GROUP].all()
    assert not finite[1, GROUP:].any()


def test_a_store_in_eight_bits(tmp_path: Path) -> None:
    plain, small = write_store(tmp_path / "a"), write_store(tmp_path / "b", features="int8")
    assert (
        small.manifest.token_bytes == token_bytes(D, 3, "int8") < 0.7 * plain.manifest.token_bytes
    )
    assert small.manifest.content_sha256 != plain.manifest.content_sha256
    for one, two in zip(plain, small, strict=True):
        assert torch.equal(one.input_ids, two.input_ids)
        for name in ("hidden", "final"):
            states, found = getattr(one, name), getattr(two, name)
            assert found.dtype == torch.bfloat16
            assert torch.equal(found, from_int8(*to_int8(states)))
    path = tmp_path / "b" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"features": "bf16"}))
    with pytest.raises(UserError, match="tensor hidden is"):
        FeatureStore.open(tmp_path / "b")


def test_a_store_that_does_not_say_how_states_are_kept_has_bf16(tmp_path: Path) -> None:
    expected = write_store(tmp_path / "s").manifest
    path = tmp_path / "s" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["features"]
    path.write_text(json.dumps(manifest))
    assert FeatureStore.open(tmp_path / "s").manifest == expected

"""Which sequences are held out: by where their prompts begin, on one side each."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from afaspec.store.division import Few, divide
from afaspec.store.manifest import Manifest, TargetRecord
from afaspec.store.read import FeatureStore
from afaspec.store.write import StoreWriter, locked
from bench.prompts.rows import Prompt
from bench.prompts.select import is_held_out
from drafts.errors import UserError

D = 2


def write_store(
    folder: Path, keys: list[str], *, ids: list[int] | None = None, known: bool = True, **side: Any
) -> FeatureStore:
    """A store of one sequence for each of `keys`, where a prompt begins; `ids` are its tokens."""
    target = TargetRecord(path="t", sha256="0", hidden_size=D, vocab_size=9999, num_layers=4)
    manifest = Manifest(target, (1,), "bfloat16", {"seed": 0, **side})
    roots = [Prompt("", text=key, split_key=key).root for key in keys]
    tokens = [[i, i, 1] for i in (ids or range(len(keys)))]
    states = [torch.zeros(3, D)] * len(keys)
    with locked(folder):
        writer = StoreWriter(folder, manifest, 1 << 20)
        writer.prepare()
        half = len(keys) // 2  # two shards
        for part in (slice(half), slice(half, None)) if half else (slice(None),):
            numbers = list(range(len(keys)))[part]
            writer.append(
                tokens[part], [[0, 0, 1]] * len(numbers), numbers, states[part], states[part],
                roots[part] if known else (),
            )  # fmt: skip
            writer.flush()
        writer.finish()
    return FeatureStore.open(folder)


def test_a_growing_log_falls_on_one_side(tmp_path: Path) -> None:
    keys = [f"conversation {i % 60}" for i in range(500)]
    random.Random(0).shuffle(keys)
    store = write_store(tmp_path / "s", keys)
    division, again = divide(store, 0.2), divide(store, 0.2)
    assert division.train.tolist() == again.train.tolist()
    assert division.held_out.tolist() == again.held_out.tolist()
    train, held = ({keys[i] for i in ids} for ids in (division.train, division.held_out))
    assert not train & held
    assert len(train | held) == 60
    assert sorted([*division.train, *division.held_out]) == list(range(500))
    assert 30 < len(division.held_out) < 200
    # The same prompts as `--split eval` would measure on.
    roots = store.roots
    assert roots is not None
    assert {i for i in range(500) if is_held_out(int(roots[i]), 0.2)} == set(division.held_out)


def test_what_is_not_evaluated_is_trained_on(tmp_path: Path) -> None:
    keys = [f"conversation {i % 100}" for i in range(500)]
    division = divide(write_store(tmp_path / "s", keys), 0.5, limit=12)
    assert len(division.held_out) == 12
    train, held = ({keys[i] for i in ids} for ids in (division.train, division.held_out))
    assert not train & held
    assert len(train) == 97  # of three beginnings with five sequences each, twelve are evaluated
    assert (len(division.train), division.dropped) == (485, 3)


def test_sides_of_a_divided_store_are_divided_again(tmp_path: Path) -> None:
    keys = [f"prompt {i}" for i in range(400)]
    train_side = [k for k in keys if not is_held_out(Prompt("", split_key=k).root, 0.3)]
    store = write_store(tmp_path / "s", train_side, split="train", eval_fraction=0.3)
    division = divide(store, 0.25)
    assert 0.15 < len(division.held_out) / len(store) < 0.35
    assert sorted([*division.train, *division.held_out]) == list(range(len(store)))


def test_a_prompt_that_is_evaluated_is_not_trained_on_under_another_name(tmp_path: Path) -> None:
    keys = [f"prompt {i}" for i in range(100)]
    ids = [i % 50 for i in range(100)]  # each token for token twice, by two beginnings
    store = write_store(tmp_path / "s", keys, ids=ids)
    division = divide(store, 0.2)
    held = {ids[i] for i in division.held_out}
    assert not held & {ids[i] for i in division.train}
    assert division.dropped > 0
    seen = {store.prompt_ids(i) for i in range(10)}
    again = divide(store, 0.2, seen=store.prompt_hashes[:10])
    assert not {store.prompt_ids(i) for i in (*again.train, *again.held_out)} & seen


def test_an_old_store_is_divided_by_number(tmp_path: Path) -> None:
    store = write_store(tmp_path / "s", ["the same"] * 40, known=False)
    assert store.roots is None
    division = divide(store, 0.25)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0)).tolist()
    assert division.held_out.tolist() == order[:10]
    assert division.train.tolist() == order[10:]


def test_a_store_without_hashes_of_its_prompts_is_divided_alike(tmp_path: Path) -> None:
    """Stores of an older afaspec have none in their shards."""
    keys, ids = [f"prompt {i}" for i in range(100)], [i % 50 for i in range(100)]
    store = write_store(tmp_path / "s", keys, ids=ids)
    division, hashes = divide(store, 0.2), store.prompt_hashes
    assert len(set(hashes.tolist())) == 50
    for shard in store.manifest.shards:
        path = store.folder / shard.file
        tensors = load_file(path)
        del tensors["prompt_hash"]
        save_file(tensors, path)
    older = FeatureStore(store.folder, store.manifest)
    assert older.prompt_hashes.tolist() == hashes.tolist()
    assert divide(older, 0.2).train.tolist() == division.train.tolist()


def test_few_numbers_are_found_among_many() -> None:
    """Whose last bits are the same, too."""
    values = np.array([5, -3, 7, 7, 2**62, 7 + 2**40, 7 - 2**40])
    few = Few(np.array([7, 2**62, 7, -9, 7 - 2**40]))
    assert few.has(values).tolist() == [False, False, True, True, True, False, True]
    assert few.has(values[:0]).tolist() == []
    assert Few(values[:0]).has(values).tolist() == [False] * 7


@pytest.mark.parametrize("keys", [["one"], ["one"] * 20])
def test_nothing_to_hold_out_is_refused(keys: list[str], tmp_path: Path) -> None:
    store = write_store(tmp_path / "s", keys)
    with pytest.raises(UserError, match="their prompts begin too much alike, or are too few"):
        divide(store, 0.1)
    assert len(divide(write_store(tmp_path / "two", ["one", "two"]), 0.01).held_out) == 1

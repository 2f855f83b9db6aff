"""Replaying and watching other stores: whose turn it is, what is left out, and what is told."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from afaspec.cli.adapt.train import open_inputs
from afaspec.store.read import FeatureStore
from afaspec.train.config import TrainConfig
from afaspec.train.loader import draw, split_sequences, turn_of
from afaspec.train.metrics import training_curve
from afaspec.train.mix import Part, parts_of
from bench.prompts.trained_on import read_roots
from drafts.errors import UserError
from tests.command import run_command
from tests.opened import train
from tests.tiny.store import write_store


@pytest.fixture(scope="module")
def stores(
    tmp_path_factory: pytest.TempPathFactory, tiny_target: Path, tiny_draft: Path
) -> Callable[..., Path]:
    """The store of a name, captured once: `domain`, `general`, or one of the domain's prompts."""
    folder = tmp_path_factory.mktemp("mix")
    kinds: dict[str, dict[str, Any]] = {
        "domain": {"prompts": 16},
        "general": {"prompts": 14, "word": "class"},
        "sampled": {"prompts": 10, "word": "while", "temperature": 1.0},
        "more": {"prompts": 26},  # the domain's and others
        "less": {"prompts": 6},  # some of the domain's
        "other-layers": {"prompts": 4, "word": "class", "layer_ids": "1,2"},
        "other-dtype": {"prompts": 8, "word": "class", "dtype": "bfloat16"},
    }

    def get(name: str) -> Path:
        if not (folder / name).exists():
            settings = {"dtype": "float32", **kinds[name]}
            draft = None if "layer_ids" in settings else tiny_draft
            write_store(folder / name, tiny_target, draft, **settings)
        return folder / name

    return get


@pytest.fixture
def config(
    stores: Callable[[str], Path], tiny_draft: Path, tmp_path: Path
) -> Callable[..., TrainConfig]:
    """A short run's settings; `mix` has shares by the stores' names."""

    def make(out: str = "run", mix: dict[str, float] | None = None, **changes: Any) -> TrainConfig:
        settings: dict[str, Any] = {
            "steps": 6, "eval_every": 2, "checkpoint_every": 2, "batch_size": 5, "rank": 4,
            "eval_fraction": 0.3, "precision": "fp32", "compiled": False, "tensorboard": False,
            "learning_rate": 0.01, "draft_steps": 2,
        }  # fmt: skip
        texts = [f"{stores(name)}={share}" for name, share in (mix or {}).items()]
        return TrainConfig(
            store=stores("domain"),
            draft=tiny_draft,
            out=tmp_path / out,
            mix=texts or None,
            **(settings | changes),
        )

    return make


def parts_for(settings: TrainConfig, notes: list[str] | None = None) -> list[Part]:
    store, draft, target = open_inputs(settings)
    split = split_sequences(store, settings)
    return parts_of(settings, store, split, draft, target, ([] if notes is None else notes).append)


@pytest.mark.parametrize("shares", [[], ["0.2"], ["0"], ["0.25", "1/3"], ["0.1", "0", "0.85"]])
def test_turns_are_shared_out_evenly_and_none_is_skipped(shares: list[str]) -> None:
    exact = [Fraction(share) for share in shares]
    turns: Counter[int] = Counter()
    for number in range(400):
        whose, before = turn_of(number, exact)
        assert before == turns[whose]
        turns[whose] += 1
        for other, share in enumerate(exact, 1):
            assert abs(turns[other] - share * (number + 1)) <= len(exact)
    assert turns[0] == 400 - sum(turns[number] for number in range(1, len(exact) + 1))


def test_the_domains_own_sequences_keep_their_order(config: Callable[..., TrainConfig]) -> None:
    mixed = config(mix={"general": 0.2})
    alone, parts = parts_for(config()), parts_for(mixed)
    for side in ("train", "held_out"):
        assert getattr(alone[0], side).tolist() == getattr(parts[0], side).tolist()
    drawn = [one for batch in range(10) for one in draw(parts, mixed, batch)]
    assert Counter(number for number, _ in drawn) == {0: 40, 1: 10}
    own = [one for one in drawn if one[0] == 0]
    assert own == [one for batch in range(8) for one in draw(alone, mixed, batch)]
    replayed = [index for number, index in drawn if number]
    assert len(set(replayed)) == min(10, len(parts[1].train))
    assert set(replayed) <= set(parts[1].train)


def roots(part: Part, side: str) -> set[int]:
    found: list[int] = part.roots(getattr(part, side)).tolist()
    assert found
    return set(found)


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_nothing_is_trained_on_that_is_held_out(
    share: float, config: Callable[..., TrainConfig]
) -> None:
    """Of a store that has all of the domain's prompts and others."""
    notes: list[str] = []
    domain, more = parts_for(config(mix={"more": share}), notes)
    assert "16 of 26 sequences are left out" in notes[0]
    prompts = [
        {part.store.prompt_ids(i) for i in side}
        for part in (domain, more)
        for side in (part.train, part.held_out)
    ]
    assert all(prompts)
    assert sum(map(len, prompts)) == len(set.union(*prompts))
    assert not roots(domain, "held_out") & roots(more, "train")
    assert not roots(more, "held_out") & roots(domain, "train")


def test_watching_alone_changes_no_weight(config: Callable[..., TrainConfig]) -> None:
    plain, watching = config("plain"), config("watching", {"general": 0, "sampled": 0})
    train(plain)
    trained = train(watching)
    weights = [
        load_file(out / "checkpoint" / "trainable.safetensors") for out in (plain.out, watching.out)
    ]
    assert all(torch.equal(weights[1][name], tensor) for name, tensor in weights[0].items())
    rows = [
        [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        for out in (plain.out, watching.out)
    ]
    for one, two in zip(*rows, strict=True):
        assert one.items() <= two.items()
    assert {"general/acceptance_length", "sampled/agreement_length"} <= rows[1][0].keys()
    assert read_roots(plain.out) == read_roots(watching.out)
    assert [one.name for one in trained.watched] == ["general", "sampled"]
    assert trained.watched[0].before == rows[1][0]["general/acceptance_length"]
    best = next(row for row in rows[1] if row["step"] == trained.best_step)
    assert trained.watched[0].after == best["general/acceptance_length"]
    curve = training_curve(watching.out)
    assert curve["general/acceptance_length"][0] == trained.watched[0].before


def test_a_mixed_run_learns_from_both_and_goes_on_where_it_was(
    config: Callable[..., TrainConfig], stores: Callable[[str], Path]
) -> None:
    class StopNowError(Exception):
        pass

    def stop(row: dict[str, Any]) -> None:
        if row["step"] == 3:
            raise StopNowError

    whole, parts = config("whole", {"general": 0.4}), config("parts", {"general": 0.4})
    train(whole)
    with pytest.raises(StopNowError):
        train(parts, stop)
    trained = train(parts)
    assert (whole.out / "metrics.jsonl").read_text() == (parts.out / "metrics.jsonl").read_text()
    again = train(parts)
    assert again.before
    assert again.watched == trained.watched
    domain, general = parts_for(parts)
    assert read_roots(parts.out) == roots(domain, "train") | roots(general, "train")
    (told,) = json.loads((parts.out / "manifest.json").read_text())["mix"]
    assert told["share"] == 0.4
    for mix in ({"general": 0.2}, {"sampled": 0.4}, None):
        with pytest.raises(UserError, match="belongs to a run with another mix"):
            train(config("parts", mix))
    alone = config("alone")
    train(alone)
    with pytest.raises(UserError, match="belongs to a run with another mix"):
        train(config("alone", {"general": 0.4}))


BAD: dict[str, str] = {
    "general": "expected STORE=SHARE",
    "general=": "expected STORE=SHARE",
    "=0.2": "expected STORE=SHARE",
    "general=1": "expected STORE=SHARE",
    "general=-0.1": "expected STORE=SHARE",
    "general=nan": "expected STORE=SHARE",
    "general=1/0": "expected STORE=SHARE",
    "nowhere=0.2": "no such folder",
    "domain=0.2": "is mixed with itself",
    "less=0.2": "has no prompts of its own",
    "other-layers=0.2": "holds layers [1, 2], the draft reads",
    "other-dtype=0": "holds states computed in bfloat16",
}


@pytest.mark.parametrize("text", BAD)
def test_a_store_that_cannot_be_mixed_is_refused(
    text: str, stores: Callable[[str], Path], tiny_draft: Path, tmp_path: Path
) -> None:
    name, _, share = text.partition("=")
    path = stores(name) if name not in ("", "nowhere") else name and tmp_path / name
    given = f"{path}={share}" if "=" in text else str(path)
    out = tmp_path / "out"
    code, error = run_command(
        "train", "--store", stores("domain"), "--draft", tiny_draft, "--out", out, "--mix", given,
        "--eval-fraction", 0.3,
    )  # fmt: skip
    assert code == 2
    assert BAD[text] in error
    assert not out.exists()


def test_shares_leave_something_to_the_domain(
    stores: Callable[[str], Path], tiny_draft: Path, tmp_path: Path
) -> None:
    flags = ["--mix", f"{stores('general')}=0.5", "--mix", f"{stores('more')}=0.5"]
    code, error = run_command(
        "train", "--store", stores("domain"), "--draft", tiny_draft, "--out", tmp_path / "o", *flags
    )
    assert code == 2
    assert "the shares leave nothing to --store" in error


def test_a_store_given_twice_is_refused(config: Callable[..., TrainConfig]) -> None:
    twice = config(mix={"general": 0.1})
    twice = twice.model_copy(update={"mix": [*(twice.mix or []), *(twice.mix or [])]})
    with pytest.raises(UserError, match="is mixed with itself"):
        train(twice)


def test_a_store_of_another_target_is_refused(
    config: Callable[..., TrainConfig], stores: Callable[[str], Path], tmp_path: Path
) -> None:
    settings = config(mix={"general": 0.1})
    store, draft, target = open_inputs(settings)
    other = FeatureStore.open(stores("general"))
    other.manifest.target["sha256"] = "0" * 64
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for path in stores("general").iterdir():
        (foreign / path.name).symlink_to(path)
    (foreign / "manifest.json").unlink()
    other.manifest.write(foreign)
    settings = settings.model_copy(update={"mix": [f"{foreign}=0.1"]})
    with pytest.raises(UserError, match="was captured from another target"):
        parts_of(settings, store, split_sequences(store, settings), draft, target)


def test_the_command_says_what_was_kept(
    config: Callable[..., TrainConfig], stores: Callable[[str], Path], tiny_draft: Path
) -> None:
    out = config().out
    command = [
        "train", "--store", stores("domain"), "--draft", tiny_draft, "--out", out, "--steps", 1,
        "--mix", f"{stores('general')}=0.2", "--mix", f"{stores('sampled')}=0", "--no-compiled",
        "--no-tensorboard", "--precision", "fp32", "--eval-fraction", 0.3,
    ]  # fmt: skip
    for _ in range(2):  # the second time it is finished already
        code, output = run_command(*command)
        assert code == 0
        assert re.search(r"\bgeneral: \d\.\d\d before, \d\.\d\d after \(\d+% kept\)", output)
        assert re.search(r"\bsampled: agreement \d\.\d\d before, \d\.\d\d after", output)

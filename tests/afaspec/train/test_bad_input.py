"""Bad input to `afaspec train` and `merge`: one clear error, exit code 2, nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from afaspec.train.config import TrainConfig
from tests.command import run_command
from tests.opened import train
from tests.tiny.models import draft_config, write_draft, write_target
from tests.tiny.store import write_store


@dataclass
class Place:
    """Own copies to spoil: a store, a draft, and a finished AFA-LoRA run."""

    folder: Path
    target: Path
    draft: Path
    store: Path
    run: Path

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def train(self, *flags: object, store: Path | None = None, draft: Path | None = None) -> list:
        paths = ["--store", store or self.store, "--draft", draft or self.draft]
        return ["train", *paths, "--out", self.out, *flags]

    def merge(self, run: Path, *flags: object) -> list[object]:
        return ["merge", run, "--out", self.out, *flags]

    def own(self, path: Path) -> Path:
        return Path(shutil.copytree(path, self.folder / f"own-{path.name}"))

    def spoiled(self, name: str, where: Any, value: float, run: Path | None = None) -> Path:
        """A copy of the run with one trained tensor (the end of its name) changed."""
        run = run or self.own(self.run)
        path = run / "adapter" / "adapter_model.safetensors"
        tensors = load_file(path)
        (full,) = (key for key in tensors if key.endswith(name))
        tensors[full][where] = value
        save_file(tensors, path)
        return run

    def edited_draft(self, **changes: Any) -> Path:
        return write_draft(self.folder / "draft", **changes)

    def yaml(self, text: str) -> Path:
        path = self.folder / "train.yaml"
        path.write_text(text)
        return path


Case = tuple[str, Callable[[Place], list[object]]]
CASES: dict[str, Case] = {}


def case(expected: str) -> Callable[[Callable[[Place], list[object]]], None]:
    def register(prepare: Callable[[Place], list[object]]) -> None:
        CASES[prepare.__name__] = (expected, prepare)

    return register


@case("unknown setting learning_rat")
def unknown_key(p: Place) -> list[object]:
    return p.train("--config", p.yaml("rank: 4\nlearning_rat: 0.1\n"))


@case("train.yaml:2")
def unknown_key_names_its_line(p: Place) -> list[object]:
    return p.train("--config", p.yaml("rank: 4\nlearning_rat: 0.1\n"))


@case("is not valid YAML")
def broken_yaml(p: Place) -> list[object]:
    return p.train("--config", p.yaml("rank: [4\n"))


@case("no such file")
def missing_yaml(p: Place) -> list[object]:
    return p.train("--config", p.folder / "none.yaml")


@case("annealing.shape is 'zigzag'")
def unknown_shape(p: Place) -> list[object]:
    return p.train("--annealing-shape", "zigzag")


@case("begin before it ends")
def annealing_backwards(p: Place) -> list[object]:
    return p.train("--annealing-start", "0.8", "--annealing-end", "0.2")


@case("arm is 'dora'")
def unknown_arm(p: Place) -> list[object]:
    return p.train("--arm", "dora")


@case("--init is 'gradeint': choose gradient, default, gaussian, orthogonal, olora, pissa")
def init_misspelled(p: Place) -> list[object]:
    return p.train("--init", "gradeint")


@case("train.yaml:1")
def init_misspelled_in_a_file(p: Place) -> list[object]:
    return p.train("--config", p.yaml("init: True Gradient\n"))


@case("--init is 'eva'")
def init_that_needs_data_of_its_own(p: Place) -> list[object]:
    return p.train("--init", "eva")


@case("init orthogonal needs an even rank; the rank is 3")
def init_of_an_odd_rank(p: Place) -> list[object]:
    return p.train("--init", "orthogonal", "--rank", "3")


@case("rank is 200, but layers.0.self_attn.q_proj is [128, 256]: with init pissa it has 128")
def init_of_more_directions_than_there_are(p: Place) -> list[object]:
    return p.train("--init", "pissa", "--rank", "200", "--modules", "q_proj")


@case("--learning-rate is inf")
def infinite_rate(p: Place) -> list[object]:
    return p.train("--learning-rate", "inf")


@case("--alpha is nan")
def alpha_that_is_no_number(p: Place) -> list[object]:
    return p.train("--alpha", "nan")


@case("rank is 0")
def rank_of_zero(p: Place) -> list[object]:
    return p.train("--rank", "0")


@case("activation is 'softplus'")
def unknown_activation(p: Place) -> list[object]:
    return p.train("--arm", "afa-lora", "--activation", "softplus")


@case("annealing is of the arm afa-lora; the arm is lora")
def annealed_lora(p: Place) -> list[object]:
    return p.train("--annealing-end", "0.3")


@case("modules names qkv")
def unknown_modules(p: Place) -> list[object]:
    return p.train("--modules", "qkv")


@case("the setting store is missing")
def missing_store_flag(p: Place) -> list[object]:
    return ["train", "--draft", p.draft, "--out", p.out]


@case("no such folder")
def missing_draft(p: Place) -> list[object]:
    return p.train(draft=p.folder / "nowhere")


@case("is not a feature store")
def store_is_something_else(p: Place) -> list[object]:
    return p.train(store=p.target)


@case("says MLPSpeculatorPreTrainedModel")
def draft_of_an_unknown_family(p: Place) -> list[object]:
    return p.train(draft=p.edited_draft(architectures=["MLPSpeculatorPreTrainedModel"]))


@case("is the target itself")
def target_given_as_draft(p: Place) -> list[object]:
    return p.train(draft=p.target)


@case("is not valid JSON")
def draft_config_broken(p: Place) -> list[object]:
    draft = p.edited_draft()
    (draft / "config.json").write_text('{"architectures": [')
    return p.train(draft=draft)


@case("is truncated or damaged")
def draft_truncated(p: Place) -> list[object]:
    draft = p.edited_draft()
    weights = draft / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return p.train(draft=draft)


@case("its header is not whole")
def draft_truncated_in_its_header(p: Place) -> list[object]:
    draft = p.edited_draft()
    weights = draft / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:50])
    return p.train(draft=draft)


@case("only pytorch_model.bin, a pickle")
def draft_is_a_pickle(p: Place) -> list[object]:
    draft = p.edited_draft()
    (draft / "model.safetensors").rename(draft / "pytorch_model.bin")
    return p.train(draft=draft)


@case("lm_head.weight is [320, 128], the config says [300, 128]")
def draft_sizes_disagree(p: Place) -> list[object]:
    return p.train(draft=p.edited_draft(draft_vocab_size=300))


@case("no d2t tensor")
def draft_without_map(p: Place) -> list[object]:
    draft = p.edited_draft()
    tensors = load_file(draft / "model.safetensors")
    del tensors["d2t"]
    save_file(tensors, draft / "model.safetensors")
    return p.train(draft=draft)


@case("d2t points outside the vocabulary")
def draft_map_out_of_range(p: Place) -> list[object]:
    draft = p.edited_draft()
    tensors = load_file(draft / "model.safetensors")
    tensors["d2t"][-1] = 10_000
    save_file(tensors, draft / "model.safetensors")
    return p.train(draft=draft)


@case("its vocabulary has 600 tokens, the target's 512")
def draft_of_another_vocabulary(p: Place) -> list[object]:
    return p.train(draft=p.edited_draft(vocab_size=600))


@case("expected distinct layer numbers")
def draft_layer_ids_twice(p: Place) -> list[object]:
    return p.train(draft=p.edited_draft(eagle_aux_hidden_state_layer_ids=[1, 1, 2]))


@case("holds layers [1, 2, 3], the draft reads [0, 1, 2]")
def draft_of_other_layers(p: Place) -> list[object]:
    return p.train(draft=p.edited_draft(eagle_aux_hidden_state_layer_ids=[0, 1, 2]))


@case("holds layers [1, 2, 3], the draft reads [2, 2, 1]")
def draft_without_layer_ids(p: Place) -> list[object]:
    draft = p.edited_draft()
    config = draft_config()
    del config["eagle_aux_hidden_state_layer_ids"]
    (draft / "config.json").write_text(json.dumps(config))
    return p.train(draft=draft)


@case("was captured from another target")
def store_of_another_target(p: Place) -> list[object]:
    return p.train("--target", write_target(p.folder / "other", seed=9))


@case("which this config makes (and 8 more)")
def draft_with_two_layers(p: Place) -> list[object]:
    return p.train(draft=p.edited_draft(num_hidden_layers=2))


@case("belongs to a run with another rank (4, now 9)")
def folder_of_another_run(p: Place) -> list[object]:
    shutil.copytree(p.run, p.out)
    (p.out / "manifest.json").unlink()
    same = ["--steps", "6", "--eval-every", "6", "--no-compiled", "--no-tensorboard"]
    return p.train("--rank", "9", *same)


@case("belongs to a run with another rank (4, now 9)")
def folder_of_another_finished_run(p: Place) -> list[object]:
    shutil.copytree(p.run, p.out)
    same = ["--steps", "6", "--eval-every", "6", "--no-compiled", "--no-tensorboard"]
    return p.train("--rank", "9", *same)


@case("belongs to a run with another draft (hash")
def folder_of_a_run_of_another_draft(p: Place) -> list[object]:
    shutil.copytree(p.run, p.out)
    other = write_draft(p.folder / "other", seed=5)
    return p.train("--rank", "4", "--steps", "6", draft=other)


@case("belongs to a run with another store (hash")
def folder_of_a_run_on_another_store(p: Place) -> list[object]:
    shutil.copytree(p.run, p.out)
    store = p.own(p.store)
    manifest = json.loads((store / "manifest.json").read_text())
    manifest["settings"]["prompts_sha256"] = "of others"
    (store / "manifest.json").write_text(json.dumps(manifest))
    return p.train("--rank", "4", "--steps", "6", store=store)


@case("belongs to a run of 6 steps, now it is 5: a run can be prolonged, not cut short")
def run_cut_short(p: Place) -> list[object]:
    shutil.copytree(p.run, p.out)
    return p.train("--rank", "4", "--steps", "5")


@case("fc.lora_A.weight has 1 of 1,536 values that are NaN")
def merge_of_one_nan(p: Place) -> list[object]:
    return p.merge(p.spoiled("fc.lora_A.weight", (0, 0), float("nan")))


@case("lora_B.weight has 1 of 512 values that are NaN or infinite")
def merge_of_one_infinity(p: Place) -> list[object]:
    return p.merge(p.spoiled("q_proj.lora_B.weight", (3, 1), float("-inf")))


@case("fc.weight would be NaN or infinite in bfloat16")
def merge_that_overflows(p: Place) -> list[object]:
    run = p.spoiled("fc.lora_A.weight", slice(None), 1e38)
    return p.merge(p.spoiled("fc.lora_B.weight", slice(None), 1e38, run))


@case("would be NaN or infinite in bfloat16")
def merge_with_an_infinite_alpha(p: Place) -> list[object]:
    run = p.own(p.run)
    config = run / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": float("inf")}))
    return p.merge(run)


@case("is not an annealing record")
def merge_with_a_beta_that_is_no_number(p: Place) -> list[object]:
    run = p.own(p.run)
    record = run / "adapter" / "annealing.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"beta": float("nan")}))
    return p.merge(run)


@case("still non-linear (beta = 0.5)")
def merge_before_the_end(p: Place) -> list[object]:
    run = p.own(p.run)
    record = run / "adapter" / "annealing.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"beta": 0.5}))
    return p.merge(run)


@case("neither an adapter nor trained weights")
def merge_of_nothing(p: Place) -> list[object]:
    return p.merge(p.target)


@case("is not an annealing record")
def merge_with_a_damaged_record(p: Place) -> list[object]:
    run = p.own(p.run)
    (run / "adapter" / "annealing.json").write_text('{"beta": 0}')
    return p.merge(run)


@case("is truncated or damaged")
def merge_of_a_truncated_adapter(p: Place) -> list[object]:
    run = p.own(p.run)
    weights = run / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    return p.merge(run)


@case("is not the draft that was adapted")
def merge_into_another_draft(p: Place) -> list[object]:
    return p.merge(p.run, "--draft", write_draft(p.folder / "other", seed=5))


@case("was trained for another draft")
def merge_of_an_adapter_of_other_sizes(p: Place) -> list[object]:
    bare = p.own(p.run / "adapter")
    weights = bare / "adapter_model.safetensors"
    tensors = {name: torch.cat([t, t], dim=-1) for name, t in load_file(weights).items()}
    save_file(tensors, weights)
    return p.merge(bare, "--draft", p.draft, "--target", p.target)


@case("is the base draft itself")
def merge_onto_the_base(p: Place) -> list[object]:
    return ["merge", p.run, "--out", p.draft]


@case("is there already")
def merge_over_other_files(p: Place) -> list[object]:
    p.own(p.target).rename(p.out)
    return p.merge(p.run)


@case("is there already")
def merge_over_its_own_run(p: Place) -> list[object]:
    shutil.copytree(p.run, p.out)
    return p.merge(p.out)


@case("is there already")
def merge_over_a_file(p: Place) -> list[object]:
    p.out.write_text("mine")
    return p.merge(p.run)


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, tiny_target: Path, tiny_draft: Path
) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("bad")
    store = write_store(folder / "store", tiny_target, tiny_draft)
    settings = TrainConfig(
        store=store, draft=tiny_draft, out=folder / "run", rank=4, steps=6, eval_every=6,
        compiled=False, tensorboard=False,
    )  # fmt: skip
    train(settings)
    return store, folder / "run"


@pytest.mark.parametrize("name", CASES)
def test_one_clear_error(
    name: str, made: tuple[Path, Path], tiny_target: Path, tiny_draft: Path, tmp_path: Path
) -> None:
    expected, prepare = CASES[name]
    place = Place(tmp_path, tiny_target, tiny_draft, *made)
    arguments = prepare(place)
    before = {p: p.stat().st_mtime_ns for p in place.out.rglob("*")} if place.out.exists() else {}
    code, error = run_command(*arguments)
    text = " ".join(error.split())
    assert code == 2, text
    assert expected in text
    assert text.count("Error:") == 1
    assert "Traceback" not in text
    assert "To mend it:" in text
    after = {p: p.stat().st_mtime_ns for p in place.out.rglob("*")} if place.out.exists() else {}
    assert after == before

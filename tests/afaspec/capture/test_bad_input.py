"""Bad input to `afaspec capture`: one clear error, exit code 2, and nothing written."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from afaspec.capture.config import CaptureConfig
from tests.command import run_command
from tests.opened import capture


@dataclass
class Place:
    """Where a case prepares its mistake: own copies of target and store, a good prompts file."""

    folder: Path
    target: Path
    draft: Path
    store: Path

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def rows(self, *lines: object) -> Path:
        """A prompts file; what is not text already becomes JSON."""
        path = self.folder / "rows.jsonl"
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        path.write_text("".join(f"{text}\n" for text in texts))
        return path

    def good(self) -> Path:
        return self.rows(*({"prompt": f"def f{i}(x):\n"} for i in range(6)))

    def own_target(self) -> Path:
        return Path(shutil.copytree(self.target, self.folder / "target"))

    def own_store(self) -> Path:
        return Path(shutil.copytree(self.store, self.out))


Case = tuple[Callable[[Place], list[object]], str]
CASES: dict[str, Case] = {}


def case(expected: str) -> Callable[[Callable[[Place], list[object]]], None]:
    """Register a case: the function prepares it and returns the command's arguments."""

    def register(prepare: Callable[[Place], list[object]]) -> None:
        CASES[prepare.__name__] = (prepare, expected)

    return register


def prompts_case(name: str, expected: str, *lines: object) -> None:
    def prepare(place: Place) -> list[object]:
        return [place.target, place.rows(*lines), *LAYERS]

    CASES[name] = (prepare, expected)


def flags_case(name: str, expected: str, *flags: object) -> None:
    def prepare(place: Place) -> list[object]:
        return [place.target, place.good(), *flags]

    CASES[name] = (prepare, expected)


LAYERS = ("--layer-ids", "1,2,3", "--max-new-tokens", "4")
OK = {"prompt": "fine"}
USER = {"role": "user", "content": "q"}

prompts_case("malformed_json", "rows.jsonl:2: is not valid JSON", OK, '{"prompt": "x"')
prompts_case("empty_file", "rows.jsonl: holds no prompts")
prompts_case("row_is_a_list", "rows.jsonl:2: found a list; expected", OK, ["x"])
prompts_case(
    "unknown_fields", "rows.jsonl:1: found a row with body, title", {"title": 1, "body": 2}
)
prompts_case("messages_not_a_list", '"messages" is text', {"messages": "hello"})
prompts_case("no_messages", '"messages" is empty: a list', {"messages": []})
prompts_case("message_not_an_object", '"messages"[0] is text', {"messages": ["q"]})
prompts_case("content_not_text", "[0] is a number; expected text",
             {"messages": [{"role": "user", "content": 7}]})  # fmt: skip
prompts_case("unknown_role", "[1] has the role 'robot'",
             {"messages": [USER, {"role": "robot", "content": "x"}]})  # fmt: skip
prompts_case("nobody_asks", "has no user message", {"messages": [{**USER, "role": "assistant"}]})
prompts_case("empty_prompt", 'rows.jsonl:3: "prompt" is empty', OK, OK, {"prompt": ""})
prompts_case("blank_text", '"text" is empty', {"text": " \n "})
prompts_case("prompt_is_null", '"prompt" is null', {"prompt": None})
prompts_case("no_turns", '"turns" is empty: a list', {"turns": []})
prompts_case("response_not_text", '"response" is a list', {"prompt": "q", "response": ["a"]})
prompts_case("bad_rows_together", "2 of its 3 rows cannot be used", OK, {"prompt": ""}, "{half")
prompts_case("longer_than_the_model", "rows.jsonl:2: the prompt has", OK, {"prompt": "a b " * 900})

flags_case("longer_than_allowed", "expected at most 2 (as --max-prompt-tokens says)",
           *LAYERS, "--max-prompt-tokens", "2")  # fmt: skip
flags_case("no_room_for_a_prompt", "leave no room for a prompt: the target has 1024 positions",
           "--layer-ids", "1,2,3", "--max-new-tokens", "1024")  # fmt: skip
flags_case("layer_out_of_range", "9 is out of range, the target has layers 0 to 4",
           "--layer-ids", "1,2,9")  # fmt: skip
flags_case("layer_twice", "expected distinct layer ids", "--layer-ids", "1,2,2")
flags_case("layers_in_words", "expected distinct layer ids", "--layer-ids", "low,mid,high")
flags_case("default_layers_coincide", "are not distinct")
flags_case("negative_temperature", "temperature is", *LAYERS, "--temperature", "-1")
flags_case("limit_zero", "limit is 0", *LAYERS, "--limit", "0")
flags_case("unknown_split", "split is 'test'", *LAYERS, "--split", "test")
flags_case("unknown_dtype", "dtype is 'int4'", *LAYERS, "--dtype", "int4")
flags_case("no_such_draft", "no such folder", "--draft", "/nowhere/draft")
flags_case("field_without_a_path", "expected NAME=PATH", *LAYERS, "--field", "messages")
flags_case("no_response_to_take", "rows.jsonl:1: has no response to take",
           *LAYERS, "--use-responses")  # fmt: skip


@case("rows.jsonl:2: found byte 0xe9 at column 13, expected UTF-8")
def not_utf8(place: Place) -> list[object]:
    path = place.good()
    path.write_bytes(b'{"prompt": "a"}\n' + '{"prompt": "é"}\n'.encode("latin-1"))
    return [place.target, path, *LAYERS]


@case("missing.jsonl: no such file or folder")
def missing_prompts(place: Place) -> list[object]:
    return [place.target, place.folder / "missing.jsonl", *LAYERS]


@case("as a hub dataset it could not be fetched")
def dataset_without_network(place: Place) -> list[object]:
    return [place.target, "owner/no-such-dataset", *LAYERS]


@case("rows.jsonl.gz:7: is not a whole gzip file")
def half_a_gzip_file(place: Place) -> list[object]:
    path = place.folder / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(place.good().read_bytes())[:-9])
    return [place.target, path, *LAYERS]


@case("src: holds no usable text file")
def folder_without_sources(place: Place) -> list[object]:
    source = place.folder / "src"
    source.mkdir()
    (source / "program.h").write_bytes(b"\0binary" * 400)
    return [place.target, source, *LAYERS]


@case("the target's tokenizer has no chat template")
def no_chat_template(place: Place) -> list[object]:
    target = place.own_target()
    (target / "chat_template.jinja").unlink()
    rows = place.rows({"messages": [{"role": "system", "content": "s"}, USER]})
    return [target, rows, *LAYERS]


@case("refused this conversation (no system role, please)")
def template_refuses(place: Place) -> list[object]:
    target = place.own_target()
    template = "{{ raise_exception('no system role, please') }}"
    (target / "chat_template.jinja").write_text(template)
    return [target, place.rows({"messages": [{"role": "system", "content": "s"}, USER]}), *LAYERS]


def yaml_case(name: str, text: str, expected: str) -> None:
    def prepare(place: Place) -> list[object]:
        (place.folder / "c.yaml").write_text(text)
        return [place.target, place.good(), *LAYERS, "--config", place.folder / "c.yaml"]

    CASES[name] = (prepare, expected)


yaml_case("unknown_key", "seed: 1\ntemprature: 1\n", "c.yaml:2: unknown setting temprature")
yaml_case("wrong_value_type", "limit: many\n", "c.yaml:1: limit is 'many'")
yaml_case("not_yaml", "seed: [1\nlimit: 3\n", "is not valid YAML")
yaml_case("yaml_list", "- seed\n", "c.yaml: holds no `name: value` lines")


@case("no such file")
def missing_config(place: Place) -> list[object]:
    return [place.target, place.good(), *LAYERS, "--config", place.folder / "none.yaml"]


@case("no such model folder")
def missing_target(place: Place) -> list[object]:
    return [place.folder / "none", place.good(), *LAYERS]


@case("config.json: no such file")
def target_without_config(place: Place) -> list[object]:
    target = place.own_target()
    (target / "config.json").unlink()
    return [target, place.good(), *LAYERS]


KWARGS = "--chat-template-kwargs"


@case("--chat-template-kwargs is '{half': not JSON (Expecting property name")
def template_kwargs_that_are_no_json(place: Place) -> list[object]:
    return [place.target, place.good(), *LAYERS, KWARGS, "{half"]


@case("--chat-template-kwargs is '[1]': not a JSON object")
def template_kwargs_that_are_a_list(place: Place) -> list[object]:
    return [place.target, place.good(), *LAYERS, KWARGS, "[1]"]


@case(
    "--chat-template-kwargs has 'enable_thinking', which the target's chat template does not read"
)
def template_kwargs_that_are_not_read(place: Place) -> list[object]:
    return [place.target, place.good(), *LAYERS, KWARGS, '{"enable_thinking": false}']


@case("target: the target's chat template is not valid Jinja")
def template_with_a_mistake(place: Place) -> list[object]:
    target = place.own_target()
    (target / "chat_template.jinja").write_text("{% for m in messages %}")
    return [target, place.good(), *LAYERS, KWARGS, '{"enable_thinking": false}']


@case("--chat-date is 'yesterday': Invalid isoformat string")
def a_date_that_is_none(place: Place) -> list[object]:
    return [place.target, place.good(), *LAYERS, "--chat-date", "yesterday"]


@case("model.safetensors: is truncated")
def truncated_target(place: Place) -> list[object]:
    weights = place.own_target() / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return [weights.parent, place.good(), *LAYERS]


@case("its weights lack or misshape 1 tensors that its config asks for, such as model.norm.weight")
def target_lacks_a_tensor(place: Place) -> list[object]:
    from safetensors.torch import load_file, save_file

    weights = place.own_target() / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.norm.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    return [weights.parent, place.good(), *LAYERS]


@case("config.json: transformers cannot read this model's config")
def unknown_architecture(place: Place) -> list[object]:
    config = place.own_target() / "config.json"
    values = json.loads(config.read_text())
    values["model_type"] = "a-model-of-tomorrow"
    config.write_text(json.dumps(values))
    return [config.parent, place.good(), *LAYERS]


@case("has no tokenizer")
def target_without_tokenizer(place: Place) -> list[object]:
    target = place.own_target()
    (target / "tokenizer.json").unlink()
    return [target, place.good(), *LAYERS]


@case("its tokenizer cannot be loaded")
def damaged_tokenizer(place: Place) -> list[object]:
    target = place.own_target()
    (target / "tokenizer.json").write_text("{}")
    return [target, place.good(), *LAYERS]


@case("is outside the target's vocabulary of 512")
def tokenizer_of_another_model(place: Place) -> list[object]:
    from tests.tiny.models import write_tokenizer

    target = place.own_target()
    write_tokenizer(target, 700)
    rows = place.rows({"prompt": "argument parser formatter conflict_handler namespace"})
    return [target, rows, *LAYERS]


@case("this folder cannot be made (File exists)")
def out_is_a_file(place: Place) -> list[object]:
    place.out.write_text("mine")
    return [place.target, place.good(), *LAYERS]


@case("is a folder with other files in it")
def out_is_a_foreign_folder(place: Place) -> list[object]:
    place.out.mkdir()
    (place.out / "thesis.tex").write_text("mine")
    return [place.target, place.good(), *LAYERS]


@case("this folder cannot be made")
def out_cannot_be_written(place: Place) -> list[object]:
    return [place.target, place.good(), *LAYERS, "--out", "/proc/self/store"]


@case("captured with other settings: max_new_tokens was 4, now it is 5")
def store_of_other_settings(place: Place) -> list[object]:
    place.own_store()
    return [place.target, place.good(), "--layer-ids", "1,2,3", "--max-new-tokens", "5"]


@case("captured with other settings: layer_ids was [1, 2, 3], now it is [0, 2, 3]")
def store_of_other_layers(place: Place) -> list[object]:
    place.own_store()
    return [place.target, place.good(), "--layer-ids", "0,2,3", "--max-new-tokens", "4"]


@case("captured with other settings: target was")
def store_of_another_target(place: Place) -> list[object]:
    from tests.tiny.models import write_target

    place.own_store()
    return [write_target(place.folder / "other", seed=9), place.good(), *LAYERS]


@case("captured with other settings: the prompts' content was")
def store_of_other_prompts(place: Place) -> list[object]:
    place.own_store()
    return [place.target, place.rows(*[{"prompt": f"class C{i}:\n"} for i in range(6)]), *LAYERS]


def damaged_store(name: str, expected: str, damage: Callable[[Path], Any]) -> None:
    def prepare(place: Place) -> list[object]:
        damage(place.own_store())
        return [place.target, place.good(), *LAYERS]

    CASES[name] = (prepare, expected)


def flip_last_byte(store: Path) -> None:
    shard = store / "shard-00000.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def shorten_shard(store: Path) -> None:
    shard = store / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-64])


SHARD = "shard-00000.safetensors"
damaged_store("changed_shard", "content has changed since it was captured", flip_last_byte)
damaged_store("truncated_shard", "bytes, the manifest promises", shorten_shard)
damaged_store("missing_shard", "shard is missing", lambda store: (store / SHARD).unlink())
damaged_store("garbled_manifest", "manifest.json:1: is not valid JSON",
              lambda store: (store / "manifest.json").write_text("{half"))  # fmt: skip
damaged_store("foreign_manifest", "expected 'afaspec-features/1'",
              lambda store: (store / "manifest.json").write_text('{"format": "x"}'))  # fmt: skip
damaged_store("manifest_without_layers", "lacks or garbles 'layer_ids'",
              lambda store: drop_key(store / "manifest.json", "layer_ids"))  # fmt: skip


def drop_key(path: Path, key: str) -> None:
    values = json.loads(path.read_text())
    del values[key]
    path.write_text(json.dumps(values))


@pytest.fixture(scope="module")
def good_store(
    tiny_target: Path, tiny_draft: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    place = Place(tmp_path_factory.mktemp("good"), tiny_target, tiny_draft, Path())
    config = CaptureConfig(
        target=str(tiny_target),
        prompts=str(place.good()),
        out=place.out,
        layer_ids="1,2,3",
        max_new_tokens=4,
    )
    capture(config)
    return place.out


@pytest.fixture
def place(tmp_path: Path, tiny_target: Path, tiny_draft: Path, good_store: Path) -> Place:
    return Place(tmp_path, tiny_target, tiny_draft, good_store)


def snapshot(path: Path) -> dict[str, str]:
    """Every file under `path` by its content's hash; empty if there is none."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 60


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name: str, place: Place) -> None:
    prepare, expected = CASES[name]
    arguments = prepare(place)
    if "--out" not in arguments:
        arguments += ["--out", place.out]
    existed, before = place.out.exists(), snapshot(place.out)
    code, error = run_command("capture", *arguments)
    assert code == 2
    assert expected in error
    assert sum(line.startswith("Error: ") for line in error.splitlines()) == 1
    assert "To mend it:" in error
    assert "Traceback" not in error
    assert snapshot(place.out) == before
    assert place.out.exists() == existed


def test_a_real_process_exits_with_2_and_no_traceback(place: Place) -> None:
    rows = place.rows(OK, '{"prompt"')
    command = [sys.executable, "-m", "afaspec", "capture", place.target, rows, "--out", place.out]
    done = subprocess.run(list(map(str, [*command, *LAYERS])), capture_output=True, text=True)
    assert done.returncode == 2
    assert "rows.jsonl:2: is not valid JSON" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_store_larger_than_it_may_be_is_refused_before_the_start(place: Place) -> None:
    """What it says to give then fits."""
    rows = place.rows(*[{"prompt": f"def f{i}(x):\n"} for i in range(50)])
    command = ["capture", place.target, rows, *LAYERS, "--max-new-tokens", "64"]
    command += ["--max-disk", "0.001", "--out", place.out]
    code, error = run_command(*command)
    assert code == 2
    assert "and --max-disk allows 1 MiB" in error
    assert not place.out.exists()
    limit = re.search(r"--limit (\d+)", error)
    assert limit is not None
    assert 0 < int(limit[1]) < 50
    code, error = run_command(*command, "--limit", limit[1])
    assert code == 0, error
    assert sum(path.stat().st_size for path in place.out.iterdir()) < 0.001 * 2**30


def test_disk_too_small_is_refused_before_the_start(place: Place, small_disk: Path) -> None:
    rows = place.rows(*[{"prompt": f"def f{i}(x):\n"} for i in range(50)])
    code, error = run_command(
        "capture", place.target, rows, "--layer-ids", "1,2,3", "--max-new-tokens", "64",
        "--out", small_disk / "store",
    )  # fmt: skip
    assert code == 2
    assert "the disk has 1 MiB free" in error
    assert not list(small_disk.iterdir())


def test_disk_that_fills_up_meanwhile_keeps_what_is_whole(
    place: Place, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another program takes the space after the start; with space again, the capture goes on."""
    import afaspec.capture.writers.transformers_model as module

    rows = place.rows(*[{"prompt": f"def f{i}(x):\n"} for i in range(40)])
    arguments = [
        place.target, rows, "--layer-ids", "1,2,3", "--max-new-tokens", "8", "--batch-size", "4",
        "--shard-mib", "0.05", "--out", small_disk / "store",
    ]  # fmt: skip
    load = module.load_target

    def load_and_fill(*arguments: Any) -> Any:
        free = shutil.disk_usage(small_disk).free
        (small_disk / "filler").write_bytes(b"x" * (free - 150_000))
        return load(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, "load_target", load_and_fill)
        code, error = run_command("capture", *arguments)
    assert code == 2
    assert "the disk is full" in error
    (small_disk / "filler").unlink()
    assert not list((small_disk / "store").glob(".*"))
    code, error = run_command("capture", *arguments)
    assert code == 0, error
    assert "40 sequences" in error

"""Capture: right hidden states, right tokens, right masks, and the same bytes when resumed."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from afaspec.capture.config import CaptureConfig
from afaspec.capture.features import features, keeping
from afaspec.capture.generate import NAME, generate, use_fast_decoding
from afaspec.capture.plan import compute_dtype
from afaspec.capture.run import CaptureProgress
from afaspec.store.manifest import read_manifest
from afaspec.store.read import FeatureStore
from drafts.target.info import read_target
from tests.opened import capture, plan_capture

END = 0  # the tiny target's end token


@pytest.fixture(scope="module")
def model(tiny_target: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_target, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    texts = [f"def function_{i}(x):\n" + "    x += 1\n" * (i % 7) for i in range(20)]
    answers = [f"    return x * {i}\n" for i in range(20)]
    pairs = zip(texts, answers, strict=True)
    path.write_text("".join(json.dumps({"prompt": t, "response": a}) + "\n" for t, a in pairs))
    return path


@pytest.fixture
def config(tiny_target: Path, tiny_draft: Path, rows: Path, tmp_path: Path) -> CaptureConfig:
    return CaptureConfig(
        target=str(tiny_target),
        draft=tiny_draft,
        prompts=str(rows),
        out=tmp_path / "store",
        max_new_tokens=12,
        batch_size=4,
    )


def changed(config: CaptureConfig, **values: Any) -> CaptureConfig:
    return CaptureConfig(**{**config.model_dump(), **values})


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def random_prompts(count: int, longest: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(2, longest, (count,), generator=generator).tolist()
    return [torch.randint(1, 512, (n,), generator=generator).tolist() for n in lengths]


def test_features_follow_transformers_numbering(model: Any) -> None:
    """Id i is hidden_states[i]; the last one is taken before the final norm, which transformers
    applies to its own last entry."""
    sequences = random_prompts(6, 30)
    found = list(features(model, sequences, (0, 2, 4), max_tokens=64))
    for ids, (hidden, final) in zip(sequences, found, strict=True):
        with torch.no_grad():
            alone = model(torch.tensor([ids]), output_hidden_states=True)
        for part, i in zip(hidden.chunk(3, dim=-1), (0, 2, 4), strict=True):
            state = part.float() if i < 4 else model.model.norm(part.float())
            torch.testing.assert_close(state, alone.hidden_states[i][0], rtol=2e-2, atol=5e-2)
        logits = model.lm_head(final.float())
        torch.testing.assert_close(logits, alone.logits[0], rtol=2e-2, atol=1e-1)


def test_features_before_the_final_norm_are_not_normed(model: Any) -> None:
    ((hidden, final),) = features(model, [[5, 6, 7]], (2, 3, 4), max_tokens=64)
    last = hidden.chunk(3, dim=-1)[2]
    assert not torch.allclose(last.float(), final.float(), atol=0.1)


def test_generation_equals_transformers_own(model: Any) -> None:
    prompts = random_prompts(7, 25)
    ours = generate(model, prompts, max_new_tokens=20, temperature=0.0, end_ids=frozenset(), seed=0)
    for prompt, found in zip(prompts, ours, strict=True):
        theirs = model.generate(
            torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None
        )
        assert found == theirs[0, len(prompt) :].tolist()


@pytest.mark.parametrize("lengths", ["equal", "different"])
def test_grouped_decoding_attention_changes_nothing(model: Any, lengths: str) -> None:
    prompts = random_prompts(6, 30)
    if lengths == "equal":  # no padding, so no attention mask
        prompts = [(prompt * 20)[:20] for prompt in prompts]
    options = {"max_new_tokens": 16, "temperature": 0.0, "end_ids": frozenset(), "seed": 0}
    usual = generate(model, prompts, **options)
    try:
        use_fast_decoding(model)
        assert model.config._attn_implementation == NAME
        assert generate(model, prompts, **options) == usual
    finally:
        model.set_attn_implementation("sdpa")


def test_rows_stop_at_their_end_token_and_the_others_go_on(model: Any) -> None:
    prompts = random_prompts(12, 25)
    free = generate(model, prompts, max_new_tokens=24, temperature=0.0, end_ids=frozenset(), seed=0)
    ends = frozenset({free[i][3 * i % 23] for i in range(9)})
    stopped = generate(model, prompts, max_new_tokens=24, temperature=0.0, end_ids=ends, seed=0)
    for whole, found in zip(free, stopped, strict=True):
        cut = next((i + 1 for i, token in enumerate(whole) if token in ends), 24)
        assert found == whole[:cut]
    assert len({len(found) for found in stopped}) > 3


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_states_kept_while_writing_are_those_of_the_whole_text(
    model: Any, temperature: float
) -> None:
    """Of every token, the last one too; but for the rounding of another shape of the same sum."""
    prompts = random_prompts(12, 25)
    options = {"max_new_tokens": 24, "temperature": temperature, "seed": 0}
    free = generate(model, prompts, end_ids=frozenset(), **options)
    ends = frozenset({free[i][3 * i % 23] for i in range(9)})
    with keeping(model, (0, 2, 4), len(prompts)) as keeper:
        answers = generate(model, prompts, end_ids=ends, keeper=keeper, **options)
    assert len({len(answer) for answer in answers}) > 3
    if temperature == 0:  # otherwise rows leave the batch at other times, which moves the draws
        assert answers == generate(model, prompts, end_ids=ends, **options)
    sequences = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    whole = features(model, sequences, (0, 2, 4), max_tokens=64)
    for ids, found, expected in zip(sequences, keeper.kept(), whole, strict=True):
        for one, other in zip(found, expected, strict=True):
            assert one.shape == other.shape == (len(ids), one.shape[1])
            torch.testing.assert_close(one.float(), other.float(), rtol=2**-6, atol=1e-3)


def test_sampling_depends_on_the_seed_alone(model: Any) -> None:
    prompts = random_prompts(5, 10)
    options = {"max_new_tokens": 10, "temperature": 1.0, "end_ids": frozenset({END})}
    one, again, other = (generate(model, prompts, seed=seed, **options) for seed in (1, 1, 2))
    assert one == again
    assert one != other


def test_store_holds_prompt_response_and_mask(config: CaptureConfig, model: Any) -> None:
    from transformers import AutoTokenizer

    seen: list[CaptureProgress] = []
    notes: list[str] = []
    store = capture(config, seen.append, notes.append)
    done = [now.done for now in seen]
    assert done == sorted(done)
    assert done[-1] == 20
    steps = {round(now % 4 * 3, 6) for now in done}  # 12 of a batch of 4, its states kept with them
    assert steps == set(range(12))
    tokenizer = AutoTokenizer.from_pretrained(config.target)
    texts = [json.loads(line)["prompt"] for line in Path(config.prompts).read_text().splitlines()]
    assert sorted(store[i].prompt_index for i in range(len(store))) == list(range(20))
    for i in range(len(store)):
        sequence = store[i]
        prompt = tokenizer(texts[sequence.prompt_index])["input_ids"]
        assert sequence.input_ids[: len(prompt)].tolist() == prompt
        assert sequence.loss_mask.tolist() == [False] * len(prompt) + [True] * (
            len(sequence) - len(prompt)
        )
        response = sequence.input_ids[len(prompt) :].tolist()
        assert len(response) == 12 or response[-1] == END
        predicted = model.lm_head(sequence.final.float()).argmax(-1)[len(prompt) - 1 : -1]
        agreement = (predicted == sequence.input_ids[len(prompt) :]).float().mean()
        assert agreement > 0.8  # greedy: bf16 near-ties apart
    assert seen[-1].done == seen[-1].total == 20
    assert [p.done for p in seen] == sorted(p.done for p in seen)
    assert seen[-1].tokens == store.manifest.response_tokens
    assert "20 prompts with the target's responses: at most" in notes[0]
    assert store.manifest.layer_ids == (1, 2, 3)
    assert store.manifest.complete


def test_suites_are_captured(config: CaptureConfig) -> None:
    suite = plan_capture(changed(config, prompts="suite:builtin@full", limit=5), lambda text: None)
    assert len(suite.prompts) == 5


def test_given_responses_are_taken(config: CaptureConfig) -> None:
    from transformers import AutoTokenizer

    store = capture(changed(config, use_responses=True))
    tokenizer = AutoTokenizer.from_pretrained(config.target)
    for i in range(len(store)):
        sequence = store[i]
        answer = tokenizer.decode(sequence.input_ids[sequence.loss_mask])
        full = f"    return x * {sequence.prompt_index}\n<|endoftext|>"
        assert full.startswith(answer)
        assert len(answer) > 5


def test_rows_of_token_ids_are_the_rows_of_texts(config: CaptureConfig, tmp_path: Path) -> None:
    """Same sequences, with the recorded answers and with the target's own."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(config.target)
    texts = [(f"def f{i}(x):\n", f"    return x * {i}\n") for i in range(6)]
    said, ids = tmp_path / "said.jsonl", tmp_path / "ids.jsonl"
    with said.open("w") as file, ids.open("w") as other:
        for prompt, response in texts:
            print(json.dumps({"prompt": prompt, "response": response}), file=file)
            asked = tokenizer(prompt)["input_ids"]
            answer = tokenizer(prompt + response + tokenizer.eos_token)["input_ids"][len(asked) :]
            row = {"root": prompt, "prompt_token_ids": asked, "response_token_ids": answer}
            print(json.dumps(row), file=other)
    for use_responses in (True, False):
        stores = []
        for rows in (said, ids):
            out = tmp_path / f"{rows.stem}-{use_responses}"
            new = changed(config, prompts=str(rows), out=out, use_responses=use_responses)
            stores.append(capture(new))
        one, two = stores
        assert len(one) == len(two) > 0
        for i in range(len(one)):
            assert one[i].input_ids.tolist() == two[i].input_ids.tolist()
            assert one[i].loss_mask.tolist() == two[i].loss_mask.tolist()


def test_resumed_store_has_the_same_bytes(config: CaptureConfig, tmp_path: Path) -> None:
    """Every state that a kill can leave between two renames is finished to the same bytes."""
    config = changed(config, temperature=0.8, shard_mib=0.1)
    capture(config)
    whole = digests(config.out)
    manifest = read_manifest(config.out)
    assert len(manifest.shards) >= 3
    for kept in range(len(manifest.shards) + 1):
        folder = tmp_path / f"resumed{kept}"
        shutil.copytree(config.out, folder)
        partial = read_manifest(folder)
        partial.complete, partial.shards = False, partial.shards[:kept]
        partial.write(folder)
        for shard in manifest.shards[kept + 1 :]:  # the next one was there, but not yet listed
            (folder / shard.file).unlink()
        (folder / ".shard-00009.safetensors.999999.tmp").write_text("half")
        capture(changed(config, out=folder, batch_size=None))
        assert digests(folder) == whole


def test_complete_store_is_returned_at_once(config: CaptureConfig) -> None:
    capture(config)
    before = digests(config.out)
    notes: list[str] = []
    seen: list[CaptureProgress] = []
    store = capture(changed(config, batch_size=None), seen.append, notes.append)
    assert "is already complete: 20 sequences" in notes[-1]
    assert not seen
    assert len(store) == 20
    assert digests(config.out) == before


def test_overwrite_replaces_a_store_of_other_settings(config: CaptureConfig) -> None:
    capture(config)
    store = capture(changed(config, max_new_tokens=5, limit=3, overwrite=True))
    assert len(store) == 3
    assert len(FeatureStore.open(config.out, verify=True)) == 3
    assert store.manifest.settings["max_new_tokens"] == 5


def test_command_line_and_yaml_agree(config: CaptureConfig, tmp_path: Path) -> None:
    from tests.command import run_command

    file = tmp_path / "capture.yaml"
    file.write_text(
        f"target: {config.target}\nprompts: {config.prompts}\nlayer_ids: [1, 2, 3]\n"
        "max_new_tokens: 99\nbatch_size: 4\nlimit: 6\n"
    )
    code, error = run_command(
        "capture", "--config", file, "--out", config.out, "--max-new-tokens", "4"
    )
    assert code == 0, error
    assert "6 prompts with the target's responses" in error
    assert len(FeatureStore.open(config.out)) == 6
    code, error = run_command(
        "capture", config.target, config.prompts, "--out", config.out, "--layer-ids", "1,2,3",
        "--max-new-tokens", "4", "--limit", "6",
    )  # fmt: skip
    assert (code, "is already complete" in error) == (0, True)


@pytest.mark.parametrize(("there", "chosen"), [(True, "bfloat16"), (False, "float32")])
def test_bf16_is_chosen_where_the_processor_has_it(
    there: bool, chosen: str, tiny_target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("drafts.tensors.has_bf16", lambda device: there)
    target = read_target(tiny_target)
    assert compute_dtype("auto", target, "cpu") == chosen
    assert compute_dtype("float16", target, "cpu") == "float16"

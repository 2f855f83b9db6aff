"""Any draft, right or wrong: it computes what a plain forward does, or it is refused."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from drafts.errors import UserError
from drafts.nn.packing import Packing
from drafts.registry import load_draft, read_draft
from drafts.target.info import read_target
from tests.drafts.reference import CHECKPOINTS, FORWARD, ROWS, STEPS, VOCAB, Stored, write_target

EXAMPLES = {"eagle3": 500, "eagle": 200, "medusa": 200}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_target(tmp_path_factory.mktemp("reference") / "target")


@pytest.mark.parametrize("family", EXAMPLES)
def test_it_is_right_or_refused(family: str, target: Path) -> None:
    tensors = load_file(target / "model.safetensors")
    shared = {name.removeprefix("model."): value for name, value in tensors.items()}
    opened = read_target(target)
    outcomes = {"loaded": 0, "refused": 0}

    @settings(
        max_examples=EXAMPLES[family],
        deadline=None,
        derandomize=True,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(made=CHECKPOINTS[family], ids=st.lists(st.integers(0, 11), min_size=ROWS, max_size=ROWS))
    def holds(made: object, ids: list[int]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            try:
                draft = load_draft(read_draft(made.write(Path(folder) / "draft")), opened).eval()
            except UserError:
                outcomes["refused"] += 1
                if not made.faults:
                    raise  # nothing was wrong with it
                return
        outcomes["loaded"] += 1
        generator = torch.Generator().manual_seed(1)
        features = torch.randn(ROWS, draft.feature_size, generator=generator)
        stored = Stored(made, shared)
        with torch.inference_mode():
            outputs = draft(features, torch.tensor(ids), STEPS, Packing.of([ROWS]))
            logits = [draft.logits(output, j) for j, output in enumerate(outputs)]
            for (j, row), expected in FORWARD[family](stored, features, ids).items():
                torch.testing.assert_close(logits[j][row], expected, rtol=1e-4, atol=1e-4)
        assert not stored.left()
        kept = stored.made.tensors.get("d2t")
        count = made.config.get("draft_vocab_size", VOCAB) if family == "eagle3" else VOCAB
        expected_ids = torch.arange(count) + (0 if kept is None else kept)
        assert torch.equal(draft.target_ids(), expected_ids)

    holds()
    assert min(outcomes.values()) > 0.2 * EXAMPLES[family], outcomes

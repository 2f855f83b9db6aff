"""A store of texts alone, whose states the target gives whenever they are read.

So a training needs no disk for them, and pays with a forward of the target for every pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from threading import Lock

from afaspec.capture.config import ReaderSettings
from afaspec.capture.plan import compute_dtype
from afaspec.capture.readers.choose import open_reader
from afaspec.capture.readers.protocol import Reader
from afaspec.capture.states import ToRead, choose_reader
from afaspec.store.read import FeatureStore, Sequence
from drafts.nn.packing import packs
from drafts.target.info import TargetInfo

TOKENS = 8192  # whose states are in memory at a time


class LiveStore(FeatureStore):
    """`store` with the states that `reader` gives. Several threads may read it."""

    def __init__(self, store: FeatureStore, reader: Reader, lock: Lock):
        """`lock` is that of all stores that `reader` reads for."""
        super().__init__(store.folder, store.manifest)
        self._reader, self._turn = reader, lock

    def read(self, numbers: Iterable[int]) -> Iterator[Sequence]:
        for group in packs(numbers, self.length, TOKENS):
            texts = [self.tokens_at(number) for number in group]
            with self._turn:  # not over the yields: whoever reads on may stop
                states = list(self._reader.read([ids.tolist() for ids, _ in texts]))
            for number, (ids, mask), (hidden, final) in zip(group, texts, states, strict=True):
                # cloned: what inference made cannot be trained on
                prompt = self.prompt_index(number)
                yield Sequence(ids, mask, hidden.clone(), final.clone(), prompt)

    def __getitem__(self, index: int) -> Sequence:
        return next(self.read([index]))


@contextmanager
def with_states(
    stores: list[FeatureStore], target: TargetInfo, device: str, config: ReaderSettings
) -> Iterator[list[FeatureStore]]:
    """Within, these stores have states: those of texts alone the ones that `target` gives.

    All of them are of the same layers. Enter it in the main thread.
    """
    texts = [store for store in stores if store.manifest.features == "none"]
    if not texts:
        yield stores
        return
    what = ToRead(
        target=target,
        layer_ids=tuple(texts[0].manifest.layer_ids),
        dtype=compute_dtype("auto", target, device),
        device=device,
        longest=max(int(store.lengths.max()) for store in texts),
        enforce_eager=config.enforce_eager,
        tensor_parallel=config.tensor_parallel,
    )
    lock = Lock()
    with closing(open_reader(choose_reader(config.states_with, target, device), what)) as reader:
        yield [LiveStore(one, reader, lock) if one in texts else one for one in stores]

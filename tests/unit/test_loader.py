"""The loader: every row once an epoch, well mixed, resumed exactly."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from activations import ActivationLoader, ActivationStore
from saescope.errors import InputError
from tests.tiny import make_tiny_harvest, make_tiny_model

SITE = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    root = tmp_path_factory.mktemp("loader")
    return ActivationStore.open(make_tiny_harvest(root, make_tiny_model(root / "model")))


def rows_of(loader: ActivationLoader, limit: int | None = None) -> list[list[int]]:
    """row_token of each batch."""
    batches: list[list[int]] = []
    for _, row_token in loader.with_rows():
        batches.append(row_token.tolist())
        if limit is not None and len(batches) == limit:
            break
    return batches


def make(store: ActivationStore, **fields: Any) -> ActivationLoader:
    settings = {"batch_size": 100, "epochs": 1, **fields}
    return ActivationLoader(store, SITE, **settings)


@pytest.mark.parametrize("split", ["train", "held_out"])
@pytest.mark.parametrize("batch_size", [1, 100, 128, 700])
def test_every_row_once_an_epoch(store: ActivationStore, split: str, batch_size: int) -> None:
    loader = make(store, split=split, batch_size=batch_size, drop_last=False)
    batches = rows_of(loader)
    assert len(batches) == len(loader) == loader.batches_per_epoch
    assert all(len(batch) == batch_size for batch in batches[:-1])
    number = ("train", "held_out").index(split)
    expected = np.flatnonzero(store.keep[:] & (store.split == number)[:, None])
    assert sorted(row for batch in batches for row in batch) == expected.tolist()


def test_drop_last_gives_only_whole_batches(store: ActivationStore) -> None:
    loader = make(store, epochs=2)
    batches = rows_of(loader)
    assert {len(batch) for batch in batches} == {100}
    assert len(batches) == len(loader) == 2 * (store.n_rows("train") // 100)


def test_a_batch_is_the_stored_rows(store: ActivationStore) -> None:
    stored = {}
    for chunk in store.chunks("train"):
        x, row_token = store.read_chunk(SITE, chunk.index)
        stored |= dict(zip(row_token.tolist(), x.float(), strict=True))
    for x, row_token in make(store, batch_size=300).with_rows():
        assert x.dtype == torch.float32
        assert torch.equal(x, torch.stack([stored[row] for row in row_token.tolist()]))


def test_without_rows_a_batch_is_a_tensor(store: ActivationStore) -> None:
    for x, (same, _) in zip(make(store), make(store).with_rows(), strict=True):
        assert torch.equal(x, same)


def test_the_order_depends_on_seed_and_epoch(store: ActivationStore) -> None:
    two = rows_of(make(store, epochs=2))
    half = len(two) // 2
    assert two[:half] == rows_of(make(store))
    assert two[0] != two[half]
    assert rows_of(make(store, seed=1))[0] != two[0]


def chunk_of_each_row(store: ActivationStore) -> dict[int, int]:
    found: dict[int, int] = {}
    for chunk in store.chunks("train"):
        row_token = store.read_chunk(SITE, chunk.index)[1]
        found |= dict.fromkeys(row_token.tolist(), chunk.index)
    return found


def test_chunks_come_in_another_order_in_each_epoch(store: ActivationStore) -> None:
    chunk_of = chunk_of_each_row(store)
    loader = make(store, mix_chunks=1, batch_size=1, epochs=2)
    seen = [chunk_of[row] for batch in rows_of(loader) for row in batch]
    half = len(seen) // 2
    orders = [list(dict.fromkeys(part)) for part in (seen[:half], seen[half:])]
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1] != sorted(orders[1])


def test_batches_mix_rows_of_several_chunks(store: ActivationStore) -> None:
    chunk_of = chunk_of_each_row(store)
    first = rows_of(make(store))[0]
    assert len({chunk_of[row] for row in first}) == 4
    alone = rows_of(make(store, mix_chunks=1, batch_size=50))[0]
    assert len({chunk_of[row] for row in alone}) == 1


@pytest.mark.parametrize("stop", [1, 7, 43, 44, 60])
def test_resumes_exactly(store: ActivationStore, stop: int) -> None:
    whole = rows_of(make(store, epochs=3))
    assert store.n_rows("train") // 100 == 43  # so the stops are around the first epoch's end
    first = make(store, epochs=3)
    assert rows_of(first, limit=stop) == whole[:stop]
    state = json.loads(json.dumps(first.state_dict()))
    second = make(store, epochs=3)
    second.load_state_dict(state)
    assert rows_of(second) == whole[stop:]


def test_resuming_reads_no_chunk_that_is_past(
    store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make(store, mix_chunks=2)
    rows_of(first, limit=40)
    read = []
    original = ActivationStore.read_chunk
    monkeypatch.setattr(
        ActivationStore, "read_chunk", lambda s, site, n: read.append(n) or original(s, site, n)
    )
    second = make(store, mix_chunks=2)
    second.load_state_dict(first.state_dict())
    rows_of(second)
    assert 0 < len(read) <= 6


def test_stands_at_the_beginning_after_the_end(store: ActivationStore) -> None:
    loader = make(store, split="held_out")
    assert rows_of(loader) == rows_of(loader)


def test_goes_on_for_ever_without_epochs(store: ActivationStore) -> None:
    loader = make(store, epochs=None)
    assert len(rows_of(loader, limit=100)) == 100
    assert loader.state_dict()["epoch"] == 2
    with pytest.raises(TypeError, match="no length"):
        len(loader)


def test_bad_input(store: ActivationStore) -> None:
    with pytest.raises(InputError, match=r"only \d+ rows"):
        make(store, batch_size=1_000_000)
    with pytest.raises(InputError, match="no such site"):
        ActivationLoader(store, "nowhere", batch_size=4)
    with pytest.raises(InputError, match="no such split"):
        make(store, split="test")
    for fields in ({"batch_size": 0}, {"mix_chunks": 0}, {"epochs": 0}, {"seed": -1}):
        with pytest.raises(InputError, match=next(iter(fields))):
            make(store, **fields)
    state = make(store).state_dict()
    with pytest.raises(InputError, match="batch_size differs"):
        make(store, batch_size=50).load_state_dict(state)


def test_a_damaged_chunk_stops_training(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("damaged")
    folder = make_tiny_harvest(root, make_tiny_model(root / "model"), documents=20)
    path = folder / "activations.zarr" / SITE / "c" / "1" / "0"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(Exception, match=f"chunk 1 of {SITE} is damaged"):
        rows_of(make(ActivationStore.open(folder)))

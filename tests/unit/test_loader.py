"""The loader: every row once an epoch, well mixed, resumed exactly."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from activations import ActivationLoader, ActivationStore
from activations.loading.unshuffled import aligned_rows
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
    settings = {"batch_size": 100, "epochs": 1, "order": "chunks", **fields}
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
    original = ActivationStore.read_rows

    def counted(own: ActivationStore, array: str, chunk: int, out: Any = None) -> Any:
        read.append(chunk)
        return original(own, array, chunk, out)

    monkeypatch.setattr(ActivationStore, "read_rows", counted)
    second = make(store, mix_chunks=2)
    second.load_state_dict(first.state_dict())
    rows_of(second)
    assert 0 < len(set(read)) <= 6


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


# several sites

EARLY, LATE = "blocks.0.hook_resid_post", SITE


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    root = tmp_path_factory.mktemp("several")
    folder = make_tiny_harvest(
        root, make_tiny_model(root / "model"), sites=(EARLY, LATE, "blocks.0.attn.hook_k")
    )
    return ActivationStore.open(folder)


def plain_order(store: ActivationStore, seed: int, epoch: int, mix: int) -> list[int]:
    """row_token of one epoch by the rule that resume states and results depend on."""
    chunks = store.chunks("train")
    order = np.random.default_rng((seed, epoch)).permutation(len(chunks))
    rows: list[int] = []
    for group, start in enumerate(range(0, len(chunks), mix)):
        read = [store.read_chunk(SITE, chunks[n].index)[1] for n in order[start : start + mix]]
        together = torch.cat(read)
        shuffled = np.random.default_rng((seed, epoch, group)).permutation(len(together))
        rows += together[torch.from_numpy(shuffled)].tolist()
    return rows


@pytest.mark.parametrize(("seed", "mix", "batch_size"), [(0, 4, 100), (3, 2, 64)])
def test_the_order_of_rows_is_the_one_that_was_promised(
    store: ActivationStore, seed: int, mix: int, batch_size: int
) -> None:
    loader = make(store, seed=seed, mix_chunks=mix, batch_size=batch_size, epochs=2)
    per_epoch = loader.batches_per_epoch
    found = rows_of(loader)
    for epoch in range(2):
        expected = plain_order(store, seed, epoch, mix)[: per_epoch * batch_size]
        assert [row for batch in found[:per_epoch] for row in batch] == expected
        found = found[per_epoch:]


def test_several_sites_are_the_same_rows_as_each_alone(several: ActivationStore) -> None:
    names = several.sites
    widths = [several.d_in(name) for name in names]
    assert len(set(widths)) == 2
    together = ActivationLoader(several, names, batch_size=100, seed=2, epochs=2)
    alone = [ActivationLoader(several, name, batch_size=100, seed=2, epochs=2) for name in names]
    assert (list(together.widths), together.d_in) == (widths, sum(widths))
    count = 0
    for parts in zip(together.with_rows(), *(one.with_rows() for one in alone), strict=True):
        (found, rows), *expected = parts
        assert len(found) == 3
        for x, (same, same_rows) in zip(found, expected, strict=True):
            assert torch.equal(x, same)
            assert torch.equal(rows, same_rows)
        count += 1
    assert count == len(together)


def test_one_name_in_a_list_gives_a_tuple(several: ActivationStore) -> None:
    listed = next(iter(ActivationLoader(several, [LATE], batch_size=10)))
    alone = next(iter(ActivationLoader(several, LATE, batch_size=10)))
    assert isinstance(listed, tuple)
    assert torch.equal(listed[0], alone)


@pytest.mark.parametrize("stop", [1, 43, 50])
def test_several_sites_resume_exactly(several: ActivationStore, stop: int) -> None:
    def loader() -> ActivationLoader[tuple[torch.Tensor, ...]]:
        return ActivationLoader(several, several.sites, batch_size=100, epochs=2)

    whole = list(loader())
    first, second = loader(), loader()
    assert len(list(islice(first, stop))) == stop
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    rest = list(second)
    for parts, expected in zip(rest, whole[stop:], strict=True):
        assert all(map(torch.equal, parts, expected))


def test_a_state_of_other_sites_is_refused(several: ActivationStore) -> None:
    state = ActivationLoader(several, [EARLY, LATE], batch_size=100).state_dict()
    for sites in (EARLY, [LATE, EARLY], [EARLY]):
        other: Any = ActivationLoader(several, sites, batch_size=100)
        with pytest.raises(InputError, match="site differs"):
            other.load_state_dict(state)


def test_sites_must_be_named_once(several: ActivationStore) -> None:
    for sites in ([], [EARLY, EARLY]):
        with pytest.raises(InputError, match="each once"):
            ActivationLoader(several, sites, batch_size=4)
    with pytest.raises(InputError, match="no such site"):
        ActivationLoader(several, [EARLY, "nowhere"], batch_size=4)


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_aligned_rows_are_all_rows_in_the_order_stored(
    several: ActivationStore, split: str
) -> None:
    pieces = list(aligned_rows(several, [EARLY, LATE], split=split, piece=50))
    assert max(len(row_token) for _, row_token in pieces) == 50
    rows = torch.cat([row_token for _, row_token in pieces])
    for number, site in enumerate((EARLY, LATE)):
        read = [several.read_chunk(site, chunk.index) for chunk in several.chunks(split)]
        expected = torch.cat([x for x, _ in read]).float()
        assert torch.equal(torch.cat([x[number] for x, _ in pieces]), expected)
        assert torch.equal(rows, torch.cat([row for _, row in read]))


def test_aligned_rows_limited(several: ActivationStore) -> None:
    def rows(**options: Any) -> list[int]:
        pieces = aligned_rows(several, [EARLY], split="train", **options)
        return torch.cat([row_token for _, row_token in pieces]).tolist()

    everything = rows()
    assert rows(limit=300) == everything[:300]
    spread = rows(limit=333, spread=True)
    assert len(spread) == len(set(spread)) == 333
    chunk_of = chunk_of_each_row(several)
    chunks = sorted({chunk_of[row] for row in spread})
    assert len(chunks) == 16
    assert chunks[-1] > 0.9 * max(chunk_of.values())
    # shares that some chunks are too short for are made up by others
    most = len(everything) - 1
    assert len(set(rows(limit=most, spread=True))) == most
    assert rows(limit=10**9, spread=True) == everything

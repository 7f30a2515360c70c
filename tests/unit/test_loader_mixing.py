"""How near batches are to independent draws, reading ahead, and the order a split is read in."""

import gc
import json
import threading
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from activations import ActivationLoader, ActivationStore
from activations.loading.epoch_order import ReadingOrder, SliceReader
from activations.loading.loader import _made_ahead
from activations.storage.layout import SPLITS
from activations.storage.window_data import WindowData
from activations.storage.writer import HarvestWriter
from saescope.artefact import DamagedError
from saescope.errors import InputError
from tests.hand_store import hand_facts

SITE = "latents"
CHUNK_ROWS, WINDOW_CHUNKS, WINDOWS, DOCUMENT_ROWS = 16384, 8, 10, 100


def make_latent_store(
    folder: Path, x: torch.Tensor, chunk_rows: int, windows: int, held_out: int = 0
) -> ActivationStore:
    """Rows [n, d_in] in the order of the text, dealt as a harvest deals them, in equal windows.

    The last `held_out` windows are held out. Each sequence has one row.
    """
    rows = len(x) // windows
    facts = hand_facts({SITE: x.shape[1]}, context=1, chunk_rows=chunk_rows, sequences=rows)
    writer = HarvestWriter.create(folder, facts)
    bits = x.to(torch.bfloat16).view(torch.uint16).numpy()
    for number in range(windows):
        split = SPLITS[number >= windows - held_out]
        places = np.arange(number * rows, (number + 1) * rows)
        writer.write(
            WindowData(
                split=split,
                tokens=np.zeros((rows, 1), np.int32),
                document=np.zeros((rows, 1), np.int32),
                keep=np.ones((rows, 1), bool),
                described=[],
                row_token=places,
                rows={SITE: bits[places]},
                order=np.random.default_rng(number).permutation(rows),
                sums={},
            )
        )
    writer.finish({})
    return writer.store


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> tuple[ActivationStore, torch.Tensor]:
    """1.3 M rows with three latents: of each row, of each document, of the place in the corpus."""
    random = np.random.default_rng(0)
    count = CHUNK_ROWS * WINDOW_CHUNKS * WINDOWS
    document = np.repeat(random.standard_normal(-(-count // DOCUMENT_ROWS)), DOCUMENT_ROWS)[:count]
    drift = np.linspace(-1, 1, count)
    x = torch.from_numpy(np.stack([random.standard_normal(count), document, drift], 1)).float()
    folder = tmp_path_factory.mktemp("latents") / "store"
    return make_latent_store(folder, x, CHUNK_ROWS, WINDOWS), x


def against_independent_draws(store: ActivationStore, x: torch.Tensor, **options: Any) -> Any:
    """Variance of the batch mean over that of independent draws, of each latent."""
    loader = ActivationLoader(store, SITE, batch_size=2048, epochs=2, **options)
    means = torch.stack([batch.double().mean(0) for batch in loader])
    return (2048 * (means - x.double().mean(0)).square().mean(0) / x.double().var(0)).tolist()


def test_batches_of_the_spread_order_are_near_independent_draws(
    text: tuple[ActivationStore, torch.Tensor],
) -> None:
    for ratio in against_independent_draws(*text):  # the default
        assert ratio < 1.2
    # a group that cannot have a part of every chunk has parts of evenly spaced ones
    assert max(against_independent_draws(*text, order="spread", mix_chunks=1)) < 6


def test_batches_of_other_orders_are_as_near_as_the_documentation_says(
    text: tuple[ActivationStore, torch.Tensor],
) -> None:
    row, document, drift = against_independent_draws(*text, order="chunks")
    assert row < 1.2
    # documents are dealt over their window alone, so many windows must be mixed
    assert document < 1.6
    assert drift > 50
    mixed = against_independent_draws(*text, order="chunks", mix_chunks=40)
    assert mixed[1] < 1.2
    one = against_independent_draws(*text, order="windows", mix_chunks=8)
    assert one[0] < 1.2
    assert one[2] > drift


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """Five windows of 300 rows in chunks of 64, the last chunk of each short; row n is (n, -n)."""
    rows = torch.arange(1500.0)
    folder = tmp_path_factory.mktemp("small") / "store"
    return make_latent_store(folder, torch.stack([rows, -rows], 1), 64, 5)


def rows_of(loader: ActivationLoader[Any]) -> list[list[int]]:
    return [row_token.tolist() for _, row_token in loader.with_rows()]


@pytest.mark.parametrize("order", ["chunks", "spread", "windows"])
@pytest.mark.parametrize("mix_chunks", [1, 3, 50])
def test_every_order_gives_every_row_once_with_its_values(
    small: ActivationStore, order: Any, mix_chunks: int
) -> None:
    loader = ActivationLoader(
        small, SITE, batch_size=97, epochs=2, order=order, mix_chunks=mix_chunks, drop_last=False
    )
    found = list(loader.with_rows())
    rows = torch.cat([row_token for _, row_token in found])
    for epoch in rows.split(1500):
        assert epoch.sort().values.tolist() == list(range(1500))
    assert rows[:1500].tolist() != rows[1500:].tolist()
    expected = torch.stack([rows, -rows], 1).to(torch.bfloat16).float()
    assert torch.equal(torch.cat([x for x, _ in found]), expected)


@pytest.mark.parametrize("order", ["spread", "windows"])
@pytest.mark.parametrize("stop", [1, 7, 15, 16])
def test_every_order_resumes_exactly(small: ActivationStore, order: Any, stop: int) -> None:
    def make(prefetch: int) -> ActivationLoader[torch.Tensor]:
        return ActivationLoader(
            small, SITE, batch_size=97, epochs=2, order=order, mix_chunks=2, prefetch=prefetch
        )

    whole = rows_of(make(0))
    first = make(4)
    assert [row.tolist() for _, row in islice(first.with_rows(), stop)] == whole[:stop]
    second = make(3)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert rows_of(second) == whole[stop:]


def test_a_state_of_another_order_is_refused(small: ActivationStore) -> None:
    spread = ActivationLoader(small, SITE, batch_size=97).state_dict()
    assert spread["order"] == "spread"
    plain = ActivationLoader(small, SITE, batch_size=97, order="chunks")
    with pytest.raises(InputError, match="order differs"):
        plain.load_state_dict(spread)
    older = {name: value for name, value in plain.state_dict().items() if name != "order"}
    plain.load_state_dict(older)
    with pytest.raises(InputError, match="order differs"):
        ActivationLoader(small, SITE, batch_size=97, order="spread").load_state_dict(older)


def test_windows_come_one_after_another(small: ActivationStore) -> None:
    order = ReadingOrder(small, "train", "windows", mix_chunks=1, seed=0)
    chunks: list[int] = []
    for epoch in range(3):
        chunks = [part.chunk for group in order.groups(epoch) for part in group]
        by_window = np.array(chunks).reshape(5, 5)
        assert (by_window % 5 == np.arange(5)).all()
        assert sorted(by_window[:, 0] // 5) == [0, 1, 2, 3, 4]
    assert chunks != sorted(chunks)


def test_a_group_of_the_spread_order_is_from_all_over_the_split(small: ActivationStore) -> None:
    order = ReadingOrder(small, "train", "spread", mix_chunks=2, seed=0)
    for group in islice(order.groups(0), 10):
        windows = [part.chunk // 5 for part in group]
        assert len(group) == 50
        # the last chunk of a window is short, so not all have as many parts
        assert min(np.bincount(windows)) >= 8


def test_no_such_order(small: ActivationStore) -> None:
    order: Any = "sorted"
    with pytest.raises(InputError, match=r"no such order.*'sorted'; allowed: spread, chunks, win"):
        ActivationLoader(small, SITE, batch_size=4, order=order)


def test_a_chunk_read_in_parts_is_checked_whole_first(tmp_path: Path) -> None:
    store = make_latent_store(tmp_path / "store", torch.arange(256.0)[:, None], 64, 1)
    path = store.path / "activations.zarr" / SITE / "c" / "2" / "0"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    order = ReadingOrder(store, "train", "spread", mix_chunks=4, seed=0)
    (group,) = order.groups(0)
    space = {SITE: np.empty((order.longest, 1), np.uint16)}
    before = [part for part in group if part.chunk != 2]
    reader = SliceReader(store, order.slice_rows)
    reader.read(before, False, space)
    with pytest.raises(DamagedError, match=f"chunk 2 of {SITE} is damaged"):
        reader.read(group, False, space)
    # what happens to it later shows where bytes are missing
    other = path.with_name("0").parent.parent / "1" / "0"
    other.write_bytes(b"")
    with pytest.raises(DamagedError, match=f"chunk 1 of {SITE} is damaged: cut short"):
        reader.read([part for part in group if part.chunk == 1], False, space)


# reading ahead


def test_so_many_items_are_made_ahead_and_no_more() -> None:
    made: list[int] = []

    def source() -> Iterator[int]:
        for number in range(10):
            made.append(number)
            yield number

    items = _made_ahead(source(), 3)
    assert next(items) == 0
    wait_for(lambda: len(made) == 4)
    assert next(items) == 1
    wait_for(lambda: len(made) == 5)
    assert list(items) == list(range(2, 10))


def wait_for(condition: Any) -> None:
    for _ in range(500):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it did not come to be so")


def test_an_error_comes_out_after_the_batches_before_it(tmp_path: Path) -> None:
    store = make_latent_store(tmp_path / "store", torch.arange(256.0)[:, None], 64, 1)
    loader = ActivationLoader(store, SITE, batch_size=16, mix_chunks=1, epochs=1, order="chunks")
    fourth = [part.chunk for group in ReadingOrder(
        store, "train", "chunks", mix_chunks=1, seed=0).groups(0) for part in group][3]  # fmt: skip
    (store.path / "activations.zarr" / SITE / "c" / str(fourth) / "0").unlink()
    whole = []
    with pytest.raises(DamagedError, match=f"chunk {fourth} of {SITE} is missing"):
        whole.extend(loader)
    assert len(whole) == 12
    assert loader.state_dict()["batch"] == 12


def test_a_group_is_read_while_the_one_before_it_is_given_out(
    small: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    before = SliceReader.read

    def counted(reader: SliceReader, group: Any, whole: bool, space: Any) -> Any:
        read.append(len(group))
        return before(reader, group, whole, space)

    monkeypatch.setattr(SliceReader, "read", counted)
    options: Any = {"batch_size": 16, "mix_chunks": 5, "order": "chunks", "epochs": 1}
    for prefetch, groups in ((0, 1), (1, 2)):
        read.clear()
        batches = iter(ActivationLoader(small, SITE, prefetch=prefetch, **options))
        next(batches)
        wait_for(lambda n=groups: len(read) == n)
        del batches
        assert len(read) == groups


def test_batches_in_bfloat16_are_the_same_rows(small: ActivationStore) -> None:
    options: Any = {"batch_size": 64, "epochs": 1}
    batches = ActivationLoader(small, SITE, **options)
    short = ActivationLoader(small, SITE, dtype="bfloat16", **options)
    for x, rounded in zip(batches, short, strict=True):
        assert rounded.dtype == torch.bfloat16
        assert torch.equal(x, rounded.float())
    half: Any = "float16"
    with pytest.raises(InputError, match=r"no dtype of batches.*allowed: float32, bfloat16"):
        ActivationLoader(small, SITE, dtype=half, **options)


def test_the_threads_end_with_the_iterator(small: ActivationStore) -> None:
    def threads() -> int:
        return sum(t.name.startswith("activation-loader") for t in threading.enumerate())

    loader = ActivationLoader(small, SITE, batch_size=16)
    batches: Any = loader.with_rows()
    next(batches)
    assert threads() > 2  # one reads groups, one makes batches, others fill them
    batches.close()
    assert threads() == 0
    for _ in loader:
        assert threads() > 2
        break
    gc.collect()
    assert threads() == 0
    for _ in ActivationLoader(small, SITE, batch_size=16, prefetch=0):
        assert threads() == 0
        break


def test_batches_stay_as_they_are_when_later_ones_are_made(small: ActivationStore) -> None:
    loader = ActivationLoader(small, SITE, batch_size=64, epochs=1)
    kept = list(loader)
    for x, again in zip(kept, loader, strict=True):
        assert torch.equal(x, again)


def test_batches_are_put_on_the_device_in_float32(small: ActivationStore) -> None:
    # the only other device that every machine has
    loader = ActivationLoader(small, SITE, batch_size=64, device="meta")
    x, row_token = next(loader.with_rows())
    assert (x.device.type, x.dtype, tuple(x.shape)) == ("meta", torch.float32, (64, 2))
    assert row_token.device.type == "cpu"
    with pytest.raises(InputError, match="prefetch"):
        ActivationLoader(small, SITE, batch_size=64, prefetch=-1)

"""Rows that are read where the system has them: the same ones, brought and let go of, or named."""

import errno
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from activations import ActivationLoader, ActivationStore
from activations.loading.epoch_order import ChunkSlice, ReadingOrder, SliceReader
from activations.storage import mmap_rows, reader
from activations.storage.mmap_rows import MappedRows, mappable
from activations.storage.row_formats import RowArray
from saescope.artefact import DamagedError
from tests.unit.test_loader_mixing import SITE, make_latent_store

CHUNK = 2048


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """Two windows of 3000 rows of 512 in chunks of 2048; row n is (n // 100, n % 100, 0, ...)."""
    rows = torch.arange(6000)
    x = torch.zeros(6000, 512)
    x[:, 0], x[:, 1] = rows // 100, rows % 100
    return make_latent_store(tmp_path_factory.mktemp("wide") / "store", x, CHUNK, 2)


@pytest.fixture(params=["all stays", "let go of", "an old kernel"])
def memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A machine with enough memory for everything, or one that has little."""
    if request.param != "all stays":
        monkeypatch.setattr(mmap_rows, "physical_memory", lambda: 1 << 20)
    if request.param == "an old kernel":
        monkeypatch.setattr(mmap_rows, "_MADV_POPULATE_READ", 9999)
    return request.param


def mapped_rows_of(store: ActivationStore) -> MappedRows:
    rows = store.map_rows(SITE)
    assert rows is not None
    return rows


def batches_of(store: ActivationStore, skip: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    loader = ActivationLoader(store, SITE, batch_size=700, mix_chunks=1, epochs=2, drop_last=False)
    loader.load_state_dict({**loader.state_dict(), "batch": skip})
    return list(loader.with_rows())


def test_rows_that_are_mapped_are_those_that_are_read(
    wide: ActivationStore, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown, forgotten = [], []
    show, advise = MappedRows.show, mmap_rows._advise

    def counted(self: MappedRows, parts: Sequence[ChunkSlice]) -> list[int]:
        shown.extend(parts)
        return show(self, parts)

    def advised(address: int, nbytes: int, advice: int) -> bool:
        if advice == mmap_rows.mmap.MADV_DONTNEED:
            forgotten.append(nbytes)
        return advise(address, nbytes, advice)

    monkeypatch.setattr(MappedRows, "show", counted)
    monkeypatch.setattr(mmap_rows, "_advise", advised)
    mapped = batches_of(wide)
    assert shown
    assert bool(forgotten) == (memory != "all stays")
    for x, row in mapped:
        assert torch.equal(100 * x[:, 0] + x[:, 1], row.float())
        assert not x[:, 2:].any()
    half = len(mapped) // 2
    for epoch in (mapped[:half], mapped[half:]):
        assert sorted(torch.cat([row for _, row in epoch]).tolist()) == list(range(6000))
    gone_on = batches_of(wide, 3)
    shown.clear()
    monkeypatch.setattr(reader, "mappable", lambda *_: False)
    read = batches_of(wide)
    assert not shown
    for others in (mapped[3:], gone_on):
        for (x, row), (same, same_row) in zip(others, read[3:], strict=True):
            assert torch.equal(x, same)
            assert torch.equal(row, same_row)


def test_what_is_let_go_of_comes_back(wide: ActivationStore, memory: str) -> None:
    del memory
    rows = mapped_rows_of(wide)
    expected = wide.read_rows(SITE, 1)
    for _ in range(2):
        assert rows.show([(1, 100, 900)]) == [CHUNK + 100]
        assert np.array_equal(rows.array[CHUNK + 100 : CHUNK + 1000], expected[100:1000])
        rows.forget(1, 100, 900)
    assert np.array_equal(rows.array[CHUNK + 100 : CHUNK + 1000], expected[100:1000])
    with pytest.raises(ValueError, match="read-only"):
        rows.array[CHUNK] = 0


@pytest.fixture
def damaged(wide: ActivationStore, tmp_path: Path) -> tuple[ActivationStore, Path]:
    """A store to spoil, and the file of its chunk 1."""
    shutil.copytree(str(wide.path), tmp_path / "store")
    path = tmp_path / "store" / "activations.zarr" / SITE / "c" / "1" / "0"
    return ActivationStore.open(tmp_path / "store"), path


def cut(path: Path) -> None:
    with path.open("r+b") as stream:
        stream.truncate(100)


@pytest.mark.parametrize(
    ("damage", "message"),
    [(cut, "cut short"), (Path.unlink, "is missing"), (lambda path: path.chmod(0), "unreadable")],
)
def test_a_chunk_that_is_gone_before_it_is_mapped_is_named(
    damaged: tuple[ActivationStore, Path],
    damage: Callable[[Path], None],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store, path = damaged
    rows = mapped_rows_of(store)
    rows.show([(0, 0, 64)])
    damage(path)
    if message == "unreadable":  # root may read whatever it likes
        opened = Path.open

        def refuse(self: Path, *given: object, **more: object) -> object:
            if self == path:
                raise PermissionError(errno.EACCES, "Permission denied")
            return opened(self, *given, **more)  # type: ignore[arg-type]

        monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DamagedError, match=f"chunk 1 of {SITE} is .*{message.split()[-1]}"):
        rows.show([(1, 0, 64)])


def test_a_mapped_chunk_that_is_taken_away_is_still_there(
    damaged: tuple[ActivationStore, Path],
) -> None:
    """As `doctor` takes a chunk away, or puts another in its place."""
    store, path = damaged
    order = ReadingOrder(store, "train", "spread", mix_chunks=4, seed=0)
    (group,) = order.groups(0)
    reader = SliceReader(store, order.slice_rows)
    space = reader.room({SITE: RowArray("uint16", (512,))}, order.longest, False)
    places = reader.read(group, False, space)
    before = space[SITE][places]
    content = path.read_bytes()
    path.unlink()
    assert np.array_equal(space[SITE][reader.read(group, False, space)], before)
    path.write_bytes(content[:100])  # another file of that name
    assert np.array_equal(space[SITE][reader.read(group, False, space)], before)


def test_a_mapped_chunk_that_is_cut_short_is_named_before_it_is_touched(
    damaged: tuple[ActivationStore, Path],
) -> None:
    store, path = damaged
    rows = mapped_rows_of(store)
    rows.show([(1, 0, 64)])
    cut(path)
    with pytest.raises(DamagedError, match=f"chunk 1 of {SITE} is damaged: cut short"):
        rows.show([(1, 64, 64)])


def test_what_cannot_be_mapped(tmp_path: Path) -> None:
    assert not mappable(tmp_path / "missing", 4096)
    path = tmp_path / "file"
    path.write_bytes(bytes(8192))
    assert mappable(path, 8192)
    assert not mappable(path, 8191)  # the next would not begin with a page

"""Rows taken into batches: the same numbers by C++ and without it, in every dtype and width."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from activations.loading import gather as gathering
from activations.loading.gather import Gatherer, gather
from activations.storage.row_formats import floats, stored
from saescope import compiled

WIDTHS = (1, 7, 16, 32, 63, 64, 65, 96, 576, 768)
STORED = ("bfloat16", "int8")
WANTED = (torch.float32, torch.bfloat16)
needs_compiler = pytest.mark.skipif(
    not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")),
    reason="no C++ compiler",
)


@pytest.fixture(params=["native", "plain"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How rows are taken."""
    if request.param == "plain":
        monkeypatch.setattr(gathering, "library", lambda: None)
    elif gathering.library() is None:
        pytest.skip("no C++ compiler")
    return request.param


def rows(count: int, width: int, storage: str) -> list[np.ndarray]:
    """Rows of all sizes, as they are stored; a row of zeros, and of the ends of the range."""
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(count, width, generator=generator)
    x *= 10.0 ** torch.randint(-30, 30, (count, 1), generator=generator)
    x[1], x[2, 0], x[3] = 0, 3e38, -1e-38
    kind = "int8" if storage == "int8" else "bfloat16"
    return [each.numpy() for each in stored(x, kind)]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("storage", STORED)
@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize("aligned", [True, False])
def test_rows_are_those_at_their_places(
    width: int, storage: str, wanted: torch.dtype, aligned: bool, way: str
) -> None:
    del way
    arrays = rows(50, width, storage)
    places = np.random.default_rng(0).integers(0, 50, 33)
    places[:4] = (0, 49, 1, 2)
    tensors = [torch.from_numpy(each) for each in arrays]
    expected = floats([each[torch.from_numpy(places)] for each in tensors]).to(wanted)
    room = torch.full((35 * width + 1,), 7.0, dtype=wanted)
    out = room[not aligned :][: 33 * width].view(33, width)
    gather(arrays, places, out)
    assert torch.equal(out, expected)
    assert room[33 * width + (not aligned) :].eq(7).all()  # nothing is written beside it
    assert aligned or room[0] == 7


@pytest.mark.parametrize("storage", STORED)
def test_rows_as_they_are_stored(storage: str, way: str) -> None:
    """As they go to another device: each array by itself, the scales as well."""
    del way
    places = np.array([3, 3, 0, 49])
    for array in rows(50, 96, storage):
        out = torch.empty((4, *array.shape[1:]), dtype=getattr(torch, array.dtype.name))
        gather([array], places, out)
        assert np.array_equal(out.numpy(), array[places])


def test_bits_of_bfloat16_are_kept(way: str) -> None:
    del way
    bits = np.arange(65536, dtype=np.uint16).reshape(64, 1024)
    places = np.arange(64)[::-1].copy()
    out = torch.empty(64, 1024)
    gather([bits], places, out)
    expected = torch.from_numpy(bits[places]).view(torch.bfloat16).float()
    assert torch.equal(out.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("threads", [0, 1, 2])
def test_what_was_begun_is_there_when_it_was_waited_for(threads: int) -> None:
    array = np.random.default_rng(0).integers(0, 40000, (4000, 768)).astype(np.uint16)
    orders = [np.random.default_rng(n).permutation(4000) for n in range(6)]
    outs = [torch.empty(4000, 768, dtype=torch.uint16) for _ in orders]
    with Gatherer(threads) as gatherer:
        begun = [gatherer.start([([array], out)], o) for out, o in zip(outs, orders, strict=True)]
        gatherer.wait()
        assert all(future.done() for each in begun for future in each)
        for out, order in zip(outs, orders, strict=True):
            assert np.array_equal(out.numpy(), array[order])
        last = torch.empty(4000, 768, dtype=torch.uint16)
        gatherer.start([([array], last)], orders[0])
    assert torch.equal(last, outs[0])


def test_an_error_comes_out_where_it_is_waited_for() -> None:
    with Gatherer(1) as gatherer:
        (future,) = gatherer.start(
            [([np.zeros((4, 2), np.uint16)], torch.empty(3, 3))], np.arange(3)
        )
        with pytest.raises(AssertionError, match="a row for each index"):
            future.result()


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a new process with an empty cache."""
    monkeypatch.setenv("SAESCOPE_CACHE", str(tmp_path))
    gathering.library.cache_clear()
    yield
    gathering.library.cache_clear()


@pytest.mark.usefixtures("fresh")
def test_without_a_compiler_it_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    for _ in range(2):
        out = torch.empty(2, 3)
        gather([np.full((5, 3), 0x3F80, np.uint16)], np.array([0, 4]), out)
        assert out.tolist() == [[1.0] * 3] * 2
    assert capsys.readouterr().err == (
        "saescope: no C++ for batches (no compiler: neither g++ nor clang++ was found); "
        "numpy makes them\n"
    )


@needs_compiler
@pytest.mark.usefixtures("fresh")
def test_it_is_built_once(tmp_path: Path) -> None:
    assert gathering.library() is not None
    assert [path.suffix for path in tmp_path.iterdir()] == [".so"]
    assert compiled.build("gather", Path(gathering.__file__).parent) == next(tmp_path.iterdir())


@needs_compiler
@pytest.mark.usefixtures("fresh")
def test_a_damaged_library_is_built_anew_and_never_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(gathering.__file__).parent
    path = compiled.build("gather", folder)
    whole = path.read_bytes()
    for at in (0, len(whole) // 3, len(whole) - 1):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        again = compiled.build("gather", folder)
        assert f"{path} is damaged and is built anew" in capsys.readouterr().err
        assert (again, again.read_bytes()) == (path, whole)
    path.write_bytes(whole[:-1])
    assert compiled.build("gather", folder).read_bytes() == whole
    assert [found.name for found in tmp_path.iterdir()] == [path.name]

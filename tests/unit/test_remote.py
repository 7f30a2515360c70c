"""Harvests in object stores: the bytes of a local one, safe when interrupted, checked, repaired."""

import dataclasses
import functools
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
import zarr
from fsspec.implementations.memory import MemoryFileSystem

from activations import (
    ActivationLoader,
    ActivationStore,
    CorpusConfig,
    HarvestConfig,
    ModelConfig,
    append,
    harvest,
)
from activations.harvesting import resume
from activations.storage.verify import examine
from saescope import artefact
from saescope.__main__ import main
from saescope.errors import ArtefactError, InputError
from saescope.locks import locked
from saescope.paths import as_path, is_remote, local
from tests.damage import GROUP, assert_same_content, files_of
from tests.interrupt import Interrupt, Killed
from tests.tiny import make_tiny_corpus, make_tiny_model

SITE = "blocks.1.hook_resid_post"
Make = Callable[..., HarvestConfig]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("remote")
    make_tiny_model(folder / "model")
    make_tiny_corpus(folder, documents=12)
    (folder / "more").mkdir()
    make_tiny_corpus(folder / "more", documents=20)
    return folder


@pytest.fixture(scope="module")
def make(root: Path) -> Make:
    """A configuration of a small harvest: a few windows of each split."""

    def build(out: str, **fields: Any) -> HarvestConfig:
        settings: dict[str, Any] = {
            "model": ModelConfig(spec=str(root / "model"), dtype="float32"),
            "corpus": CorpusConfig(source=str(root / "corpus.jsonl")),
            "sites": (SITE,), "context": 16, "chunk_rows": 64, "window_chunks": 4,
            "batch_sequences": 8, "held_out_fraction": 0.5,
        }  # fmt: skip
        return HarvestConfig(out=out, **(settings | fields))

    return build


@pytest.fixture(scope="module")
def on_disk(make: Make, tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    return harvest(make(str(tmp_path_factory.mktemp("disk") / "out")))


@pytest.fixture(scope="module", autouse=True)
def loaded_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume, "load_model", functools.cache(resume.load_model))
        for name in ("library_versions", "git_commit"):
            patch.setattr(artefact, name, functools.cache(getattr(artefact, name)))
        yield


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test has a machine of its own, and an empty object store in memory."""
    monkeypatch.setenv("SAESCOPE_CACHE", str(tmp_path / "cache"))
    yield
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.fixture
def there(on_disk: ActivationStore) -> str:
    """The URL of a copy of the harvest."""
    return copy_to("memory://bucket/there", on_disk)


def copy_to(url: str, store: ActivationStore) -> str:
    for name, content in files_of(store.path).items():
        fsspec.filesystem("memory").pipe_file(f"{url}/{name}", content)
    return url


def test_has_the_bytes_of_a_local_one(make: Make, on_disk: ActivationStore) -> None:
    store = harvest(make("memory://bucket/new"))
    assert str(store.path) == "memory://bucket/new"
    assert_same_content(store.path, on_disk.path)
    assert store.hash == on_disk.hash
    assert store.verify() == on_disk.verify()
    assert [name for name in MemoryFileSystem.store if not name.startswith("/bucket/new/")] == []


def test_is_read_as_a_local_one(there: str, on_disk: ActivationStore) -> None:
    store = ActivationStore.open(there)
    for chunk in store.chunks("train"):
        for one, other in zip(
            store.read_chunk(SITE, chunk.index), on_disk.read_chunk(SITE, chunk.index), strict=True
        ):
            assert torch.equal(one, other)
    assert np.array_equal(store.tokens[:], on_disk.tokens[:])
    assert store.document_table() == on_disk.document_table()
    group: Any = zarr.open_group(f"{there}/{GROUP}", mode="r")
    other: Any = zarr.open_group(local(on_disk.path) / GROUP, mode="r")
    assert np.array_equal(group[SITE][:], other[SITE][:])


@pytest.mark.parametrize("order", ["chunks", "spread"])
def test_the_loader_gives_the_same_batches(
    there: str, on_disk: ActivationStore, order: Any
) -> None:
    one, other = (
        ActivationLoader(store, SITE, batch_size=50, epochs=2, order=order, prefetch=2)
        for store in (ActivationStore.open(there), on_disk)
    )
    assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


@pytest.mark.parametrize(("order", "most"), [("chunks", 2.0), ("spread", 3.0)])
def test_two_passes_fetch_what_they_need(
    there: str, order: Any, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched, whole = [0], MemoryFileSystem.cat_file

    def counted(self: Any, path: str, start: Any = None, end: Any = None, **more: Any) -> bytes:
        content = whole(self, path, start, end, **more)
        fetched[0] += len(content)
        return content

    store = ActivationStore.open(there)
    monkeypatch.setattr(MemoryFileSystem, "cat_file", counted)
    for _ in ActivationLoader(store, SITE, batch_size=50, epochs=2, order=order):
        pass
    chunks = len(store.chunks("train"))
    assert fetched[0] <= most * chunks * (64 * store.d_in(SITE) * 2 + 64 * 8 + 8)


def test_tokens_are_fetched_once(there: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ActivationStore.open(there)
    first = store.tokens[:]
    assert all(np.array_equal(store.tokens[n], first[n]) for n in range(len(first)))
    monkeypatch.setattr(MemoryFileSystem, "cat_file", None)
    assert np.array_equal(store.tokens[::-1], first[::-1])


@pytest.mark.slow
def test_a_kill_after_any_write_is_gone_on_from(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while the lock, the empty store, or a window of either split was being written."""
    small: dict[str, Any] = {"window_chunks": 2, "max_tokens": 300}
    expected = harvest(make(str(tmp_path / "out"), **small))
    done: list[tuple[str, tuple[Any, ...]]] = []
    with monkeypatch.context() as patch:
        for name in ("pipe_file", "rm_file"):
            patch.setattr(MemoryFileSystem, name, recorded(done, name))
        harvest(make("memory://bucket/new", **small))
    assert len(expected.windows) > 2
    for count in range(len(done)):
        MemoryFileSystem.store.clear()
        for name, given in done[:count]:
            getattr(fsspec.filesystem("memory"), name)(*given)
        store = harvest(make("memory://bucket/new", **small))
        assert_same_content(store.path, expected.path)
        # all was written, and only the lock is left, which a complete harvest does not look at
        assert is_locked("memory://bucket/new") == (count == len(done) - 1)
    assert len(done) > 40


def recorded(done: list[tuple[str, tuple[Any, ...]]], name: str) -> Callable[..., Any]:
    original = getattr(MemoryFileSystem, name)

    def record(self: Any, *given: Any, **more: Any) -> Any:
        found = original(self, *given, **more)
        done.append((name, given))
        return found

    return record


@pytest.mark.parametrize("at", [3, 30, 45])
def test_an_error_while_writing_is_gone_on_from(
    make: Make, on_disk: ActivationStore, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    config = make("memory://bucket/new")
    with monkeypatch.context() as patch:
        Interrupt(patch, MemoryFileSystem, "pipe_file", at, ConnectionError("lost"))
        with pytest.raises(ArtefactError, match="cannot be reached: lost"):
            harvest(config)
    assert not is_locked("memory://bucket/new")
    assert_same_content(harvest(config).path, on_disk.path)


def test_an_interruption_before_the_manifest_leaves_a_place_to_begin_anew(
    make: Make, on_disk: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = make("memory://bucket/new", sites=(SITE, "blocks.0.hook_resid_post"))
    with monkeypatch.context() as patch:
        Interrupt(patch, artefact, "put", 9, Killed())
        with pytest.raises(Killed):
            harvest(other)
    assert files_of(as_path(other.out))
    assert_same_content(harvest(make("memory://bucket/new")).path, on_disk.path)


def test_what_is_there_is_not_written_over(make: Make) -> None:
    fsspec.filesystem("memory").pipe_file("/bucket/new/notes.txt", b"mine")
    with pytest.raises(InputError, match="holds no harvest"):
        harvest(make("memory://bucket/new"))
    assert files_of(as_path("memory://bucket/new")) == {"notes.txt": b"mine"}


def test_grows_as_a_local_one(root: Path, make: Make, tmp_path: Path) -> None:
    more = CorpusConfig(source=str(root / "more" / "corpus.jsonl"))
    grown = []
    for out in ("memory://bucket/new", str(tmp_path / "out")):
        harvest(make(out))
        grown.append(append(make(out, corpus=more)))
    assert_same_content(grown[0].path, grown[1].path)
    assert len(grown[0].manifest["appended"]) == 1
    assert grown[0].verify()


def test_the_plan_names_no_limit(make: Make, tmp_path: Path, capsys: Any) -> None:
    from activations.harvesting.command import HarvestCommand, run

    values = {
        f.name: getattr(make("memory://bucket/new"), f.name)
        for f in dataclasses.fields(HarvestConfig)
    }
    assert run(HarvestCommand(**values, plan=True)) is None
    assert "an object store has no limit" in capsys.readouterr().out
    assert not MemoryFileSystem.store


DAMAGES: dict[str, tuple[str, Callable[[dict[str, bytes]], bytes | None]]] = {
    "missing": (f"{GROUP}/{SITE}/c/1/0", lambda files: None),
    "truncated": (f"{GROUP}/{SITE}/c/0/0", lambda files: files[f"{GROUP}/{SITE}/c/0/0"][:-9]),
    "damaged": (
        f"{GROUP}/row_token/c/2",
        lambda files: b"x" * len(files[f"{GROUP}/row_token/c/2"]),
    ),
    "swapped": (f"{GROUP}/{SITE}/c/3/0", lambda files: files[f"{GROUP}/{SITE}/c/2/0"]),
}


def test_damage_is_found_named_and_repaired(
    there: str, on_disk: ActivationStore, capsys: pytest.CaptureFixture[str]
) -> None:
    disk, files = fsspec.filesystem("memory"), files_of(on_disk.path)
    for name, change in DAMAGES.values():
        disk.rm_file(f"{there}/{name}")
        if (content := change(files)) is not None:
            disk.pipe_file(f"{there}/{name}", content)
    for name in ("documents.parquet/part-000000.parquet", f"{GROUP}/tokens/c/1/0", "windows.jsonl"):
        disk.rm_file(f"{there}/{name}")
    disk.pipe_file(f"{there}/strange/file", b"?")
    assert main(["doctor", there]) == 1
    assert "windows.jsonl: the list of windows is missing" in capsys.readouterr().out
    disk.pipe_file(f"{there}/windows.jsonl", files["windows.jsonl"])
    assert main(["doctor", there]) == 1
    output = capsys.readouterr().out
    for kind, (name, _) in DAMAGES.items():
        assert f"{kind:<10}  {name}" in output
    assert "missing     documents.parquet/part-000000.parquet" in output
    assert "but chunk 2 of" in output
    assert "foreign     strange" in output
    with pytest.raises(ArtefactError, match="is missing"):
        ActivationStore.open(there).verify()
    with pytest.raises(ArtefactError, match="chunk"):
        list(ActivationLoader(ActivationStore.open(there), SITE, batch_size=50, epochs=1))
    assert main(["doctor", there, "--repair", "--set-aside"]) == 0
    assert_same_content(as_path(there), on_disk.path)
    assert disk.cat_file(f"{there}.set-aside-1/strange/file") == b"?"


def test_a_lost_ledger_is_rebuilt(there: str, on_disk: ActivationStore) -> None:
    fsspec.filesystem("memory").rm_file(f"{there}/windows.jsonl")
    assert main(["doctor", there, "--repair"]) == 0
    assert_same_content(as_path(there), on_disk.path)


def test_a_second_writer_is_refused_in_one_process(make: Make) -> None:
    with locked("memory://bucket/new", "test"):
        assert is_locked("memory://bucket/new")
        with pytest.raises(ArtefactError, match=r"memory://bucket/new: in use by test, process"):
            harvest(make("memory://bucket/new"))
    assert not is_locked("memory://bucket/new")
    with locked("memory://bucket/new", "test"), locked("memory://bucket/other", "test"):
        pass


def is_locked(url: str) -> bool:
    folder, _, name = url.rpartition("/")
    return fsspec.filesystem("memory").exists(f"{folder}/.{name}.lock")


def test_the_lock_of_a_process_of_this_machine_that_is_gone_is_taken_over() -> None:
    disk, lock = fsspec.filesystem("memory"), "/bucket/.new.lock"
    with locked("memory://bucket/new", "first"):
        left = disk.cat_file(lock)
    disk.pipe_file(lock, left)
    with locked("memory://bucket/new", "second"):
        assert json.loads(disk.cat_file(lock))["holder"].startswith("second, process")
    assert not disk.exists(lock)


@pytest.mark.parametrize(
    ("content", "holder"),
    [
        (
            b'{"holder": "harvest, process 7 on elsewhere", "locks": "x on elsewhere"}',
            "harvest, pr",
        ),
        (b"[", "another process"),
    ],
)
def test_the_lock_of_another_machine_is_refused(make: Make, content: bytes, holder: str) -> None:
    disk, lock = fsspec.filesystem("memory"), "/bucket/.new.lock"
    disk.pipe_file(lock, content)
    with pytest.raises(ArtefactError, match="in use by") as caught:
        harvest(make("memory://bucket/new"))
    assert f"in use by {holder}" in str(caught.value)
    assert "remove memory://bucket/.new.lock" in str(caught.value)
    assert disk.cat_file(lock) == content
    disk.rm_file(lock)
    assert harvest(make("memory://bucket/new")).complete


def test_of_two_machines_that_begin_at_once_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both find no lock; the store lets only the first write one."""
    remote_lock = importlib.import_module("saescope.locks")
    lock = b'{"holder": "the other", "locks": "x"}'
    fsspec.filesystem("memory").pipe_file("/bucket/.new.lock", lock)
    monkeypatch.setattr(remote_lock, "exists", lambda path: False)
    with (
        pytest.raises(ArtefactError, match="in use by the other"),
        locked("memory://bucket/new", "x"),
    ):
        pass


def test_another_one_s_lock_is_not_removed() -> None:
    disk, lock = fsspec.filesystem("memory"), "/bucket/.new.lock"
    with locked("memory://bucket/new", "test"):
        disk.pipe_file(lock, b"of another")
    assert disk.cat_file(lock) == b"of another"


def test_training_from_it_has_the_same_bits(
    there: str, on_disk: ActivationStore, tmp_path: Path
) -> None:
    weights = []
    for number, path in enumerate((there, str(on_disk.path))):
        run, config = tmp_path / f"run-{number}", tmp_path / f"{number}.toml"
        config.write_text(
            f'harvest = "{path}"\nout = "{run}"\nsite = "{SITE}"\npasses = 2.0\n'
            "[sae]\nd_sae = 64\nk = 8\n[trainer]\nbatch_size = 64\nlr = 0.003\n"
        )
        assert main(["train", str(config)]) == 0
        weights.append((run / "sae" / "weights.safetensors").read_bytes())
    assert weights[0] == weights[1]
    assert main(["eval", str(tmp_path / "run-0")]) == 0
    assert main(["index", str(tmp_path / "run-0"), "--out", str(tmp_path / "index")]) == 0


def test_an_unknown_kind_of_storage_is_refused(make: Make, tmp_path: Path) -> None:
    for url in ("nosuch://bucket/name", "simplecache::memory://bucket/name"):
        with pytest.raises(InputError, match=r"no such kind of storage .*allowed: a folder, or"):
            harvest(make(url))
        with pytest.raises(InputError, match="no such kind of storage"):
            ActivationStore.open(url)
    assert as_path(f"file://{tmp_path}/x") == tmp_path / "x"


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = importlib.import_module("fsspec.registry")
    monkeypatch.delitem(registry._registry, "s3", raising=False)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(InputError, match=r's3://bucket/name: needs .*pip install "saescope\[s3\]"'):
        ActivationStore.open("s3://bucket/name")


def test_a_store_that_cannot_be_reached_is_not_taken_as_damaged(
    there: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ActivationStore.open(there)

    def fails(self: Any, path: str, *args: Any, **more: Any) -> bytes:
        raise TimeoutError("too slow")

    monkeypatch.setattr(MemoryFileSystem, "cat_file", fails)
    with pytest.raises(ArtefactError, match="cannot be reached: too slow") as caught:
        examine(store)
    assert not isinstance(caught.value, artefact.DamagedError)


def test_what_is_remote_and_what_must_be_local(there: str) -> None:
    assert [is_remote(x) for x in (there, as_path(there), "data/x", Path("x"), "file:///x")] == [
        True, True, False, False, False
    ]  # fmt: skip
    with pytest.raises(InputError, match="several processes need"):
        local(there, "several processes need a folder that they share")
    assert local("data/x") == Path("data/x")

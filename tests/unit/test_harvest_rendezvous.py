"""Several processes of torchrun harvest into an object store, which locks nothing."""

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from activations import ActivationStore, harvest
from activations.harvesting import window_locks
from activations.harvesting.staging import Staging
from activations.storage.layout import PENDING
from saescope.artefact import write_bytes
from saescope.errors import ArtefactError, InputError
from saescope.paths import as_path, exists, listing, objects
from tests.damage import assert_same_content
from tests.interrupt import Interrupt, Killed
from tests.s3_server import s3_bucket
from tests.tiny import make_tiny_corpus, make_tiny_model
from tests.unit.test_harvest_ranks import settings

s3fs = pytest.importorskip("s3fs", reason="needs s3fs, of the extra s3")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model, a text, what one process makes of them, and a server with an empty bucket."""
    folder = tmp_path_factory.mktemp("rendezvous")
    make_tiny_model(folder / "model")
    make_tiny_corpus(folder, documents=20)
    with s3_bucket(folder / "cache"):
        harvest(settings(folder, out=folder / "whole"))
        yield folder


WORKER = """
import os, sys
from pathlib import Path
from activations import harvest
from activations.harvesting import pipeline
from tests.unit.test_harvest_ranks import settings

folder, out = Path(sys.argv[1]), sys.argv[2]
compute = pipeline.compute
def counted(window, *rest):
    # in one piece: both write to one pipe
    os.write(1, f"rank {os.environ['RANK']} computes {window.number}\\n".encode())
    return compute(window, *rest)
pipeline.compute = counted
harvest(settings(folder, out=out))
"""


def torchrun(root: Path, out: str, tmp_path: Path) -> str:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    tree = str(Path(__file__).parents[2])
    found = subprocess.run(
        [*command, "2", str(script), str(root), out],
        text=True, capture_output=True, timeout=240, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": tree},
    )  # fmt: skip
    assert not found.returncode, found.stderr
    return found.stdout


@pytest.mark.slow
def test_two_processes_of_torchrun_make_what_one_does(root: Path, tmp_path: Path) -> None:
    url = "s3://bucket/folder/name"
    said = torchrun(root, url, tmp_path)
    computed = [line.split() for line in said.splitlines() if " computes " in line]
    numbers = [int(words[-1]) for words in computed]
    assert {words[1] for words in computed} == {"0", "1"}, said
    assert sorted(numbers) == sorted(set(numbers)), "a window was computed twice"
    store = ActivationStore.open(url)
    assert store.complete
    assert_same_content(store.path, root / "whole")
    assert listing(as_path("s3://bucket/folder"))(()) == [("name", True)]
    assert not objects(as_path(url) / PENDING)  # pyright: ignore[reportArgumentType]
    torchrun(root, url, tmp_path)  # complete already


class Keys:
    """torchrun's store of keys, in one process."""

    def __init__(self) -> None:
        self.found: dict[str, bytes] = {}

    def add(self, key: str, amount: int) -> int:
        return amount

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        if not expected and key not in self.found:
            self.found[key] = desired.encode()
        return self.found.get(key, b"")

    def delete_key(self, key: str) -> bool:
        return self.found.pop(key, None) is not None

    def set(self, key: str, value: str) -> None:
        self.found[key] = value.encode()

    def check(self, keys: list[str]) -> bool:
        return all(key in self.found for key in keys)


@pytest.fixture
def rank_0(monkeypatch: pytest.MonkeyPatch) -> Keys:
    """This process as rank 0 of two, the other of which never comes."""
    c10d = importlib.import_module("torch.distributed.distributed_c10d")
    of_torch = importlib.import_module("torch.distributed.rendezvous")
    keys = Keys()
    monkeypatch.setattr(of_torch, "rendezvous", lambda _: iter([(keys, 0, 2)]))
    monkeypatch.setattr(c10d, "PrefixStore", lambda _, store: store)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    return keys


@pytest.mark.slow
def test_what_waits_counts_and_what_is_torn_does_not(
    root: Path, rank_0: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(root, out="s3://bucket/torn")
    staged = as_path(config.out) / PENDING
    with monkeypatch.context() as patch:
        Interrupt(patch, Staging, "get", 1, Killed())  # the first window waits
        with pytest.raises(Killed):
            harvest(config)
    names = [name for name, _ in listing(staged)(())]
    assert names
    assert exists(staged / names[0] / "window.json")
    rank_0.found.clear()  # torchrun starts all anew, with other keys
    torn = staged / f"window-{9:06d}-{0:016x}" / "tokens"
    write_bytes(torn, b"?")
    store = harvest(config)
    assert_same_content(store.path, root / "whole")
    assert not exists(torn)


@pytest.mark.slow
def test_one_process_goes_on_alone(
    root: Path, rank_0: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(root, out="s3://bucket/alone")
    with monkeypatch.context() as patch:
        Interrupt(patch, Staging, "get", 2, Killed())
        with pytest.raises(Killed):
            harvest(config)
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.delenv("RANK")
    store = harvest(config)
    assert_same_content(store.path, root / "whole")


def test_who_takes_which_window(rank_0: Keys) -> None:
    out: Any = as_path("memory://bucket/claims")
    one, other = (window_locks.RendezvousTeam(out, number) for number in (0, 1))
    assert one.claim(3)
    assert not other.claim(3)
    assert other.claim(4)
    one.release(3)
    assert other.claim(3)
    assert not other.begun()
    assert not other.led()
    one.begin()
    assert other.begun()
    assert other.led()


def test_folders_of_several_machines_are_shared_by_keys(
    rank_0: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def uses_keys() -> bool:
        with window_locks.member(tmp_path / "name") as team:
            return isinstance(team, window_locks.RendezvousTeam)

    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert uses_keys()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert not uses_keys()  # one machine
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE")
    assert not uses_keys()  # processes that something else started


def test_without_torchrun_it_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = settings(root, out="s3://bucket/refused")
    for number in "01":
        monkeypatch.setenv("RANK", number)
        with pytest.raises(InputError, match="only if torchrun starts them"):
            harvest(config)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(ArtefactError, match="rendezvous cannot be reached"):
        harvest(replace(config, out="s3://bucket/unreached"))

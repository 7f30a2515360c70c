"""Several processes harvest what one does, to the byte; they die, come back, and are refused."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from activations import ActivationStore, HarvestConfig, ModelConfig, append, harvest
from activations.corpora.documents import CorpusConfig
from activations.corpora.sequences import Sequences
from activations.harvesting import compute, window_locks, windows
from activations.harvesting.staging import Staging
from activations.storage.layout import PENDING
from activations.storage.verify import examine
from saescope.errors import ArtefactError, InputError
from saescope.locks import locked
from tests.damage import SITES, assert_same_content, flip
from tests.interrupt import Interrupt, Killed
from tests.tiny import make_tiny_corpus, make_tiny_model
from tests.torture.child import Child, Role

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "int8": {"storage": "int8", "outliers": 1.2, "packing": "separate", "seed": 3},
    "none": {"storage": "none", "statistics_windows": 2, "max_tokens": 2048},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    make_tiny_model(folder / "model")
    make_tiny_corpus(folder, documents=20)
    more = make_tiny_corpus(folder / "more", documents=8)
    more.write_text(more.read_text().replace("Number", "Another"))
    return folder


def settings(root: Path, *, out: str | Path, **fields: Any) -> HarvestConfig:
    fields = {
        "context": 16, "chunk_rows": 64, "window_chunks": 4, "batch_sequences": 8,
        "held_out_fraction": 0.3, "out": str(out), **fields,
    }  # fmt: skip
    return HarvestConfig(
        model=ModelConfig(spec=str(root / "model"), dtype="float32"),
        corpus=CorpusConfig(source=str(root / "corpus.jsonl"), deduplicate=True),
        sites=SITES, **fields,
    )  # fmt: skip


@pytest.fixture
def make(root: Path, tmp_path: Path) -> Callable[..., HarvestConfig]:
    return lambda **fields: settings(root, **{"out": tmp_path / "out", **fields})


@pytest.fixture(scope="module")
def whole(root: Path) -> Path:
    """What one process makes of the plain case."""
    harvest(settings(root, out=root / "whole"))
    return root / "whole"


def start(config: HarvestConfig, *roles: Role, work: str = "harvest") -> list[Child]:
    """Processes that harvest together; logs are beside the store's folder."""
    logs = Path(config.out).parent / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    return [Child(config, logs, work=work, role=role) for role in roles]


def team(size: int, *, waits: bool = True) -> list[Role]:
    """Ranks of which the first stands still in its first window."""
    return [Role(number, size, waits=waits and number == 0) for number in range(size)]


def until(condition: Callable[[], bool]) -> None:
    last = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < last
        time.sleep(0.02)


def logs_of(children: list[Child]) -> str:
    return "".join(child.log.read_text() for child in children)


def alone_beside(out: Path) -> bool:
    """Whether nothing but the logs, and another store, is left beside a store."""
    return {path.name for path in out.parent.iterdir()} <= {out.name, "logs", "whole"}


@pytest.mark.parametrize(
    "case", ["plain", *(pytest.param(case, marks=pytest.mark.slow) for case in ("int8", "none"))]
)
def test_ranks_harvest_what_one_process_does(
    make: Callable[..., HarvestConfig], tmp_path: Path, case: str
) -> None:
    size = 3 if case == "plain" else 2
    one = harvest(make(**CASES[case], out=str(tmp_path / "whole" / "out")))
    config = make(**CASES[case])
    children = start(config, *team(size))
    # the first has one window and stands still: the others compute all the rest
    until(lambda: sum(child.windows for child in children) == len(one.windows))
    children[0].go_on()
    assert [child.end() for child in children] == [0] * size, logs_of(children)
    assert children[0].windows == 1
    assert len(one.windows) > 2 * size
    assert_same_content(Path(config.out), one.path)
    assert alone_beside(Path(config.out))
    done = one.n_tokens
    assert f"harvest of 3 site(s): done, {done:,} tokens" in children[0].log.read_text()
    assert [child.log.read_text() for child in children[1:]] == [""] * (size - 1)


@pytest.mark.slow
def test_ranks_append_what_one_process_does(
    make: Callable[..., HarvestConfig], root: Path, tmp_path: Path
) -> None:
    source = str(root / "more" / "corpus.jsonl")
    stores = []
    for name in ("whole", "out"):
        config = make(out=str(tmp_path / name))
        before = len(harvest(config).windows)
        more = replace(config, corpus=CorpusConfig(source=source, deduplicate=True))
        if name == "whole":
            stores.append(append(more).path)
        else:
            children = start(more, *team(2), work="append")
            until(lambda: children[1].windows > 0)  # noqa: B023
            children[0].go_on()
            assert [child.end() for child in children] == [0, 0], logs_of(children)
            stores.append(Path(config.out))
            computed = [child.windows for child in children]
            assert sum(computed) == len(ActivationStore.open(config.out).windows) - before
    assert_same_content(*stores)


@pytest.mark.slow
def test_what_a_dead_rank_was_computing_is_computed_by_another(
    make: Callable[..., HarvestConfig], whole: Path
) -> None:
    config = make()
    children = start(config, Role(0, 3, waits=True), Role(1, 3, dies_at=2), Role(2, 3, dies_at=1))
    assert [child.end() for child in children[1:]] == [-signal.SIGKILL] * 2
    children[0].go_on()
    assert children[0].end() == 0, logs_of(children)
    # two of them were begun by those that died, and one was finished by them
    assert children[0].windows == len(ActivationStore.open(whole).windows) - 1
    assert_same_content(Path(config.out), whole)
    assert alone_beside(Path(config.out))


@pytest.mark.slow
def test_a_rank_that_comes_back_takes_part_again(
    make: Callable[..., HarvestConfig], whole: Path
) -> None:
    config = make()
    first, second = start(config, Role(0, 2, waits=True), Role(1, 2, dies_at=1))
    assert second.end() == -signal.SIGKILL
    (again,) = start(config, Role(1, 2))
    until(lambda: again.windows == len(ActivationStore.open(whole).windows) - 1)
    first.go_on()
    assert [first.end(), again.end()] == [0, 0], logs_of([first, again])
    assert_same_content(Path(config.out), whole)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 3])
def test_all_killed_and_resumed_by_any_number(
    make: Callable[..., HarvestConfig], whole: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """What waits is not computed again, though rank 0 died before it committed any of it."""
    config = make()
    out, total = Path(config.out), len(ActivationStore.open(whole).windows)
    children = start(config, Role(0, 2, waits=True), Role(1, 2, dies_at=4))
    assert children[1].end() == -signal.SIGKILL
    assert children[0].kill_after(0) == -signal.SIGKILL
    begun = ActivationStore.open(out)
    assert (begun.windows, begun.complete) == ([], False)
    report = examine(begun)
    assert (report.faults, report.leftovers) == ([], [PENDING])
    left = total - 3
    if size == 1:
        with monkeypatch.context() as patch:
            run = Interrupt(patch, compute, "run_window", -1, Killed())
            harvest(config)
        assert run.calls == left
    else:
        children = start(config, *team(size, waits=False))
        assert [child.end() for child in children] == [0] * size, logs_of(children)
        assert sum(child.windows for child in children) == left
    assert_same_content(out, whole)
    assert alone_beside(out)


@pytest.mark.slow
def test_a_second_start_is_refused_at_every_rank(
    make: Callable[..., HarvestConfig], whole: Path
) -> None:
    config = make()
    first = start(config, *team(2))
    until(lambda: first[0].windows == 1 and first[1].windows > 0)
    elsewhere = Path(config.out).parent / "logs" / "second"
    elsewhere.mkdir()
    second = [Child(config, elsewhere, role=role) for role in team(2)]
    assert [child.end() for child in second] == [1, 1]
    assert "in use by harvest, process" in second[0].log.read_text()
    assert "another process is rank 1 of a harvest there" in second[1].log.read_text()
    first[0].go_on()
    assert [child.end() for child in first] == [0, 0], logs_of(first)
    assert_same_content(Path(config.out), whole)


def test_a_rank_with_other_settings_is_refused_and_the_others_go_on(
    make: Callable[..., HarvestConfig], whole: Path
) -> None:
    config = make()
    (first,) = start(config, Role(0, 2, waits=True))
    (second,) = start(make(seed=1), Role(1, 2))
    assert second.end() == 1
    assert "another configuration: seed is 0 there and 1 here" in second.log.read_text()
    first.go_on()
    assert first.end() == 0
    assert_same_content(Path(config.out), whole)


@pytest.mark.timeout(60)
def test_without_rank_0_the_others_say_so(
    make: Callable[..., HarvestConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make()
    monkeypatch.setattr(window_locks, "_PATIENCE", 0.3)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    gone = "rank 0, which alone finishes a harvest, has not been at work here for 0 s; run the same"
    with pytest.raises(ArtefactError, match=gone):
        harvest(config)  # nobody has begun
    assert list(Path(config.out).parent.iterdir()) == []
    with monkeypatch.context() as patch:
        patch.setenv("RANK", "0")
        Interrupt(patch, compute, "run_window", 2, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            harvest(config)
    with pytest.raises(ArtefactError, match=gone):
        harvest(config)  # it was begun
    begun = ActivationStore.open(config.out)
    assert not begun.complete
    assert alone_beside(Path(config.out))


def test_what_waits_is_of_this_harvest_and_whole_or_is_not_used(
    make: Callable[..., HarvestConfig], whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make()
    out = Path(config.out)
    children = start(config, Role(0, 2, waits=True), Role(1, 2, dies_at=5))
    assert children[1].end() == -signal.SIGKILL
    children[0].kill_after(0)
    waits = sorted((out / PENDING).glob("window-*"))
    assert len(waits) == 4
    flip(waits[0], random.Random(0))  # a byte of one of its files
    (waits[1] / "activations.zarr").mkdir()  # nothing that belongs there: does not matter
    (waits[2] / SITES[0] / "c" / "0" / "0").unlink()
    waits[3].rename(waits[3].with_name(waits[3].name[:-4] + "0000"))  # of another text
    (out / PENDING / ".window-000009-0123456789abcdef.abcdefgh").mkdir()  # died while writing
    with monkeypatch.context() as patch:
        run = Interrupt(patch, compute, "run_window", -1, Killed())
        harvest(config)
    assert run.calls == len(ActivationStore.open(whole).windows) - 1
    assert_same_content(out, whole)


def test_the_name_of_what_waits_tells_everything_that_decides_it(
    make: Callable[..., HarvestConfig], whole: Path, tmp_path: Path
) -> None:
    store = ActivationStore.open(whole)
    other = harvest(make(out=str(tmp_path / "other" / "out"), seed=1))
    tokens = np.zeros((2, 16), np.int32)
    group = Sequences(tokens, tokens, [(0, "a", "b")])
    window = windows.MissingWindow(1, "train", group, 32, (0, 0, 1), measured=True)
    variants = [
        window,
        replace(window, number=2),
        replace(window, split="held_out"),
        replace(window, first_sequence=33),
        replace(window, seed=(0, 0, 2)),
        replace(window, measured=False),
        replace(window, group=replace(group, tokens=tokens + 1)),
        replace(window, group=replace(group, document=tokens + 1)),
        replace(window, group=replace(group, described=[])),
    ]
    names = {Staging(store).name(each) for each in variants} | {Staging(other).name(window)}
    assert len(names) == len(variants) + 1
    assert Staging(store).name(window) == Staging(ActivationStore.open(whole)).name(window)


def test_a_finished_harvest_has_nothing_that_waits(whole: Path, tmp_path: Path) -> None:
    store = shutil.copytree(whole, tmp_path / "store")
    (store / PENDING).mkdir()
    assert [fault.path for fault in examine(ActivationStore.open(store)).faults] == [PENDING]


@pytest.mark.slow
def test_interrupted_under_torchrun_and_finished_by_one(
    make: Callable[..., HarvestConfig], tmp_path: Path
) -> None:
    """Both stop, one speaks."""
    config = make(batch_sequences=1)
    file = tmp_path / "harvest.toml"
    file.write_text(
        f"sites = {list(config.sites)}\nout = '{config.out}'\ncontext = 16\nchunk_rows = 64\n"
        f"window_chunks = 4\nbatch_sequences = 1\nheld_out_fraction = 0.3\n"
        f"[model]\nspec = '{config.model.spec}'\ndtype = 'float32'\n"
        f"[corpus]\nsource = '{config.corpus.source}'\ndeduplicate = true\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    process = subprocess.Popen(
        [*command, "2", "-m", "saescope", "harvest", str(file)], text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    out = Path(config.out)
    until(lambda: (out / PENDING).exists() or process.poll() is not None)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0, "it was finished before it could be interrupted"
    assert errors.count("run the same command again to go on") == 1, errors
    store = harvest(config)
    one = harvest(replace(config, out=str(tmp_path / "one" / "out")))
    assert_same_content(store.path, one.path)


# ---- without a second process -------------------------------------------------------------------


def test_the_lock_of_the_store_is_that_of_rank_0(
    make: Callable[..., HarvestConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with locked(config.out, "doctor"), pytest.raises(ArtefactError, match="in use by doctor"):
        harvest(config)


def test_a_file_system_without_locks_is_named(
    make: Callable[..., HarvestConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(window_locks.fcntl, "lockf", fails)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ArtefactError, match=r"cannot lock files.*which several processes need"):
        harvest(make())


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize("work", [harvest, append])
def test_an_object_store_is_for_one_process(
    make: Callable[..., HarvestConfig], monkeypatch: pytest.MonkeyPatch, rank: str, work: Callable
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(InputError, match=r"object store only if torchrun starts them"):
        work(make(out="memory://ranks/store"))

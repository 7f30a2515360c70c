"""Harvests killed, interrupted, flooded and damaged at random: `make torture`.

The default suite runs a small share of the trials.
"""

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from activations import (
    ActivationLoader,
    ActivationStore,
    HarvestConfig,
    ModelConfig,
    append,
    harvest,
)
from activations.corpora.documents import CorpusConfig
from activations.recompute.doctor import DoctorConfig, doctor
from activations.storage.verify import examine
from saescope.artefact import MANIFEST
from saescope.errors import ArtefactError
from saescope.paths import local
from tests.damage import DAMAGES, SITES, assert_same_content, restore
from tests.tiny import make_tiny_corpus, make_tiny_model
from tests.torture.child import Child, Role, command

FEW_OR_ALL = pytest.mark.parametrize(
    "share",
    [
        pytest.param("few", marks=pytest.mark.slow),
        pytest.param("all", marks=pytest.mark.torture),
    ],
)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> HarvestConfig:
    root = tmp_path_factory.mktemp("torture")
    model = make_tiny_model(root / "model")
    corpus = make_tiny_corpus(root, documents=30)
    return HarvestConfig(
        model=ModelConfig(spec=str(model), dtype="float32"),
        corpus=CorpusConfig(source=str(corpus)),
        sites=SITES, out=str(root / "whole"), context=16, chunk_rows=128, window_chunks=4,
        batch_sequences=8, held_out_fraction=0.3,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(config: HarvestConfig) -> Path:
    return local(harvest(config).path)


@pytest.fixture(scope="module")
def length(config: HarvestConfig, whole: Path, tmp_path_factory: pytest.TempPathFactory) -> float:
    """Seconds that a harvest takes in a process of its own."""
    folder = tmp_path_factory.mktemp("timed")
    Child(replace(config, out=str(folder / "first")), folder).end()
    started = time.monotonic()
    assert Child(replace(config, out=str(folder / "second")), folder).end() == 0
    return time.monotonic() - started


def goes_on(config: HarvestConfig, whole: Path) -> None:
    """What is committed is whole, and the resumed store is the one of an uninterrupted harvest."""
    out = Path(config.out)
    known = {"child.log", "logs", out.name}
    if (out / MANIFEST).exists():
        store = ActivationStore.open(out)
        assert examine(store).faults == []
        if store.complete:  # killed before it removed its locks, which mean nothing
            known |= {f".{out.name}.lock", f".{out.name}.ranks"}
    harvest(config)
    assert_same_content(out, whole)
    assert {path.name for path in out.parent.iterdir()} <= known
    assert ActivationStore.open(out).verify() > 0


@pytest.mark.timeout(3600)
@FEW_OR_ALL
def test_killed_at_random_instants(
    config: HarvestConfig, whole: Path, length: float, tmp_path: Path, share: str
) -> None:
    chance, ends = random.Random(share), []
    for trial in range(2 if share == "few" else 25):
        folder = tmp_path / str(trial)
        folder.mkdir()
        config = replace(config, out=str(folder / "out"))
        times = [chance.uniform(0, 1.05 * length) for _ in range(chance.choice([1, 1, 2]))]
        ends += [Child(config, folder).kill_after(seconds) for seconds in times]
        goes_on(config, whole)
    assert set(ends) <= {0, -signal.SIGKILL}
    assert -signal.SIGKILL in ends or share == "few"


@pytest.mark.timeout(3600)
@FEW_OR_ALL
def test_killed_before_random_changes_of_the_disk(
    config: HarvestConfig, whole: Path, tmp_path: Path, share: str
) -> None:
    """Half of them in the finalisation: the last window's commit, and that of the end."""
    (tmp_path / "counted").mkdir()
    full = Child(replace(config, out=str(tmp_path / "counted" / "out")), tmp_path / "counted")
    assert full.end() == 0
    changes, chance = full.changes, random.Random(share)
    assert changes > 200
    last = range(changes - 60, changes + 1)
    few = [chance.randrange(1, changes), chance.choice(last)]
    many = [chance.randrange(1, changes) for _ in range(13)] + chance.sample(last, 12)
    for trial, kill_at in enumerate(few if share == "few" else many):
        folder = tmp_path / str(trial)
        folder.mkdir()
        config = replace(config, out=str(folder / "out"))
        assert Child(config, folder, kill_at).end() == -signal.SIGKILL
        goes_on(config, whole)


def two_at_work(
    config: HarvestConfig,
    kill_at: tuple[int | None, int | None],
    chance: random.Random,
    patience: float = 10,
) -> list[Child]:
    """Two ranks that have ended, by themselves or killed; the second computes windows before.

    patience: seconds that it has for them; in a harvest that is gone on with, few may be left.
    """
    logs = Path(config.out).parent / "logs"
    logs.mkdir(exist_ok=True)
    both = [
        Child(config, logs, kill_at[number], role=Role(number, 2, waits=number == 0))
        for number in range(2)
    ]
    begun, until = chance.choice([1, 2, 3]), time.monotonic() + patience
    while both[1].windows < begun and all(child.process.is_alive() for child in both):
        if time.monotonic() > until:
            break
        time.sleep(0.01)
    both[0].go_on()
    if both[0].end() != 0:  # the second would wait for it to come back
        both[1].kill_after(chance.uniform(0, 0.3))
    both[1].end()
    return both


@pytest.mark.timeout(3600)
@FEW_OR_ALL
def test_two_ranks_killed_before_random_changes_of_the_disk(
    config: HarvestConfig, whole: Path, tmp_path: Path, share: str
) -> None:
    """In what either puts away, in commits and in the finalisation; resumed by one, or by two."""
    chance = random.Random(share)
    (tmp_path / "counted").mkdir()
    counted = replace(config, out=str(tmp_path / "counted" / "out"))
    full = two_at_work(counted, (None, None), chance, patience=300)
    assert [child.end() for child in full] == [0, 0]
    assert_same_content(tmp_path / "counted" / "out", whole)
    first, second = (child.changes for child in full)
    assert min(first, second) > 40
    # anywhere; in the last commits and the finalisation; the second rank; both
    kinds = [
        lambda: (chance.randrange(1, first), None),
        lambda: (chance.randrange(first - 60, first), None),
        lambda: (None, chance.randrange(1, second)),
        lambda: (chance.randrange(first // 2, first), chance.randrange(1, second)),
    ]
    killed = 0
    for trial in (1, 3) if share == "few" else range(40):
        folder = tmp_path / str(trial)
        folder.mkdir()
        config = replace(config, out=str(folder / "out"))
        for _ in range(chance.choice([1, 1, 2]) if share == "all" else 1):
            ends = [child.end() for child in two_at_work(config, kinds[trial % 4](), chance)]
            assert set(ends) <= {0, -signal.SIGKILL}
            killed += -signal.SIGKILL in ends
        if chance.random() < 0.3:
            done = two_at_work(config, (None, None), chance)
            assert [child.end() for child in done] == [0, 0]
        goes_on(config, whole)
    assert killed >= (1 if share == "few" else 30)


@pytest.mark.timeout(3600)
@FEW_OR_ALL
def test_an_append_killed_before_random_changes_of_the_disk(
    config: HarvestConfig, whole: Path, tmp_path: Path, share: str
) -> None:
    """What was there before is whole at any time, and the append goes on to the same bytes."""
    lines = Path(config.corpus.source).read_text().replace("Number", "Another")
    (tmp_path / "more.jsonl").write_text(lines)
    more = replace(config, corpus=CorpusConfig(source=str(tmp_path / "more.jsonl")))

    def child(name: str, kill_at: int | None) -> tuple[Child, HarvestConfig]:
        out = tmp_path / name / "out"
        shutil.copytree(whole, out)
        appending = replace(more, out=str(out))
        return Child(appending, out.parent, kill_at, "append"), appending

    full, done = child("counted", None)
    assert full.end() == 0
    assert len(ActivationStore.open(done.out).windows) > len(ActivationStore.open(whole).windows)
    chance = random.Random(share)
    for trial in range(2 if share == "few" else 25):
        killed, appending = child(str(trial), chance.randrange(1, full.changes + 1))
        assert killed.end() == -signal.SIGKILL
        assert examine(ActivationStore.open(appending.out)).faults == []
        append(appending)
        assert_same_content(Path(appending.out), Path(done.out))


@pytest.mark.timeout(3600)
@FEW_OR_ALL
def test_interrupted_at_random_instants(
    config: HarvestConfig, whole: Path, length: float, tmp_path: Path, share: str
) -> None:
    """Ctrl-C and SIGTERM stop cleanly: their exit code, and one line that says how to go on."""
    text = "\n".join(
        f"{name} = {value!r}" if not isinstance(value, tuple) else f"{name} = {list(value)}"
        for name, value in vars(config).items()
        if isinstance(value, int | float | str | tuple) and name != "out"
    )
    file = tmp_path / "harvest.toml"
    model, corpus = config.model, config.corpus
    file.write_text(
        f"{text}\n[model]\nspec = '{model.spec}'\ndtype = '{model.dtype}'\n"
        f"[corpus]\nsource = '{corpus.source}'\n"
    )
    chance = random.Random(share)
    for trial in range(2 if share == "few" else 20):
        folder = tmp_path / str(trial)
        folder.mkdir()
        log, signum = folder / "child.log", (signal.SIGINT, signal.SIGTERM)[trial % 2]
        process = command(["harvest", str(file), "--out", str(folder / "out")], log)
        while not log.exists() or "harvest" not in log.read_text():
            assert process.is_alive(), log.read_text()
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.8 * length))
        if process.is_alive():
            os.kill(process.pid or 0, signum)
        process.join(60)
        if process.exitcode != 0:
            assert process.exitcode == 128 + signum
            assert "run the same command again to go on" in log.read_text().splitlines()[-1]
        goes_on(replace(config, out=str(folder / "out")), whole)


@pytest.mark.timeout(3600)
@FEW_OR_ALL
def test_every_damage_is_named_refused_and_repaired(
    whole: Path, tmp_path: Path, share: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "store"))
    chance, named = random.Random(share), 0
    trials = 40 if share == "few" else 200
    for trial in range(trials):
        damage = DAMAGES[trial % len(DAMAGES)](folder, chance)
        try:
            store = ActivationStore.read(folder)
        except ArtefactError as error:  # the ledger
            found = {str(Path(str(error).split(":")[0]).relative_to(folder))}
        else:
            found = {fault.path for fault in examine(store).faults}
            assert found == set(damage.paths), damage
            if not damage.paths[0].endswith("zarr.json"):  # for those who read by Zarr
                with pytest.raises(ArtefactError):
                    read_everything(store)
        named += found == set(damage.paths)
        if trial % (20 if share == "few" else 4) == 0:
            assert doctor(DoctorConfig(path=str(folder), repair=True)) == 0, damage
            assert_same_content(folder, whole)
        else:
            restore(folder, whole, damage)
    assert named == trials
    with capsys.disabled():
        print(f"\n{named} of {trials} damages named")  # noqa: T201


def read_everything(store: ActivationStore) -> None:
    """As training, evaluation and indexing read."""
    for split in ("train", "held_out"):
        for _ in ActivationLoader(store, store.sites, batch_size=100, epochs=1, split=split):
            pass
    for array in (store.tokens, store.document, store.keep):
        _ = array[:]
    for window in range(len(store.windows)):
        store.read_sequences("split", window)
    store.document_table()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of half a megabyte, where this process may mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "none", str(folder)],
        capture_output=True, check=False,
    )  # fmt: skip
    if mounted.returncode:
        pytest.skip("may not mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.timeout(3600)
@FEW_OR_ALL
def test_a_full_disk(config: HarvestConfig, whole: Path, small_disk: Path, share: str) -> None:
    """One clear error, what is committed is whole, and it goes on once there is room."""
    config, chance = replace(config, out=str(small_disk / "out")), random.Random(share)
    size = sum(path.stat().st_size for path in whole.rglob("*") if path.is_file())
    assert size > 300_000
    for _ in range(2 if share == "few" else 20):
        room = chance.randrange(0, 300_000)
        ballast = small_disk / "ballast"
        ballast.write_bytes(bytes(512 * 1024 - room))
        with pytest.raises(ArtefactError, match=r"disk is full.*run the same command again"):
            harvest(config, ignore_space=True)  # it would refuse to begin
        if Path(config.out).exists():
            assert examine(ActivationStore.open(config.out)).faults == []
        ballast.unlink()
        subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
        harvest(config)
        assert_same_content(Path(config.out), whole)
        shutil.rmtree(config.out)
        subprocess.run(["mount", "-o", "remount,size=512k", str(small_disk)], check=True)


@pytest.mark.timeout(3600)
@FEW_OR_ALL
def test_two_processes_on_one_store(
    config: HarvestConfig, whole: Path, tmp_path: Path, share: str
) -> None:
    for trial in range(1 if share == "few" else 10):
        folder = tmp_path / str(trial)
        folder.mkdir()
        config = replace(config, out=str(folder / "out"))
        logs = [folder / "a", folder / "b"]
        for log in logs:
            log.mkdir()
        both = [Child(config, log) for log in logs]
        codes = sorted(child.end() for child in both)
        assert codes in ([0, 0], [0, 1])  # the second may have come when the first had ended
        if codes == [0, 1]:
            shown = "".join((log / "child.log").read_text() for log in logs)
            assert "in use by harvest, process" in shown
        assert_same_content(Path(config.out), whole)

"""train, convert, index and eval killed before random changes of the disk, and on full disks.

At every instant what was there, or what is to be there, is there whole; the same command again goes
on to the same bytes and leaves nothing behind.
"""

import random
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from store import FeatureStore
from tests.tiny import make_tiny_harvest, make_tiny_model
from tests.torture.child import killed_command
from tests.torture.test_torture import FEW_OR_ALL

COMMANDS = ("train", "convert", "index", "eval")
_NOT_COMPARED = ("manifest.json", "features.duckdb")
"""they have the time in them"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and harvest, and two runs."""
    folder = tmp_path_factory.mktemp("commands")
    make_tiny_harvest(folder / "data", make_tiny_model(folder / "model"))
    for seed in (0, 1):
        made(folder, "train", seed)
    return folder


def made(root: Path, command: str, seed: int = 0) -> Path:
    """What a command that nobody disturbs makes."""
    out = root / f"made-{seed}" / command
    if not out.exists():
        out.parent.mkdir(exist_ok=True)
        assert killed_command(words(root, command, out, seed), out.parent)[0] == 0
    return out


def words(root: Path, command: str, out: Path, seed: int = 0) -> list[str]:
    """A command line that writes to `out`; of another seed another content."""
    run = str(root / f"made-{seed}" / "train")
    if command == "train":
        fields = {
            "harvest": root / "data" / "harvest", "out": out, "seed": seed, "passes": 0.5,
            "sae.d-sae": 64, "sae.k": 4, "trainer.batch-size": 64, "trainer.checkpoint-every": 3,
            "trainer.evaluate-every": 4,
        }  # fmt: skip
        return ["train", *(str(x) for n, v in fields.items() for x in (f"--{n}", v))]
    more = {"convert": ["--to", "saelens"], "index": [], "eval": ["--tokens", "0"]}[command]
    return [command, run, "--out", str(out), *more]


def content(path: Path) -> dict[str, bytes]:
    """Files by name, but for what is being prepared; of those with the time in them that they are
    there, of a store that it can be opened."""
    found = {}
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        name = str(file.relative_to(path))
        if file.is_file() and (name == "." or not name.startswith(".")):
            found[name] = b"" if file.name in _NOT_COMPARED else file.read_bytes()
            if file.suffix == ".duckdb":
                FeatureStore.open(file).close()
    return found


def is_clean(folder: Path) -> bool:
    return not [path for path in folder.rglob(".*") if path.name != "said.log"]


@pytest.mark.timeout(3600)
@FEW_OR_ALL
def test_killed_before_random_changes_of_the_disk(root: Path, tmp_path: Path, share: str) -> None:
    chance = random.Random(share)
    chosen = (
        ["convert", "train", "index"]
        if share == "few"
        else [c for c in COMMANDS for _ in range(12)]
    )
    for trial, command in enumerate(chosen):
        whole = content(made(root, command))
        (tmp_path / "counted").mkdir(exist_ok=True)
        out = tmp_path / "counted" / f"{trial}"
        code, changes = killed_command(words(root, command, out), out.parent)
        assert (code, content(out)) == (0, whole)
        folder = tmp_path / f"killed-{trial}"
        folder.mkdir()
        line = words(root, command, folder / "out")
        code, _ = killed_command(line, folder, chance.randrange(1, changes + 1))
        assert code == -signal.SIGKILL
        if command != "train" and (folder / "out").exists():
            assert content(folder / "out") in (whole, {})
        assert killed_command(line, folder)[0] == 0, folder.with_name("said.log").read_text()
        assert content(folder / "out") == whole
        assert is_clean(folder)


@pytest.mark.timeout(3600)
@FEW_OR_ALL
def test_reliability_killed_goes_on_to_the_same_bytes(
    root: Path, tmp_path: Path, share: str
) -> None:
    """Killed before changes of the disk, most of which are of groups that are kept."""
    chance, folder = random.Random(share), tmp_path / "runs"
    paths = [folder / f"seed-{seed}" for seed in (0, 1, 2)]
    line = ["eval", *map(str, paths), "--tokens", "0", "--reliability"]

    def prepare() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        for seed, path in enumerate(paths):
            shutil.copytree(made(root, "train", seed), path)

    prepare()
    code, changes = killed_command(line, folder)
    whole = content(folder)
    assert code == 0
    assert "reliability.json" in whole
    assert "reliability.unfinished" not in whole
    for kill_at in chance.sample(range(1, changes + 1), 2 if share == "few" else 20):
        prepare()
        assert killed_command(line, folder, kill_at)[0] == -signal.SIGKILL
        assert killed_command(line, folder)[0] == 0, folder.with_name("said.log").read_text()
        assert content(folder) == whole
        assert is_clean(folder)


@pytest.mark.timeout(3600)
@FEW_OR_ALL
def test_killed_while_replacing_loses_nothing(root: Path, tmp_path: Path, share: str) -> None:
    """Every change of the disk in turn, of a convert; a share of those of the others."""
    chance = random.Random(share)
    for command in ("convert",) if share == "few" else ("convert", "eval", "index"):
        old, new = (made(root, command, seed) for seed in (1, 0))
        allowed = (content(old), content(new))

        def replacing(
            name: str, kill_at: int | None, command: str = command, old: Path = old
        ) -> tuple[int, int, Path]:
            folder = tmp_path / f"{command}-{name}"
            folder.mkdir()
            shutil.copytree(old, folder / "out") if old.is_dir() else shutil.copyfile(
                old, folder / "out"
            )
            line = [*words(root, command, folder / "out"), "--replace"]
            return *killed_command(line, folder, kill_at), folder / "out"

        code, changes, out = replacing("counted", None)
        assert (code, content(out)) == (0, allowed[1])
        every = range(1, changes + 1)
        for kill_at in chance.sample(every, 3) if share == "few" else every:
            code, _, out = replacing(str(kill_at), kill_at)
            assert code == -signal.SIGKILL
            assert content(out) in allowed, kill_at
            line = [*words(root, command, out), "--replace"]
            assert killed_command(line, out.parent)[0] == 0
            assert content(out) == allowed[1]
            assert is_clean(out.parent)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system whose size is changed, where this process may mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.timeout(3600)
@FEW_OR_ALL
def test_full_disks(root: Path, small_disk: Path, share: str) -> None:
    """One line that says so, what was there is kept, and the same command again goes on."""

    def resize(size: str) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", str(small_disk)], check=True)

    chance, full = random.Random(share), 0
    chosen = ("convert", "eval") if share == "few" else [c for c in COMMANDS for _ in range(6)]
    said = small_disk.with_name("said.log")
    for command in chosen:
        whole = content(made(root, command))
        kib = sum(-(-path.stat().st_size // 4096) * 4 for path in files_of(root, command))
        out = small_disk / "out"
        resize(f"{chance.randrange(4, max(8, kib), 4)}k")
        code, _ = killed_command(words(root, command, out), small_disk)
        if code:
            full += 1
            line = said.read_text().splitlines()[-1]
            assert code == 2
            assert line.startswith("saescope: ")
            assert "the disk is full" in line or "disk space" in line
            assert "Traceback" not in said.read_text()
            if command not in ("train", "index"):  # those go on from what was committed
                assert not any(small_disk.iterdir())
        resize("256m")
        assert killed_command(words(root, command, out), small_disk)[0] == 0
        assert content(out) == whole
        assert is_clean(small_disk)
        shutil.rmtree(out) if out.is_dir() else out.unlink()
    assert full


def files_of(root: Path, command: str) -> list[Path]:
    found = made(root, command)
    return [found] if found.is_file() else [path for path in found.rglob("*") if path.is_file()]

"""`saescope demo`, with a tiny model and text in the place of the packaged ones."""

import os
import pty
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from activations import ActivationStore, HarvestConfig
from dashboards import demo_command, demo_time
from dashboards.demo_time import Machine, Work
from sae.training.config import TrainConfig
from saescope.__main__ import main
from saescope.config import load
from saescope.errors import InputError
from store.database import STORE_FILE
from tests.interrupt import Interrupt
from tests.tiny import D_MODEL, make_tiny_corpus, make_tiny_model

ROOT = Path(__file__).resolve().parents[2]
HARVEST = """
max_tokens = 6400
sites = ["blocks.1.hook_resid_post"]
out = "data/tiny"
context = 16
chunk_rows = 128
batch_sequences = 16
held_out_fraction = 0.2
model.spec = "{folder}/model"
model.dtype = "float32"
corpus.source = "{folder}/text/corpus.jsonl"
"""
TRAIN = """
harvest = "data/tiny"
out = "runs/tiny-topk"
passes = 2.0
sae.kind = "topk"
sae.d_sae = 128
sae.k = 8
trainer.batch_size = 64
trainer.checkpoint_every = 5
"""
STORE = "stores/tiny-topk"
ON_A_TERMINAL = """
import sys
from tests.e2e import test_demo
from dashboards import demo_command
from saescope.__main__ import main
import pytest, pathlib
with pytest.MonkeyPatch.context() as patch:
    test_demo.put_in_place(patch, pathlib.Path(sys.argv.pop(1)))
    sys.exit(main(["demo", "--quick", "--port", sys.argv.pop(1)]))
"""


def write_tiny_demo(folder: Path) -> None:
    """Write a tiny model, its text, and the demo's two configurations with them."""
    make_tiny_model(folder / "model")
    make_tiny_corpus(folder / "text", documents=400)
    (folder / "harvest.toml").write_text(HARVEST.format(folder=folder))
    (folder / "train.toml").write_text(TRAIN)


def put_in_place(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Have the quick demo use the files of a folder."""
    found = {
        demo_command.QUICK.harvest: folder / "harvest.toml",
        demo_command.QUICK.train: folder / "train.toml",
    }
    patch.setattr(demo_command, "examples", lambda: found)
    patch.setattr(demo_time, "WIDTH", D_MODEL)
    patch.setattr("activations.models.packaged.fetch_all", lambda: None)
    # no feature of random weights is plainly about one word
    patch.setattr("sae.commands.steer.suggest", lambda store: (3, 2.0, "Number"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    write_tiny_demo(folder)
    return folder


@pytest.fixture(scope="module")
def work(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the demo was interrupted while it trained."""
    folder = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        put_in_place(patch, files)
        patch.chdir(folder)
        from sae.training.trainer import Trainer

        Interrupt(patch, Trainer, "advance", 12, KeyboardInterrupt())
        assert main(["demo", "--quick"]) == 130
    assert (folder / "runs" / "tiny-topk" / "checkpoints" / "last").is_dir()
    assert not (folder / "stores").exists()
    return folder


def demo(work: Path, files: Path, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.MonkeyPatch.context() as patch:
        put_in_place(patch, files)
        patch.chdir(work)
        assert main(["demo", "--quick", "--port", "8765"]) == 0
    return capsys.readouterr().out


def test_goes_on_to_the_end_and_then_does_nothing_twice(
    work: Path, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    said = demo(work, files, capsys)
    assert "complete already" in said
    assert re.search(r"training: [\d,]+ steps, 10 done before", said)
    assert re.search(r"about 1 minutes? \([\d,]+ tokens/s, \d+ GFLOP/s here\)", said)
    assert "steered (add {3: 3.0}):" in said
    assert said.rstrip().endswith("explore stores/tiny-topk, then open http://localhost:8765")
    made = {p: p.stat().st_mtime_ns for p in work.rglob("*") if p.is_file()}
    again = demo(work, files, capsys)
    for words in ("complete already", "already trained", "already measured", "already built"):
        assert words in again, again
    assert "GFLOP/s" not in again
    assert {p: p.stat().st_mtime_ns for p in work.rglob("*") if p.is_file()} == made
    metrics = re.findall(r"  FVU .*", said)
    assert metrics
    assert all(line in again for line in metrics)
    assert {p.name for p in work.iterdir() if p.is_dir()} == {"data", "runs", "stores"}


def test_a_later_training_is_measured_again(
    work: Path, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demo(work, files, capsys)
    run = work / "runs" / "tiny-topk"
    measured = (run / "evaluation.json").read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        assert main(["eval", "runs/tiny-topk", "--tokens", "64", "--replace"]) == 0
    assert (run / "evaluation.json").read_bytes() != measured
    os.utime(run / "evaluation.json", (0, 0))
    assert "already measured" not in demo(work, files, capsys)
    assert (run / "evaluation.json").read_bytes() == measured


def test_says_first_what_it_will_do(
    work: Path, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = demo(work, files, capsys).splitlines()
    assert lines[0] == f"from text to a steered model, in {work}:"
    assert [line.split()[0] for line in lines[1:7]] == [
        "harvest",
        "train",
        "eval",
        "index",
        "steer",
        "explore",
    ]
    assert "6,400 tokens" in lines[1]
    assert lines[1].endswith("data/tiny")
    assert "128 features" in lines[2]
    assert lines[4].endswith(STORE)


def test_the_two_demos_share_no_folder() -> None:
    from saescope.config import read_toml
    from saescope.examples import examples

    outs = [
        read_toml(examples()[name])["out"]
        for size in (demo_command.FULL, demo_command.QUICK)
        for name in (size.harvest, size.train)
    ]
    assert len({Path(out).name for out in outs}) == 4
    for size in (demo_command.FULL, demo_command.QUICK):
        harvest, train = (read_toml(examples()[name]) for name in (size.harvest, size.train))
        assert train["harvest"] == harvest["out"]
        assert train["site"] in harvest["sites"]


def test_another_harvest_in_its_folder_is_one_error(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_in_place(monkeypatch, files)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "tiny").mkdir(parents=True)
    (tmp_path / "data" / "tiny" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds no harvest"):
        demo_command.demo(demo_command.DemoConfig(quick=True))
    assert [p.name for p in tmp_path.rglob("*")] == ["data", "tiny", "notes.txt"]


def test_minutes_add_up() -> None:
    machine = Machine(tokens=1000.0, product=1e11)
    assert machine.minutes(Work(tokens=120_000, product=0, seconds=0)) == 2
    assert machine.minutes(Work(tokens=0, product=3e13, seconds=0)) == 5
    assert machine.minutes(Work(tokens=60_000, product=6e12, seconds=60)) == 3
    assert machine.minutes(Work(tokens=0, product=0, seconds=5)) == 1


def test_a_slow_machine_harvests_what_fits_into_the_time(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And goes on with that, however fast it has become."""
    put_in_place(monkeypatch, files)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo_command, "FEWEST", 640)
    monkeypatch.setattr(demo_time, "measured_here", lambda _: Machine(tokens=60.0, product=1e12))
    assert main(["demo", "--quick"]) == 0
    said = capsys.readouterr().out
    (line,) = (line for line in said.splitlines() if "instead of" in line)
    assert line == (
        "this machine harvests 60 tokens/s: 1,000 tokens are harvested instead of 6,400, to be "
        "done within 4 minutes; --tokens 6400 harvests them all"
    )
    assert ActivationStore.open("data/tiny").manifest["config"]["max_tokens"] == 1000
    (tmp_path / STORE / STORE_FILE).unlink()
    monkeypatch.setattr(demo_time, "measured_here", lambda _: Machine(tokens=6e4, product=1e12))
    assert main(["demo", "--quick"]) == 0
    said = capsys.readouterr().out
    assert "complete already" in said
    assert "already trained" in said
    assert "instead of" not in said


@pytest.mark.parametrize(
    ("speed", "asked", "tokens"),
    [(6e4, None, 6400), (60.0, None, 1000), (1.0, None, 640), (1.0, 3200, 3200), (6e4, 3200, 3200)],
)
def test_tokens_follow_from_the_speed_unless_they_are_given(
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    speed: float,
    asked: int | None,
    tokens: int,
) -> None:
    put_in_place(monkeypatch, files)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo_command, "FEWEST", 640)
    monkeypatch.setattr(demo_time, "measured_here", lambda _: Machine(speed, product=1e12))
    found = demo_command._fitted(
        demo_command.QUICK,
        load(HarvestConfig, files / "harvest.toml"),
        load(TrainConfig, files / "train.toml"),
        STORE,
        asked,
    )
    assert found.max_tokens == tokens
    assert ("instead of 6,400" in capsys.readouterr().out) == (asked is None and tokens < 6400)


def test_what_is_evaluated_is_in_proportion() -> None:
    assert demo_command.QUICK.evaluated(150_000, 150_000) == 2048
    assert demo_command.FULL.evaluated(75_000, 750_000) == 819
    assert demo_command.FULL.evaluated(20_000, 750_000) == 512


@pytest.fixture
def terminal(work: Path, files: Path) -> Iterator[tuple[subprocess.Popen[bytes], int, int]]:
    """The demo's process on a terminal, the terminal, and the explorer's port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", ON_A_TERMINAL, str(files), str(port)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=work,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "200"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    os.close(theirs)
    yield process, ours, port
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    os.close(ours)


@pytest.mark.slow
def test_a_terminal_gets_the_explorer_until_ctrl_c(
    terminal: tuple[subprocess.Popen[bytes], int, int],
) -> None:
    process, screen, port = terminal
    shown, deadline = "", time.monotonic() + 120
    while "Ctrl-C ends that" not in shown:
        assert time.monotonic() < deadline, shown
        shown += os.read(screen, 4096).decode()
    assert shown.index(f"explorer: http://localhost:{port}") < shown.index("untouched: ")
    while True:
        try:
            with urllib.request.urlopen(f"http://localhost:{port}/_stcore/health", timeout=5) as at:
                assert at.status == 200
                break
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)  # what the terminal does
    assert process.wait(timeout=30) == 0
    try:
        while more := os.read(screen, 4096):
            shown += more.decode()
    except OSError:  # the terminal is closed
        pass
    assert "explorer: ended" in shown
    assert "Traceback" not in shown
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0

"""What is printed steers no terminal, forges no line, and ends quietly where nobody reads it."""

import errno
import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from saescope import __main__ as command_line
from saescope import progress, terminal
from saescope.errors import InputError
from saescope.terminal import harmless

ROOT = Path(__file__).resolve().parents[2]
EVIL = "a\x1b[31m\x9b2J\u202eb\u2066\u2028c\x07\ud800\r\nsaescope: done"


def test_signs_that_a_terminal_obeys_are_shown() -> None:
    shown = harmless(EVIL)
    assert shown.isprintable()
    assert shown.startswith(r"a\x1b[31m\x9b2J\u202eb\u2066\u2028c\x07\ud800\r\nsaescope")
    assert harmless("a\n\tb\r", lines=True) == "a\n\tb\\r"
    for text in ("plain", "Zürich 雨 🙂 👩‍👩‍👧 e\u0301", ""):
        assert harmless(text) == text


def test_every_way_to_print_is_harmless(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    progress.say(EVIL)
    with progress.Progress(EVIL, 2, EVIL) as bar:
        bar.advance(2, EVIL)
    terminal.complain(EVIL)
    monkeypatch.chdir(tmp_path)
    for words in (
        [EVIL], ["eval", EVIL], ["train", EVIL], ["train", f"{EVIL}.toml"], ["eval", f"--{EVIL}"],
        ["eval", "x", "--rows", EVIL],
    ):  # fmt: skip
        with pytest.raises(SystemExit, match=r"^2$"):  # tyro's way to end, and that of a script
            sys.exit(command_line.main(words))
    shown = capsys.readouterr()
    for line in (shown.out + shown.err).splitlines():
        assert line.isprintable(), line
        assert not line.startswith("saescope: done")


def test_a_long_message_is_cut() -> None:
    assert len(str(InputError("x" * 10_000, where="y" * 10_000, given="z" * 10_000))) < 2100


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["bench", "--help"]])
def test_output_that_nobody_reads_ends_quietly(words: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as stream:
        done = subprocess.run(
            [sys.executable, "-m", "saescope", *words],
            stdout=stream, stderr=subprocess.PIPE, cwd=ROOT, check=False,
        )  # fmt: skip
    assert done.stderr == b""
    assert done.returncode in (141, 1)  # 1: the library that prints a command's options


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["bench", "--help"]])
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_output_that_cannot_be_written_is_one_line(words: list[str]) -> None:
    with Path("/dev/full").open("wb") as stream:
        done = subprocess.run(
            [sys.executable, "-m", "saescope", *words],
            stdout=stream, stderr=subprocess.PIPE, cwd=ROOT, check=False,
        )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.count(b"\n") == 1
    assert done.stderr.startswith(b"saescope: standard output: the disk is full")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(errno.EACCES, "no", "some/file"), "some/file: permission denied"),
        (OSError(errno.EMFILE, "no"), "too many files are open in this process"),
        (OSError(errno.EIO, "no", "some/file"), "some/file: reading or writing failed"),
        (MemoryError(), "there is not enough memory"),
        (RuntimeError("... I/O error: No space left on device (os error 28)"), "the disk is full"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "there is not enough memory"),
        (OSError("4096 requested and 20 written"), "the disk is full"),
        (ValueError("embedded null byte"), "a name may not hold a NUL"),
    ],
)
def test_what_the_system_says_is_one_line_of_every_command(
    error: Exception, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: object) -> None:
        raise error

    monkeypatch.setattr("saescope.init_command.init", fails)
    assert command_line.main(["init"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"saescope: {said}")
    assert shown.count("\n") == 1


def test_an_error_of_ours_that_is_no_failure_of_the_system_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(_: object) -> None:
        raise KeyError("a mistake")

    monkeypatch.setattr("saescope.init_command.init", fails)
    with pytest.raises(KeyError, match="a mistake"):
        command_line.main(["init"])


def test_a_signal_waits_for_imports_to_end_and_is_not_forgotten() -> None:
    main = importlib.import_module("saescope.__main__")
    main._received.clear()
    steps = []

    def imports() -> None:
        with main._signals_wait():
            main._interrupt(signal.SIGINT, None)
            steps.append("imported")
            with pytest.raises(KeyboardInterrupt):
                main._interrupt(signal.SIGINT, None)  # the second does not wait

    with pytest.raises(KeyboardInterrupt):
        imports()
    assert steps == ["imported"]
    with pytest.raises(KeyboardInterrupt):
        main._interrupt(signal.SIGTERM, None)
    main._received.clear()

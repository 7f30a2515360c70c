"""Harvests in processes of their own, which are killed."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass, replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from activations import HarvestConfig
from activations.storage.layout import PENDING

_CONTEXT = multiprocessing.get_context("forkserver")
# imported once, so that a process starts in an instant: the imports take seconds
_CONTEXT.set_forkserver_preload(
    [
        *(
            "tests.torture.child",
            "activations.harvesting.pipeline",
            "activations.models.language",
            "transformer_lens",
        ),
        *(
            "sae.commands.train",
            "sae.commands.evaluate",
            "sae.commands.index",
            "sae.commands.convert",
        ),
    ]
)
CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree")


@dataclass(frozen=True)
class Role:
    """A process's place among those that harvest together, and what it does in a window."""

    number: int = 0
    size: int = 1
    dies_at: int | None = None
    """kills itself in its n-th window, once those before wait; no other has put any there"""
    waits: bool = False
    """stands still in its first window until it is told to go on"""


def _changes_disk(event: str, arguments: tuple[Any, ...], folder: str) -> bool:
    """Whether an audited event writes below a folder."""
    if event == "open":
        path, mode, flags = arguments
        writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR)
        return bool(writes) and str(path).startswith(folder) and mode != "r"
    return event in CHANGES and any(str(x).startswith(folder) for x in arguments[:2])


def _count_changes(folder: str, kill_at: int | None, counted: Any) -> None:
    """Count what this process writes below a folder; kill it before its `kill_at`-th change."""
    lock = threading.Lock()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if _changes_disk(event, arguments, folder):
            with lock:
                counted.value += 1
                if counted.value == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def _harvest(
    config: HarvestConfig,
    quiet: str,
    kill_at: int | None,
    counted: Any,
    work: str,
    role: Role,
    windows: Any,
    go: Any,
) -> None:
    import activations
    from activations.harvesting import compute as module

    with Path(quiet).open("w") as sink:
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)
    run_window = module.run_window

    def counted_run(*args: Any, **options: Any) -> Any:
        windows.value += 1
        if windows.value == role.dies_at:
            while len(list(Path(config.out, PENDING).glob("window-*"))) < windows.value - 1:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        if role.waits:
            assert go.wait(120)
        return run_window(*args, **options)

    module.run_window = counted_run
    if role.size > 1:
        os.environ |= {"RANK": str(role.number), "WORLD_SIZE": str(role.size)}
    _count_changes(str(Path(config.out).parent), kill_at, counted)
    getattr(activations, work)(config)


def _command(
    arguments: list[str],
    quiet: str,
    folder: str = "",
    kill_at: int | None = None,
    counted: Any = None,
) -> None:
    from saescope.__main__ import main

    if counted is not None:
        _count_changes(folder, kill_at, counted)
    with Path(quiet).open("w") as sink:
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)
    sys.exit(main(arguments))


def _index(config: Any, log: str, number: int, size: int, waits_for: int, dies_at: int) -> None:
    from sae.commands.index import index
    from sae.indexing.encoding import Encoder

    with Path(log).open("w") as sink:
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)
    encode, calls = Encoder._encode, []

    def encoded(self: Any, piece: Any) -> Any:
        calls.append(piece)
        if len(calls) == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        until = time.monotonic() + 60
        while len(list(self.pending.folder.glob("activations-*"))) < waits_for:
            assert time.monotonic() < until
            time.sleep(0.01)
        return encode(self, piece)

    Encoder._encode = encoded  # type: ignore[method-assign]
    os.environ |= {"RANK": str(number), "WORLD_SIZE": str(size), "SOURCE_DATE_EPOCH": "0"}
    index(config)
    print(f"pieces: {len(calls)}")  # noqa: T201


def index_rank(
    config: Any, log: Path, number: int, size: int, *, waits_for: int = 0, dies_at: int = 0
) -> ForkServerProcess:
    """An index as one of several ranks, in its own process.

    Args:
        waits_for: it encodes its first piece when so many are committed.
        dies_at: it kills itself in its n-th piece.
    """
    arguments = (config, str(log), number, size, waits_for, dies_at)
    process = _CONTEXT.Process(target=_index, args=arguments)
    process.start()
    return process


class Child:
    """A harvest, or an append, in its own process.

    It stops itself before its `kill_at`-th change of the disk.
    """

    def __init__(
        self,
        config: HarvestConfig,
        folder: Path,
        kill_at: int | None = None,
        work: str = "harvest",
        role: Role = Role(),
    ) -> None:
        self.log = folder / ("child.log" if role.size == 1 else f"child-{role.number}.log")
        self._counted, self._windows = _CONTEXT.Value("i", 0), _CONTEXT.Value("i", 0)
        self._go = _CONTEXT.Event()
        self.process: ForkServerProcess = _CONTEXT.Process(
            target=_harvest,
            args=(
                *(replace(config), str(self.log), kill_at, self._counted, work),
                *(role, self._windows, self._go),
            ),
        )
        self.process.start()

    @property
    def changes(self) -> int:
        """Changes of the disk so far."""
        return int(self._counted.value)

    @property
    def windows(self) -> int:
        """Windows that it has begun to compute."""
        return int(self._windows.value)

    def go_on(self) -> None:
        """Let it, if its role is to wait, go on."""
        self._go.set()

    def end(self) -> int:
        """Wait for its end; the exit code, negative for the signal that killed it."""
        self.process.join(120)
        code = self.process.exitcode
        assert code is not None, "hangs"
        return code

    def kill_after(self, seconds: float) -> int:
        """Kill it after so long, if it still runs."""
        time.sleep(seconds)
        self.process.kill()
        return self.end()


def command(arguments: list[str], log: Path) -> ForkServerProcess:
    """The command line in its own process."""
    process = _CONTEXT.Process(target=_command, args=(arguments, str(log)))
    process.start()
    return process


def killed_command(
    arguments: list[str], folder: Path, kill_at: int | None = None
) -> tuple[int, int]:
    """A command that is killed before its `kill_at`-th change of the disk below a folder.

    Its exit code, and how many changes it made; what it said is in `said.log` beside the folder.
    """
    counted, log = _CONTEXT.Value("i", 0), folder.with_name("said.log")
    process = _CONTEXT.Process(
        target=_command, args=(arguments, str(log), str(folder), kill_at, counted)
    )
    process.start()
    process.join(300)
    assert process.exitcode is not None, "hangs"
    return process.exitcode, int(counted.value)

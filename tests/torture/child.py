"""Harvests in processes of their own, which are killed."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from dataclasses import replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from activations import HarvestConfig

_CONTEXT = multiprocessing.get_context("forkserver")
# imported once, so that a process starts in an instant: the imports take seconds
_CONTEXT.set_forkserver_preload(
    ["tests.torture.child", "activations.harvest", "activations.models", "transformer_lens"]
)
CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree")


def _changes_disk(event: str, arguments: tuple[Any, ...], folder: str) -> bool:
    """Whether an audited event writes below a folder."""
    if event == "open":
        path, mode, flags = arguments
        writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR)
        return bool(writes) and str(path).startswith(folder) and mode != "r"
    return event in CHANGES and any(str(x).startswith(folder) for x in arguments[:2])


def _harvest(
    config: HarvestConfig, quiet: str, kill_at: int | None, counted: Any, work: str
) -> None:
    import activations

    with Path(quiet).open("w") as sink:
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)
    folder, lock = str(Path(config.out).parent), threading.Lock()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if _changes_disk(event, arguments, folder):
            with lock:
                counted.value += 1
                if counted.value == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    getattr(activations, work)(config)


def _command(arguments: list[str], quiet: str) -> None:
    from saescope.__main__ import main

    with Path(quiet).open("w") as sink:
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)
    sys.exit(main(arguments))


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
    ) -> None:
        self.log = folder / "child.log"
        self._counted = _CONTEXT.Value("i", 0)
        self.process: ForkServerProcess = _CONTEXT.Process(
            target=_harvest, args=(replace(config), str(self.log), kill_at, self._counted, work)
        )
        self.process.start()

    @property
    def changes(self) -> int:
        """Changes of the disk so far."""
        return int(self._counted.value)

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

"""The command line: `saescope COMMAND [CONFIG.toml] [--field value ...]`.

A command's module is imported when it is called, so that help is instant.
"""

import importlib
import io
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from types import ModuleType
from typing import NoReturn

from saescope import config, memory, plugins, progress
from saescope.commands import COMMANDS
from saescope.errors import InputError, SaescopeError
from saescope.process_rank import this_rank
from saescope.standins import stand_ins
from saescope.system import system_errors
from saescope.terminal import complain, mute


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [
        "usage: saescope COMMAND [CONFIG.toml] [--field value ...]",
        "",
        "Take neural networks apart with sparse autoencoders.",
        "",
        "commands:",
        *(f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()),
        "",
        "saescope COMMAND --help shows every field of a command, with examples.",
    ]
    return "\n".join(lines)


_received: list[int] = []
"""signals that asked the command to end; kept, as a library may turn KeyboardInterrupt into another
error"""


def _interrupt(signum: int, _: object) -> None:
    """Handle SIGINT and SIGTERM alike: as KeyboardInterrupt, so that all is cleaned up."""
    _received.append(signum)
    if not _importing or len(_received) > 1:
        raise KeyboardInterrupt


_importing: list[bool] = []


@contextmanager
def _signals_wait() -> Iterator[None]:
    """Let a signal wait until the imports of this block are done, unless it comes twice.

    Some libraries are left broken by an exception in the middle of their import.
    """
    _importing.append(True)
    try:
        yield
    finally:
        _importing.clear()
    if _received:
        raise KeyboardInterrupt


def _watch_signals() -> None:
    _received.clear()
    signal.signal(signal.SIGTERM, _interrupt)
    # a process in the background of a shell ignores SIGINT, and goes on doing so
    if signal.getsignal(signal.SIGINT) in (signal.default_int_handler, _interrupt):
        signal.signal(signal.SIGINT, _interrupt)


@contextmanager
def _only_first_rank_prints() -> Iterator[None]:
    """Where torchrun or srun runs several processes, let only rank 0 print.

    For work that all ranks do alike. A rank that raises an error exits with code 2.
    """
    if this_rank().number == 0:
        yield
        return
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    except SaescopeError:
        raise SystemExit(2) from None


def _parse(module: ModuleType, name: str, words: Sequence[str]) -> config.Config:
    """The configuration of a command, from its module and the words after its name."""
    command = COMMANDS[name]
    with _only_first_rank_prints():
        return config.parse(
            getattr(module, command.config),
            words,
            program=f"saescope {name}",
            description="\n".join(command.help_lines()),
            positional=command.positional,
        )


def _show_help(name: str, words: Sequence[str]) -> None:
    """Print a command's help and exit, without the seconds that torch takes to import.

    Returns where that cannot be done: an architecture of somebody's own may need more of torch
    than a stand-in has.
    """
    with stand_ins():
        try:
            _parse(importlib.import_module(COMMANDS[name].module), name, words)
        except SaescopeError:
            raise
        except Exception:
            return


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code.

    0 done, 2 wrong input or a failure of the system, 130 interrupted (SIGINT), 143 terminated
    (SIGTERM), 141 where nobody reads the output any more (SIGPIPE); doctor's 1: damage.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    with suppress(AttributeError):  # not one of the system's
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        try:
            with system_errors():
                return _run(words)
        finally:
            with system_errors("standard output"):
                sys.stdout.flush()
    except BrokenPipeError:
        mute(sys.stdout)
        return 128 + signal.SIGPIPE
    except SaescopeError as error:
        code = config.fail(error)
        try:
            sys.stdout.flush()
        except OSError:
            mute(sys.stdout)
        return code


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        progress.say(_overview(), lines=True)
        return 0
    if words[0] == "--version":
        from saescope import __version__

        progress.say(f"saescope {__version__}")
        return 0
    with plugins.taken_from(words) as rest:
        if not rest or rest[0] not in COMMANDS:
            complain(f"no such command: {' '.join(rest[:1])} (commands: {', '.join(COMMANDS)})")
            return 2
        if len(rest) < len(words) and not COMMANDS[rest[0]].loads_saes:
            raise InputError(
                "loads no SAEs, so it has no use for an architecture",
                where=f"saescope {rest[0]}",
                given=plugins.OPTION,
                allowed=[name for name, command in COMMANDS.items() if command.loads_saes],
            )
        return _run_command(rest[0], rest[1:])


def _run_command(name: str, words: list[str]) -> int:
    command = COMMANDS[name]
    try:
        _watch_signals()
        memory.keep_freed_memory()
        plugged = command.loads_saes and bool(plugins.plugins())
        if config.asks_for_help(words) and not plugged and "torch" not in sys.modules:
            _show_help(name, words)
        with _signals_wait():
            if plugged:  # before anything is done: one that cannot be used is wrong input
                with _only_first_rank_prints():
                    importlib.import_module("sae.architectures").list_architectures()
            module = importlib.import_module(command.module)
            chosen = _parse(module, name, words)
        result = getattr(module, command.function)(chosen)
    except SystemExit:
        raise  # another of several processes says what there is to say
    except BaseException as error:
        if not _received and not isinstance(error, KeyboardInterrupt):
            raise
        terminated = _received[:1] == [signal.SIGTERM]
        hint = "; run the same command again to go on" if command.resumes else ""
        word = "terminated" if terminated else "interrupted"
        sys.stderr.write("\n")
        complain(f"{word}{hint}")
        return 128 + (signal.SIGTERM if terminated else signal.SIGINT)
    return result if command.gives_exit_code else 0


def entry() -> NoReturn:
    """`main` as a process; a signal that comes once all is done changes no exit code."""
    code = main()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    # Python remembers a KeyboardInterrupt that came out of code it ran for C, and would die of
    # SIGINT at its end though it was handled; each exec begins with that forgotten
    exec("")
    sys.exit(code)


if __name__ == "__main__":
    entry()

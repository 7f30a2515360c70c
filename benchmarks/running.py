"""What benchmarks have in common: their command line, a peer's process."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from benchmarks.peers.environments import Peer, python_of
from benchmarks.peers.stepping import ENVIRONMENT
from saescope.config import Config, fail, parse
from saescope.errors import ArtefactError, SaescopeError
from saescope.progress import say

ConfigT = TypeVar("ConfigT", bound=Config)


def run(
    config: type[ConfigT], work: Callable[[ConfigT], int | None], *, positional: str | None = None
) -> NoReturn:
    """Do the work of the module that was started, as its command line says, and end the process.

    The exit code is what `work` returns, 0 for None; 2 after an error of ours, 130 after Ctrl-C.
    """
    module = sys.modules["__main__"]
    spec = module.__spec__
    try:
        code = work(
            parse(
                config, sys.argv[1:], program=f"python -m {spec.name if spec else module.__name__}",
                description=module.__doc__ or "", positional=positional,
            )
        )  # fmt: skip
    except SaescopeError as error:
        sys.exit(fail(error))
    except KeyboardInterrupt:
        say("interrupted; run the same command again to go on")
        sys.exit(130)
    sys.exit(code or 0)


def run_peer(
    peer: Peer, script: Path, settings: Mapping[str, Any], work: Path, folder: Path
) -> dict[str, Any]:
    """What a script finds in a peer's environment, given a file of settings in `folder`.

    The settings say `threads`; where the results go is added to them. Raises ArtefactError if the
    environment cannot be made, or the script fails.
    """
    python = python_of(peer, work)
    given, results = folder / f"{script.stem}-settings.json", folder / f"{script.stem}.json"
    given.write_text(json.dumps({**settings, "results": str(results)}), encoding="utf-8")
    # nothing of ours on a peer's path
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment = {**inherited, **ENVIRONMENT, "OMP_NUM_THREADS": str(settings["threads"])}
    done = subprocess.run(
        [str(python.absolute()), str(script), str(given)], capture_output=True, text=True,
        env=environment,
    )  # fmt: skip
    if done.returncode:
        raise ArtefactError(
            f"failed: {done.stderr.strip()[-600:]}", where=f"{peer.name}, {script.name}"
        )
    return json.loads(results.read_text(encoding="utf-8"))

"""The command line of a benchmark: its configuration from the words, errors as one line."""

import sys
from collections.abc import Callable
from typing import NoReturn, TypeVar

from saescope.config import Config, fail, parse
from saescope.errors import SaescopeError
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

"""`saescope explore`: run the explorer on this machine only, until Ctrl-C."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from saescope.config import Config
from saescope.errors import InputError, check_range
from saescope.progress import say

HOST = "localhost"
_PRIMARY_COLOURS = {"light": "#c2601a", "dark": "#e8873a"}


@dataclass(frozen=True, kw_only=True)
class ExploreConfig(Config):
    """Open the feature explorer."""

    store: str = "stores"
    """A store's file or folder, or a folder of stores."""
    port: int = 8501
    """Port on this machine; the explorer cannot be reached from others."""
    open_browser: bool = False
    """Also open the page in the default browser."""

    def __post_init__(self) -> None:
        check_range("port", self.port, low=1, high=65535)


def url(config: ExploreConfig) -> str:
    """The explorer's address.

    >>> url(ExploreConfig(port=8600))
    'http://localhost:8600'
    """
    return f"http://{HOST}:{config.port}"


def command(config: ExploreConfig) -> list[str]:
    """The words that run Streamlit; they win over a reader's own Streamlit settings."""
    options = {
        "server.address": HOST,
        "server.port": config.port,
        "server.headless": not config.open_browser,
        "server.fileWatcherType": "none",
        "server.runOnSave": False,
        "browser.gatherUsageStats": False,
        "browser.serverAddress": HOST,
        "client.toolbarMode": "minimal",
        "client.showErrorDetails": "none",
        **{f"theme.{name}.primaryColor": value for name, value in _PRIMARY_COLOURS.items()},
    }
    words = [
        f"--{name}={str(value).lower() if isinstance(value, bool) else value}"
        for name, value in options.items()
    ]
    app = Path(__file__).parent / "app.py"
    return [sys.executable, "-m", "streamlit", "run", str(app), *words]


@contextmanager
def serving(config: ExploreConfig) -> Iterator[subprocess.Popen[bytes]]:
    """The explorer's process, which is ended with the context.

    Raises ArtefactError if there is no store, or one cannot be read; InputError if the port is
    taken.
    """
    from dashboards.places import PLACE_VARIABLE, find_stores
    from store import FeatureStore

    stores = find_stores(config.store)
    for path in stores.values():
        FeatureStore.open(path).close()
    _check_port(config.port)
    environment = dict(os.environ)
    environment[PLACE_VARIABLE] = str(Path(config.store).expanduser().resolve())
    # the packages of this very tree, wherever the command is called
    root = str(Path(__file__).resolve().parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
    say(f"explorer: {url(config)}  ({', '.join(stores)}; Ctrl-C ends it)")
    process = subprocess.Popen(command(config), env=environment, stdout=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def wait(process: subprocess.Popen[bytes]) -> None:
    """Until Ctrl-C. Raises InputError if the explorer ends before."""
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        say("explorer: ended")
        return
    if code:
        raise InputError(f"the explorer ended by itself with code {code}", where="streamlit")


def explore(config: ExploreConfig) -> None:
    """Serve the explorer in the foreground until Ctrl-C. Raises what `serving` and `wait` do."""
    with serving(config) as process:
        wait(process)


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        # as Streamlit does: a port that was left a moment ago is free
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise InputError(
                "is taken by another program; give another --port", where="port", given=port
            ) from None

"""`saescope explore`: run the explorer on this machine only, until Ctrl-C."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from saescope.config import Config
from saescope.errors import ArtefactError, InputError, check_range
from saescope.paths import AnyPath
from saescope.progress import say

HOST = "localhost"
_SERVER = Path(__file__).parent / "server.py"
_PRIMARY_COLOURS = {"light": "#c2601a", "dark": "#e8873a"}


@dataclass(frozen=True, kw_only=True)
class ExploreConfig(Config):
    """Open the feature explorer."""

    store: str = "stores"
    """A store's file or folder, or a folder of stores."""
    port: int = 8501
    """Port on this machine; the explorer cannot be reached from others."""
    model: tuple[str, ...] = ()
    """Models that typed texts may be run through (folders, or names in a hub), besides packaged
    ones and those beside the stores. A store's model must have the weights it was made with."""
    sae: tuple[str, ...] = ()
    """SAEs that may be loaded for typed texts, besides those beside the stores."""
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
    """The command that runs Streamlit, with options that override all of its other settings.

    Everything that decides who can reach the explorer is set here, so that no settings file and no
    environment variable can open it to others.
    """
    options = {
        "server.address": HOST,
        "server.port": config.port,
        "server.headless": not config.open_browser,
        "server.fileWatcherType": "none",
        "server.runOnSave": False,
        "server.enableCORS": True,
        "server.enableXsrfProtection": True,
        "server.xsrfCookieSameSite": "strict",
        "server.corsAllowedOrigins": url(config),
        "server.enableStaticServing": False,
        "server.enableAgentApi": False,
        "server.baseUrlPath": "",
        "runner.magicEnabled": False,
        # every message is sent whole: a page that was left before it was drawn may lack the one
        # that it would be told to take again, and then stops with an error
        "global.minCachedMessageSize": 1e12,
        # a link fills fields that have a value of their own
        "global.disableWidgetStateDuplicationWarning": True,
        "logger.level": "warning",
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
    # other names of this machine are refused, so that no page of others can pass for this one
    words += [f"--server.allowedHosts={host}" for host in (HOST, "127.0.0.1")]
    return [sys.executable, "-m", "streamlit", "run", str(_SERVER), *words]


@contextmanager
def serving(config: ExploreConfig) -> Iterator[subprocess.Popen[bytes]]:
    """The explorer's process, which is ended at the end of the block.

    Raises ArtefactError if there is no store, or none can be read; InputError if the port is taken.
    """
    from dashboards.find_stores import environment, find_stores

    stores = find_stores(config.store)
    _check_some_open(stores)
    _check_port(config.port)
    # Streamlit reads no settings of the folder the command is called in, nor from variables
    ours = {name: value for name, value in os.environ.items() if not name.startswith("STREAMLIT_")}
    ours |= environment(config.store, model=config.model, sae=config.sae)
    # the packages of this very tree, wherever the command is called
    path = [str(_SERVER.resolve().parent.parent), *ours.get("PYTHONPATH", "").split(os.pathsep)]
    ours["PYTHONPATH"] = os.pathsep.join(str(Path(entry).resolve()) for entry in path if entry)
    say(f"explorer: {url(config)}  ({', '.join(stores)}; Ctrl-C ends it)")
    process = subprocess.Popen(
        command(config), env=ours, cwd=_SERVER.parent, stdout=subprocess.DEVNULL
    )
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def _check_some_open(stores: Mapping[str, AnyPath]) -> None:
    """Say which stores cannot be read, and why; raise the first one's error if none can."""
    from store import FeatureStore

    errors = []
    for path in stores.values():
        try:
            FeatureStore.open(path).close()
        except ArtefactError as error:
            errors.append(error)
    if len(errors) == len(stores):
        raise errors[0]
    for error in errors:
        say(f"left out: {error}")


@contextmanager
def until_ctrl_c() -> Iterator[None]:
    """Within the block, Ctrl-C is the proper way to end: it is no error."""
    try:
        yield
    except KeyboardInterrupt:
        say("explorer: ended")


def wait(process: subprocess.Popen[bytes]) -> None:
    """Wait until the explorer ends. Raises InputError if it ends by itself with an error."""
    if code := process.wait():
        raise InputError(f"the explorer ended by itself with code {code}", where="streamlit")


def explore(config: ExploreConfig) -> None:
    """Serve the explorer in the foreground until Ctrl-C. Raises what `serving` and `wait` do."""
    with until_ctrl_c(), serving(config) as process:
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

"""`saescope explore` in a process of its own, as a person starts it."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from saescope.paths import AnyPath

ROOT = Path(__file__).parents[1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def serving(
    stores: AnyPath,
    log: Path,
    *,
    words: Sequence[str] = (),
    cwd: Path = ROOT,
    variables: Mapping[str, str] | None = None,
) -> Iterator[str]:
    """The explorer's address; it is ended by Ctrl-C, and must end well."""
    port = free_port()
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "saescope", "explore", str(stores), "--port", str(port), *words],
            stdout=stream,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": str(ROOT), **(variables or {})},
            start_new_session=True,
            # Ctrl-C must reach it even where the tests themselves run in a background job
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    address = f"http://localhost:{port}"
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                with urllib.request.urlopen(f"{address}/_stcore/health", timeout=5) as answer:
                    if answer.status == 200:
                        break
            except OSError:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
        assert address in log.read_text()
        yield address
    finally:
        os.killpg(process.pid, signal.SIGINT)
        code = process.wait(timeout=30)
    assert code == 0, log.read_text()
    assert "explorer: ended" in log.read_text()
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0, "the server is gone"

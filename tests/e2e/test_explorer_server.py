"""Who reaches the explorer: its own pages on this machine, whatever settings lie about."""

import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.explorer_process import serving
from tests.tiny_store import make_tiny_store

STRAY = """
[server]
enableCORS = false
enableXsrfProtection = false
enableStaticServing = true
enableAgentApi = true
address = "0.0.0.0"
corsAllowedOrigins = ["http://elsewhere.example"]
allowedHosts = ["*"]
baseUrlPath = "below"
[client]
toolbarMode = "developer"
[theme]
font = "Elsewhere:https://fonts.elsewhere.example/css"
"""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("stray")
    stores = make_tiny_store(folder / "stores").parent.parent
    (folder / ".streamlit").mkdir()
    (folder / ".streamlit" / "config.toml").write_text(STRAY)
    variables = {
        "STREAMLIT_SERVER_ENABLE_CORS": "false",
        "STREAMLIT_SERVER_ENABLE_XSRF_PROTECTION": "false",
        "STREAMLIT_SERVER_ADDRESS": "0.0.0.0",
        "STREAMLIT_SERVER_CORS_ALLOWED_ORIGINS": "http://elsewhere.example",
        "STREAMLIT_SERVER_ENABLE_AGENT_API": "true",
    }
    with serving(stores, folder / "log.txt", cwd=folder, variables=variables) as served:
        yield served


def answer(address: str, path: str, **headers: str) -> tuple[int, str]:
    """Status and head of the answer to a request."""
    port = urlsplit(address).port
    lines = [f"GET {path} HTTP/1.1", *(f"{n.replace('_', '-')}: {v}" for n, v in headers.items())]
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        head = connection.recv(4096).decode("latin-1")
    return int(head.split()[1]), head.split("\r\n\r\n")[0]


def upgrade(address: str, *, origin: str | None, host: str) -> int:
    """The status of opening the connection by which a page is driven; 101 opens it."""
    more = {} if origin is None else {"Origin": origin}
    return answer(
        address, "/_stcore/stream", Host=host, Upgrade="websocket", Connection="Upgrade",
        Sec_WebSocket_Key="dGhlIHNhbXBsZSBub25jZQ==", Sec_WebSocket_Version="13", **more,
    )[0]  # fmt: skip


def test_pages_of_others_cannot_drive_it(address: str) -> None:
    own = urlsplit(address).netloc
    assert upgrade(address, origin=address, host=own) == 101
    for origin in ("http://elsewhere.example", "http://localhost.elsewhere.example", "null"):
        assert upgrade(address, origin=origin, host=own) == 403, origin


def test_other_names_of_this_machine_are_refused(address: str) -> None:
    port = urlsplit(address).port
    name = f"elsewhere.example:{port}"
    assert upgrade(address, origin=f"http://{name}", host=name) in (400, 403)


def test_answers_are_for_its_own_pages(address: str) -> None:
    own = urlsplit(address).netloc
    status, head = answer(
        address, "/_stcore/health", Host=own, Origin="http://elsewhere.example", Connection="close"
    )
    assert status == 200, "baseUrlPath of the stray settings is not followed"
    assert "access-control-allow-origin: *" not in head.lower()
    assert "elsewhere" not in head


def test_it_listens_on_this_machine_only(address: str) -> None:
    port = urlsplit(address).port
    listening = {
        line.split()[1]
        for file in ("/proc/net/tcp", "/proc/net/tcp6")
        if Path(file).exists()
        for line in Path(file).read_text().splitlines()[1:]
        if line.split()[3] == "0A" and int(line.split()[1].rsplit(":", 1)[1], 16) == port
    }
    if not listening:
        pytest.skip("no table of connections here")
    assert listening <= {f"0100007F:{port:04X}", f"{'0' * 24}01000000:{port:04X}"}

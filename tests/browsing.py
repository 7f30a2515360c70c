"""Driving the explorer in headless Chromium: what tests, pictures and timings of it share."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

CHROMIUM = "/usr/bin/chromium"
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
READY = "[data-testid=stMainBlockContainer] h2"
BUSY = "[data-testid=stStatusWidget], [data-testid=stSpinner], [data-stale=true]"
_IDLE = "[data-test-script-state=notRunning]"
"""on the page while no script of its runs; the sign of work in its corner comes later than work"""
_OWN = ("localhost", "127.0.0.1")
_WITHOUT_HOST = ("data", "blob", "about")
_GUESSES = ("/_stcore/health", "/_stcore/host-config")
"""which Streamlit's pages first look for below their own address"""


def has_chromium() -> bool:
    """Whether there is a browser to drive."""
    return Path(CHROMIUM).exists()


@contextmanager
def chromium() -> Iterator[Any]:
    """A headless browser, and Playwright, which is imported here."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


def watched(context: Any) -> list[str]:
    """What goes wrong on the pages of a browser's context from now on.

    That is an error in the console, one of a script, an answer that says no, and a request that
    leaves this machine.
    """
    faults: list[str] = []

    def requested(request: Any) -> None:
        address = urlsplit(request.url)
        if address.scheme not in _WITHOUT_HOST and address.hostname not in _OWN:
            faults.append(f"asks another machine for {request.url}")

    def answered(response: Any) -> None:
        if response.status >= 400 and not response.url.endswith(_GUESSES):
            faults.append(f"{response.status} for {response.url}")

    def said(message: Any) -> None:
        if message.type == "error" and not message.location["url"].endswith(_GUESSES):
            faults.append(f"console: {message.text}")

    context.on("request", requested)
    context.on("response", answered)
    context.on("console", said)
    context.on("weberror", lambda error: faults.append(f"script: {error.error}"))
    return faults


def visit(page: Any, address: str) -> None:
    """Open an address, and wait until its page is drawn."""
    page.goto(address)
    page.wait_for_selector(READY)
    settle(page)


def settle(page: Any) -> None:
    """Wait until the page is drawn anew after something was done."""
    page.wait_for_timeout(250)
    page.wait_for_function(f"!!document.querySelector({_IDLE!r})")
    page.wait_for_timeout(250)


def heading(page: Any, text: str) -> None:
    """Wait until the page's heading begins with a text."""
    page.wait_for_function(f"document.querySelector('{READY}')?.innerText.startsWith({text!r})")
    settle(page)


def under_pointer(element: Any, read: str) -> Any:
    """What a function of the page's script says of an element while the pointer is on it.

    A page that still loads moves its elements from under the pointer: it goes there again, for as
    long as an element is waited for.
    """
    for _ in range(100):
        element.hover()
        found = element.evaluate(f"e => e.matches(':hover') ? [({read})(e)] : []")
        if found:
            return found[0]
        element.page.wait_for_timeout(100)
    raise AssertionError(f"{element} does not keep still under the pointer")


def complaints(page: Any) -> list[str]:
    """What the page says went wrong: its errors, and tracebacks."""
    found = page.locator("[data-testid=stAlertContentError], [data-testid=stException]")
    return found.all_inner_texts()

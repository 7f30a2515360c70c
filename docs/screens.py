"""Pictures of the explorer's pages: `python docs/screens.py PROJECT [PAGE ...]`, or `make screens`.

PROJECT is the folder in which `saescope demo --quick` was run; Heads shows an SAE at attention's
outputs there (its store smollm2-135m-z18, as docs/reports/attention.md makes it), and Circuits the
first graph in graphs/. Each page, or each that is named by its address, is photographed as WebP at
three widths, light and dark, into docs/screens/. Needs Chromium, playwright and Pillow.
"""

import io
import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from saescope.progress import say  # noqa: E402
from tests.browsing import chromium, complaints, settle, visit, watched  # noqa: E402
from tests.explorer_process import serving  # noqa: E402

SCREENS = ROOT / "docs" / "screens"
WIDTHS = {1280: 900, 1920: 1080, 400: 860}
SCHEMES = ("light", "dark")
PROMPT = "The old harbour lay quiet under the snow until the first ferry of the year came in."
WORK: dict[str, dict[str, str]] = {
    "token": {"q": "church"},
    "diff": {"a": "split:train", "b": "split:held_out"},
    "text": {"text": PROMPT},
    "circuits": {"keep": "60", "edges": "90"},
    "heads": {"head": "6"},
    "sql": {"q": "SELECT feature, density, max FROM feature ORDER BY density DESC LIMIT 20"},
}
"""what a page is asked to do; the others show what they show when they are opened"""
OF_HEADS = "smollm2-135m-z18"
"""the store of an SAE at attention's outputs"""
_QUALITY, _BUSY = 55, "[data-testid=stSpinner], [data-testid=stStatusWidget]"
_PATIENCE_MS = 180_000


def photograph(page: Any, path: Path) -> None:
    """Write what the window shows as a small picture."""
    from PIL import Image

    picture = Image.open(io.BytesIO(page.screenshot()))
    picture.convert("RGB").save(path, "WEBP", quality=_QUALITY, method=6)


def main(project: Path, wanted: Sequence[str]) -> int:
    """Take the pictures, of some pages or all; the number of faults that were seen meanwhile."""
    logging.disable(logging.WARNING)
    from dashboards.pages import find_pages

    every = [found.declared.url for found in find_pages()]
    if unknown := set(wanted) - set(every):
        say(f"no page has the address {', '.join(sorted(unknown))}: there are {', '.join(every)}")
        return len(unknown)
    urls = [url for url in every if not wanted or url in wanted]
    if (project / "stores" / OF_HEADS).is_dir():
        WORK["heads"]["sae"] = OF_HEADS
    SCREENS.mkdir(exist_ok=True)
    for old in SCREENS.glob("*.webp"):
        if old.name.split("_")[0] in urls or not wanted:
            old.unlink()
    seen: list[str] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(project / "stores", Path(folder) / "log.txt", cwd=project) as address,
        chromium() as browser,
    ):
        for scheme in SCHEMES:
            context = browser.new_context(color_scheme=scheme)
            faults = watched(context)
            page = context.new_page()
            page.set_default_timeout(_PATIENCE_MS)
            for url in urls:
                page.set_viewport_size({"width": 1280, "height": 900})
                visit(page, f"{address}/{url}?{urlencode(WORK.get(url, {}))}")
                page.wait_for_timeout(800)
                page.wait_for_function(f"!document.querySelector('{_BUSY}')")
                if url == "text":  # its picture comes last
                    page.locator(".strip .token").first.wait_for()
                for width, height in WIDTHS.items():
                    page.set_viewport_size({"width": width, "height": height})
                    page.wait_for_timeout(300)
                    settle(page)
                    photograph(page, SCREENS / f"{url}_{width}_{scheme}.webp")
                seen += [f"{url}: {said}" for said in complaints(page)]
            seen += faults
            context.close()
    for each in seen:
        say(each)
    return len(seen)


if __name__ == "__main__":
    sys.exit(bool(main(Path(sys.argv[1]).resolve(), sys.argv[2:])))

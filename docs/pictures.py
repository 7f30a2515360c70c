"""Take the tutorial's pictures of the explorer: `python docs/pictures.py PROJECT`.

PROJECT is the folder in which `saescope demo --quick` was run. It needs Chromium and playwright.
A label is written into the project's annotations.
"""

import sys
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from tests.explorer_process import serving  # noqa: E402

IMAGES = ROOT / "docs" / "images"
FEATURE, LABEL = 1924, "the Church: Christian churches, their people"
READY = "[data-testid=stMainBlockContainer] h2"
CHROMIUM = "/usr/bin/chromium"


def settle(page: Any) -> None:
    page.wait_for_selector(READY)
    page.wait_for_timeout(3000)
    page.wait_for_function("!document.querySelector('[data-testid=stStatusWidget]')")
    page.wait_for_timeout(1000)


def clip(height: int) -> Any:
    return {"x": 0, "y": 0, "width": 1100, "height": height}


def main(project: Path) -> None:
    with (
        serving(project / "stores", Path("/tmp/explorer.log"), cwd=project) as address,
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 760})
        page.set_default_timeout(120_000)
        page.goto(address)
        settle(page)
        page.screenshot(path=IMAGES / "tutorial_overview.png", clip=clip(620))
        page.goto(f"{address}/feature?feature={FEATURE}")
        settle(page)
        page.get_by_label("Label", exact=True).fill(LABEL)
        page.keyboard.press("Enter")
        settle(page)
        page.screenshot(path=IMAGES / "tutorial_feature.png")
        page.get_by_text("Features", exact=True).first.click()
        settle(page)
        page.get_by_role("searchbox", name="Search").fill("church")
        page.keyboard.press("Enter")
        settle(page)
        page.screenshot(path=IMAGES / "tutorial_features.png", clip=clip(560))
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())

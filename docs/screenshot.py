"""Pictures of a report's first screen for the README, light and dark: `python docs/screenshot.py REPORT.html`.

Needs Chromium and Playwright, as the browser tests do.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

IMAGES = Path(__file__).parent / "images"
WIDTH, HEIGHT = 1200, 1190


def main() -> None:
    """Write docs/images/report-light.png and report-dark.png."""
    page_address = Path(sys.argv[1]).resolve().as_uri()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme=scheme)
            page.goto(page_address)
            page.wait_for_timeout(1500)
            page.screenshot(path=IMAGES / f"report-{scheme}.png")


if __name__ == "__main__":
    main()

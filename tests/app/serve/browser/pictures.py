"""The pictures of the documentation: `nox -s page -- pictures`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, sync_playwright

from tests.app.serve.browser.pen import PHONE, Pen
from tests.app.serve.browser.serving import serving

START = "ROMEO:\nIf I profane with my unworthiest hand\nThis holy shrine,"
DESK = {"viewport": {"width": 1000, "height": 600}}


def draw(browser: Browser, address: str, path: Path, shows: str, **options: Any) -> None:
    """One picture: of suggestions, or of the alternatives to a word."""
    pen = Pen(browser.new_page(**options), address)
    if pen.page.locator("#settings").is_visible() and shows == "alternatives":
        pen.page.get_by_role("button", name="Settings").click()
    pen.set("seed", "8")
    pen.put(START)
    pen.ask()
    if shows == "alternatives":
        pen.press("Enter")
        pen.point(pen.marks.nth(5))
        pen.offered()
    pen.page.wait_for_timeout(500)  # until nothing moves
    pen.page.screenshot(path=path)


def main(chromium: str, folder: str) -> None:
    """Draw all of them."""
    Path(folder).mkdir(exist_ok=True)
    with serving() as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        draw(browser, address, Path(folder, "page-light.png"), "suggestions", **DESK)
        draw(browser, address, Path(folder, "page-dark.png"), "alternatives", color_scheme="dark", **DESK)
        draw(browser, address, Path(folder, "page-phone.png"), "suggestions", **PHONE)
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])

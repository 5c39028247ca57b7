"""The made-up results folder, and Chromium for the tests that open the page."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright
from synthetic_results import write_bits_results, write_results

from subquad.records.store import Records, read_all
from subquad.report.page import write_report

OpenPage = Callable[..., Page]


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_results(tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="session")
def bits_results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bits_results(tmp_path_factory.mktemp("bits"))


@pytest.fixture(scope="session")
def records(results: Path) -> Records:
    return read_all(results)


@pytest.fixture(scope="session")
def report(results: Path) -> Path:
    return write_report(results)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    executable = shutil.which("chromium")
    if executable is None:
        pytest.fail("the browser tests need Chromium on the PATH; deselect them with -m 'not browser'")
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])


def _is_local(address: str) -> bool:
    return address.startswith(("file:", "data:", "blob:"))


@pytest.fixture
def open_page(browser: Browser) -> Iterator[OpenPage]:
    """Opens a page, waits until its figures are drawn, and fails at the end on any console error or request."""
    problems: list[str] = []
    pages: list[Page] = []

    def open_(path: Path, *, width: int = 1240, scheme: str = "light") -> Page:
        page = browser.new_page(
            viewport={"width": width, "height": 900}, color_scheme="dark" if scheme == "dark" else "light"
        )
        pages.append(page)
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda dialog: problems.append(f"dialog: {dialog.message}"))
        page.on("request", lambda request: None if _is_local(request.url) else problems.append(request.url))
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-drawn=yes]", timeout=60_000)
        return page

    yield open_
    for page in pages:
        page.close()
    assert problems == []

"""Headless Chromium for tests of pages, and a visit of a page that must go without errors."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
"""A browser of the system; without one the tests of pages are skipped."""

DESKTOP, PHONE = (1280, 900), (390, 844)
"""Width and height of screens, in CSS pixels."""

_FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
_WAIT = 120_000  # ms; machines that test may be busy


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    """Headless Chromium, or a skipped test."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=_FLAGS)
        try:
            yield opened
        finally:
            opened.close()


@contextlib.contextmanager
def visiting(
    opened: Any, url: str, screen: tuple[int, int] = DESKTOP, *, expected: str = "(?!)"
) -> Iterator[Any]:
    """The page at ``url`` in a context of its own (no cookies), closed afterwards.

    A request to anywhere else fails the test, and so does an error in a script or on the console that does
    not match ``expected``.
    """
    width, height = screen
    context = opened.new_context(viewport={"width": width, "height": height})
    page, strangers, errors = context.new_page(), [], []  # type: ignore[var-annotated]
    page.set_default_timeout(_WAIT)
    page.on("request", lambda request: strangers.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
    page.goto(url)
    try:
        yield page
    finally:
        context.close()
    assert [there for there in strangers if not there.startswith((url, "data:", "blob:"))] == []
    assert [error for error in errors if not re.search(expected, error)] == []


def outside(page: Any, *parts: str) -> list[str]:
    """Which of the selectors ``parts`` are not wholly within the screen's width; ``page``: it scrolls."""
    width = page.viewport_size["width"]
    boxes = {part: page.locator(part).first.bounding_box() for part in parts}
    found = [p for p, box in boxes.items() if not box or box["x"] < 0 or box["x"] + box["width"] > width]
    scrolls = page.evaluate("document.documentElement.scrollWidth") > width
    return [*found, *(["page"] if scrolls else [])]

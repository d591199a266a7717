"""The page of human preference in a real browser: a name, keys, corrections, a phone's width."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from sat.apps.evaluate.pictures import plain
from sat.apps.preference.server import Server
from sat.apps.preference.study import Study, pairs_of
from sat.apps.preference.votes import VoteFile, read
from tests.browser import PHONE, browser, outside, visiting

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (requirements-dev.txt)")
ABOUT = {"about": "the page"}
TEXTS = ["a red apple on a table", "two dogs <i>in</i> the rain"]


def drawing(path: Path, colour: str, index: int) -> None:
    path.parent.mkdir(parents=True)
    picture = Image.new("RGB", (300, 300), "white")
    ImageDraw.Draw(picture).ellipse((60, 60, 180 + 60 * index, 240), fill=colour)
    picture.save(path)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    for name, colour in (("A", "crimson"), ("B", "royalblue")):
        for index in range(2):
            drawing(tmp_path / name / f"{index}_x" / "000000000.png", colour, index)
    pairs, _ = pairs_of(tmp_path / "A", tmp_path / "B", plain(TEXTS))
    with (
        VoteFile(tmp_path / "votes.jsonl", ABOUT) as votes,
        Server(Study(pairs, ["alignment", "quality"], 0, votes), 0) as server,
    ):
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as made:
        yield made


@pytest.fixture
def page(server: Server, chromium: Any) -> Iterator[Any]:
    with visiting(chromium, server.address, expected="ERR_FAILED") as visited:  # of the vote that is lost
        yield visited


def press(page: Any, key: str) -> None:
    """Press ``key`` once both pictures are shown."""
    playwright.expect(page.locator("body[data-ready=yes]")).to_be_attached()
    page.keyboard.press(key)


def test_a_rater_votes_with_the_keyboard_and_corrects(page: Any, server: Server, tmp_path: Path) -> None:
    expect = playwright.expect
    page.fill("#name", "Ann")
    page.press("#name", "Enter")
    count = page.locator("#count")
    for done, key in enumerate(("ArrowLeft", "ArrowRight", "ArrowDown")):
        expect(count).to_have_text(f"{done} of 4, Ann")
        press(page, key)
    expect(count).to_have_text("3 of 4, Ann")
    expect(page.locator("body[data-ready=yes]")).to_be_attached()
    assert page.text_content("#text") in TEXTS  # the second one's tags are text
    page.screenshot(path=str(tmp_path / "desktop.png"))

    press(page, "Backspace")
    expect(page.locator("#tie")).to_have_class("chosen")
    press(page, "2")
    expect(page.locator("#tie")).not_to_have_class("chosen")
    expect(page.locator("body[data-ready=yes]")).to_be_attached()
    page.click("#left")
    expect(page.locator("#done")).to_be_visible()
    kept = read(tmp_path / "votes.jsonl", ABOUT)
    order = [(vote.pair, vote.question) for vote in kept]
    assert len(set(order)) == 4
    places = ["tie" if v.choice == "tie" else "left" if v.choice == v.left else "right" for v in kept]
    assert places == ["left", "right", "right", "left"]
    assert all(vote.rater == "Ann" and vote.seconds < 60 for vote in kept)


def test_a_phone_shows_both_pictures_and_a_lost_server_is_told(page: Any, server: Server, tmp_path) -> None:
    page.set_viewport_size(dict(zip(("width", "height"), PHONE, strict=True)))
    page.fill("#name", "Bob")
    page.click("#start button")
    playwright.expect(page.locator("#count")).to_have_text("0 of 4, Bob")
    boxes = [page.locator(f"#{side} img").bounding_box() for side in ("left", "right")]
    assert boxes[0]["y"] + boxes[0]["height"] <= boxes[1]["y"]
    assert all(box["width"] > 150 for box in boxes)
    assert outside(page, "#left img", "#right img", "#tie") == []
    playwright.expect(page.locator("body[data-ready=yes]")).to_be_attached()
    page.screenshot(path=str(tmp_path / "phone.png"))
    page.route("**/vote", lambda route: route.abort())
    page.click("#tie")
    playwright.expect(page.locator("#error")).to_contain_text("does not answer")

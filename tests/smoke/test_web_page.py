"""The page as a person uses it, in Chromium: ways to begin a picture, what is done with one, languages."""

from __future__ import annotations

import base64
import io
import zipfile
from collections.abc import Iterator
from os import environ
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.browser import DESKTOP, PHONE, browser, outside, visiting
from tests.configs import DEBUG
from tests.sampling import ROOT
from tests.web import Server, serving

pytest.importorskip("gradio", reason="the web page is an extra")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
AXE = next(
    filter(Path.is_file, (ROOT / "node_modules/axe-core/axe.min.js", Path(environ.get("AXE", "-")))), None
)
ENGLISH, CHINESE = ("Text", "Image", "Inpaint", "Control"), ("文生图", "图生图", "局部重绘", "控制")
TARGETS = """[...document.querySelectorAll("button, input, textarea, a, [role=tab], [role=option]")]
  .filter(one => one.checkVisibility({opacityProperty: true, visibilityProperty: true}))
  .map(one => [one.getBoundingClientRect(), one.outerHTML.slice(0, 120)])
  .filter(([box]) => box.width && box.height && (box.width < 24 || box.height < 24))
  .map(([box, text]) => `${Math.round(box.width)}x${Math.round(box.height)} ${text}`)"""


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    """The small Plus, 8 steps, with the control that ships."""
    with serving(
        tmp_path_factory.mktemp("page") / "out", "--base", "configs/tiny.yaml", "--grace", 3,
        "sampling.steps=8", "parallel.device=cpu",
    ) as running:  # fmt: skip
        yield running


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as made:
        yield made


def ready(page: Any) -> Any:
    page.wait_for_selector("#status[role=status]", state="attached")
    page.wait_for_selector(
        "#canvas .empty, #canvas a img, #canvas img.live"
    )  # what was there before is there
    return page


@pytest.fixture
def page(server, chromium) -> Iterator[Any]:
    with visiting(chromium, server.url) as visited:
        yield ready(visited)


def said(page: Any, text: str) -> str:
    page.wait_for_function("text => document.querySelector('#status').innerText.includes(text)", arg=text)
    return page.inner_text("#status")


def tab(page: Any, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()
    page.wait_for_function(
        "name => document.querySelector('[role=tab][aria-selected=true]').innerText.trim() === name", arg=name
    )


def draw(page: Any, prompt: str) -> None:
    """A picture of ``prompt``, shown large."""
    page.fill("#prompt textarea", prompt)
    page.click("#draw")
    page.wait_for_selector(f"#canvas a img[alt='{prompt}']")
    said(page, "Done: 1 picture.")


def facts(page: Any) -> dict[str, str]:
    """The settings of the picture that is shown large."""
    names = page.eval_on_selector_all("#facts dt", "all => all.map(one => one.innerText)")
    return dict(
        zip(
            names, page.eval_on_selector_all("#facts dd", "all => all.map(one => one.innerText)"), strict=True
        )
    )


def pick(page: Any, field: str, option: str) -> None:
    page.click(f"#{field} input")
    choices = page.get_attribute(f"#{field} input", "aria-controls")  # another list may still be closing
    page.locator(f"#{choices}").get_by_role("option", name=option, exact=True).click()


def file(server: Server, page: Any) -> Image.Image:
    with Image.open(server.out / facts(page)["file"]) as image:
        return image.convert("RGB")


# -- ways to begin a picture


def test_an_example_and_a_style_become_the_prompt(page) -> None:
    assert "128 objects" in page.inner_text("#about")
    page.click("#examples button >> text=sunflower")
    page.wait_for_function("document.querySelector('#prompt textarea').value === 'sunflower'")
    pick(page, "style", "flat")
    page.click("#draw")
    page.wait_for_selector("#canvas a img[alt='sunflower, flat style']")
    assert facts(page)["prompt"] == "sunflower, flat style"
    pick(page, "sampler", "Heun")
    page.click("#draw")
    page.wait_for_function("document.querySelector('#facts').innerText.includes('Heun')")
    pick(page, "sampler", "Euler a")
    page.click("#reuse")
    page.wait_for_function("document.querySelector('#sampler input').value === 'Heun'")


def test_a_picture_is_changed_and_compared_with_what_it_was(server, page) -> None:
    tab(page, "Image")
    page.fill("#prompt textarea", "red apple")
    page.click("#draw")
    said(page, "Give a picture to change first")
    draw_here = server.out / "bad.png"
    draw_here.write_bytes(b"no picture")
    page.set_input_files("#change input[type=file]", str(draw_here))
    page.wait_for_timeout(1000)
    page.click("#draw")
    said(page, "The picture cannot be read: not a picture in one of the formats")
    tab(page, "Text")
    draw(page, "pizza")
    before = file(server, page)
    page.click("#image")
    said(page, "The picture is set: Image.")
    page.fill("#strength input[type=number]", "0")
    page.fill("#prompt textarea", "watermelon")
    page.click("#draw")
    page.wait_for_selector("#canvas a img[alt='watermelon']")
    kept = file(server, page)
    apart = [abs(a - b) for a, b in zip(before.tobytes(), kept.tobytes(), strict=True)]
    assert sum(apart) / len(apart) < 10, "strength 0 is the autoencoder's round trip"
    page.click("#compare")
    assert "Left: the given picture" in said(page, "Left:")
    page.wait_for_function("document.querySelectorAll('#slider img').length === 2")


def test_a_painted_part_is_drawn_anew_and_the_rest_stays(server, page, tmp_path) -> None:
    page.fill("#prompt textarea", "castle")
    tab(page, "Inpaint")
    page.click("#draw")
    said(page, "Give a picture to paint on first")
    tab(page, "Text")
    draw(page, "pizza")
    before = file(server, page)
    page.click("#inpaint")
    said(page, "The picture is set: Inpaint.")
    page.wait_for_timeout(1500)  # the editor draws it
    page.click("#draw")
    said(page, "No mask is painted")
    for size, name in (((32, 64), "small.png"), ((64, 64), "half.png")):
        mask = Image.new("L", size, 0)
        mask.paste(255, (0, 0, 32, 64))
        mask.save(tmp_path / name)
    files = page.locator("[role=tabpanel] input[type=file]").last
    box = page.locator("#paint canvas").first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 10, y + 30, steps=4)
    page.mouse.up()
    page.fill("#prompt textarea", "castle")
    page.click("#draw")
    page.wait_for_selector("#canvas a img[alt='castle']")
    changed = file(server, page)
    corners = [(0, 0), (63, 0), (0, 63), (63, 63)]
    assert [before.getpixel(at) for at in corners] == [changed.getpixel(at) for at in corners]
    assert before.tobytes() != changed.tobytes()
    chooser = page.locator("#mask_file")
    assert files.count() and chooser.count()
    with page.expect_file_chooser() as chosen:
        chooser.click()
    chosen.value.set_files(str(tmp_path / "small.png"))
    said(page, "The mask is 32 x 64, the picture 64 x 64 (width x height): they must be alike")
    with page.expect_file_chooser() as chosen:
        chooser.click()
    chosen.value.set_files(str(tmp_path / "half.png"))
    page.wait_for_timeout(2500)
    page.fill("#prompt textarea", "lion")
    page.click("#draw")
    page.wait_for_selector("#canvas a img[alt='lion']")
    half = file(server, page)
    right = (40, 0, 64, 64)  # the mask is grown by a cell
    assert half.crop(right).tobytes() == before.crop(right).tobytes() and half.tobytes() != before.tobytes()


def test_a_control_shows_what_it_sees_and_steers(server, page) -> None:
    page.fill("#prompt textarea", "lion")
    tab(page, "Control")
    page.click("#draw")
    said(page, "Give a picture for the control first")
    page.set_input_files("#steer input[type=file]", str(ROOT / "data/emoji_sample/noto/lion.png"))
    page.wait_for_selector("#sees img")
    source = page.get_attribute("#sees img", "src")
    shown = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).convert("L")
    assert shown.size == (64, 64) and set(shown.tobytes()) == {0, 255}, "outlines"
    page.uncheck("#anew input")
    page.fill("#seed input", "3")
    page.click("#draw")
    page.wait_for_function("document.querySelector('#facts').innerText.includes('edges at 1')")
    steered = file(server, page)
    page.fill("#scale input[type=number]", "0")
    page.click("#draw")
    page.wait_for_function("document.querySelector('#facts').innerText.includes('edges at 0')")
    plain = file(server, page)
    tab(page, "Text")
    page.click("#draw")
    page.wait_for_function("!document.querySelector('#facts').innerText.includes('edges')")
    assert file(server, page).tobytes() == plain.tobytes() != steered.tobytes()


# -- what is done with pictures


def test_a_grid_is_a_sheet_and_its_pictures(server, page) -> None:
    page.click("#grid button >> nth=0")
    page.fill("#prompt textarea", "red apple")
    page.click("#grid_draw")
    said(page, "Choose a setting for the grid")
    pick(page, "right_name", "guidance")
    page.fill("#right_values textarea, #right_values input", "1,3")
    pick(page, "down_name", "seed")
    page.fill("#down_values textarea, #down_values input", "0..40")
    page.click("#grid_draw")
    said(page, "Grid: seed has 41 values, more than 36")
    page.fill("#down_values textarea, #down_values input", "0..1")
    page.click("#grid_draw")
    said(page, "Done: 5 pictures.")
    assert facts(page)["grid"] == "seed=0,1 guidance=1,3"
    page.wait_for_selector("#canvas img.sheet[alt='red apple: seed=0,1 guidance=1,3']")
    assert file(server, page).width > 2 * 64


def test_pictures_are_varied_loaded_down_copied_and_deleted(server, page) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.click("#vary")
    said(page, "Choose a picture first")
    draw(page, "penguin")
    page.click("#vary")
    said(page, "Done: 4 pictures.")
    assert len(page.query_selector_all("#canvas img[alt='penguin']")) == 4
    page.click("#copy")
    said(page, "The settings are copied.")
    assert "penguin\nSteps: 8, CFG scale: 3" in page.evaluate("navigator.clipboard.readText()")
    with page.expect_download() as loaded:
        page.click("#facts nav a:last-child")
    assert len(zipfile.ZipFile(loaded.value.path()).namelist()) == 5
    page.click("#gallery .gallery-item:nth-child(5) button")
    page.wait_for_function("document.querySelectorAll('#canvas img').length === 1")
    name = facts(page)["file"]
    with page.expect_download() as loaded:
        page.click("#facts nav a:first-child")
    assert Path(loaded.value.path()).read_bytes() == (server.out / name).read_bytes()
    page.click("#delete")
    page.wait_for_selector("#delete_yes")
    assert "cannot be brought back" in page.inner_text("#ask")
    page.click("#delete_no")
    page.wait_for_selector("#delete_yes", state="hidden")
    page.click("#delete")
    page.click("#delete_yes")
    said(page, "Deleted 1 picture.")
    assert not (server.out / name).exists()
    page.wait_for_function("document.querySelectorAll('#gallery .gallery-item').length === 4")


def test_seeds_are_kept_and_thrown(page) -> None:
    draw(page, "rocket")
    seed = facts(page)["seed"]
    page.click("#dice")
    page.wait_for_function("seed => document.querySelector('#seed input').value !== seed", arg=seed)
    assert not page.is_checked("#anew input")
    page.click("#keep")
    page.wait_for_function("seed => document.querySelector('#seed input').value === seed", arg=seed)


def test_a_negative_prompt_without_effect_is_told_as_it_is_typed_and_with_the_picture(page) -> None:
    page.fill("#negative textarea, #negative input", "red")
    page.fill("#guidance input[type=number]", "1")
    text = "The negative prompt has no effect: guidance is 1"
    page.wait_for_function("text => document.querySelector('#tokens').innerText.includes(text)", arg=text)
    page.fill("#prompt textarea", "pizza")
    page.click("#draw")
    assert text in said(page, "Done: 1 picture.")
    page.fill("#guidance input[type=number]", "3")
    page.wait_for_function("!document.querySelector('#tokens').innerText.includes('negative')")


# -- pages that come back, languages, keys


def test_back_finds_the_form_the_job_the_pictures_and_what_was_given(page) -> None:
    draw(page, "rainbow")
    page.click("#control")
    page.wait_for_selector("#sees img")
    page.fill("#prompt textarea", "castle")
    page.fill("#negative textarea, #negative input", "grey")
    page.fill("#steps input[type=number]", "200")
    page.fill("#count input", "8")  # a job that is not done before the page is back
    page.click("#draw")
    page.wait_for_selector("#canvas img.live[alt='Preview: castle']")
    page.goto("about:blank")
    page.wait_for_timeout(500)
    page.go_back()
    ready(page)
    said(page, "Drawing")
    fields = ("prompt textarea", "negative textarea, #negative input", "steps input[type=number]")
    assert [page.input_value(f"#{name}") for name in fields] == ["castle", "grey", "200"]
    page.wait_for_selector("#steer img")
    page.wait_for_selector("[role=tab][aria-selected=true] >> text=Control")
    page.wait_for_selector("#gallery img[alt='rainbow']")
    page.keyboard.press("Escape")
    said(page, "Cancelled.")
    for _ in range(3):  # the others wait
        page.click("#draw")
    page.wait_for_selector("#canvas img.live")
    page.goto("about:blank")
    page.wait_for_timeout(10_000)  # a heartbeat is missed, and the 3 s of the command line are over
    page.go_back()
    ready(page)
    said(page, "closed for longer than 3 s")


def test_the_page_is_chinese_and_dark_where_a_person_chooses_it(page) -> None:
    page.click("#language")
    page.wait_for_selector("#draw >> text=绘制")
    ready(page)
    assert page.evaluate("document.documentElement.lang") == "zh-CN"
    assert [one.inner_text() for one in page.query_selector_all("[role=tab]")][:4] == list(CHINESE)
    assert "128 种物体" in page.inner_text("#about")
    page.click("#draw")
    said(page, "提示词为空")
    page.click("#theme")
    page.wait_for_selector("body.dark")
    page.reload()
    page.wait_for_selector("body.dark #draw >> text=绘制")
    page.click("#language")
    page.wait_for_selector("#draw >> text=Draw")
    page.click("#theme")
    page.wait_for_selector("body:not(.dark)")


@pytest.mark.skipif(AXE is None, reason="npm install axe-core, or its file in AXE")
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("tabs", [ENGLISH, CHINESE])
def test_axe_finds_nothing_in_any_tab(server, chromium, tabs, dark) -> None:
    def violations() -> list[Any]:
        page.evaluate(AXE.read_text())
        return page.evaluate(
            "axe.run().then(found => found.violations.map(one => [one.id, one.nodes[0].html]))"
        )

    with visiting(chromium, server.url, PHONE if dark else DESKTOP) as page:
        ready(page)
        if tabs is CHINESE:
            page.click("#language")
            page.wait_for_selector("#draw >> text=绘制")
            ready(page)
        if dark:
            page.click("#theme")
        for name in tabs:
            tab(page, name)
            page.wait_for_timeout(300)
            assert violations() == [], name
        page.fill("#prompt textarea", "red apple")
        tab(page, tabs[0])
        page.fill("#steps input[type=number]", "200")
        page.keyboard.press("Control+Enter")
        page.wait_for_selector("#canvas img.live")
        assert violations() == []
        page.keyboard.press("Escape")


@pytest.mark.parametrize("screen", [DESKTOP, PHONE])
def test_targets_have_24_pixels_and_nothing_is_wider_than_the_screen(server, chromium, screen) -> None:
    with visiting(chromium, server.url, screen) as page:
        ready(page)
        draw(page, "pizza")
        page.click("#grid button >> nth=0")
        page.click("#delete")
        page.wait_for_selector("#delete_yes")
        for name in ENGLISH:
            tab(page, name)
            page.wait_for_timeout(300)
            assert page.evaluate(TARGETS) == [], name
            assert (
                outside(page, "#draw", "#canvas", "#facts", "#gallery", "#steps", "#head", "#tabs") == []
            ), name


def test_the_form_comes_before_the_pictures_for_the_keyboard(page) -> None:
    draw(page, "pizza")
    order = page.evaluate(
        "['prompt', 'draw', 'tabs', 'steps', 'upload', 'canvas', 'delete', 'gallery']"
        ".map(id => document.getElementById(id))"
        ".every((one, i, all) => !i || all[i - 1].compareDocumentPosition(one) & 4)"
    )
    assert order
    assert page.evaluate("[...document.querySelectorAll('[tabindex]')].every(one => one.tabIndex <= 0)")
    assert [page.query_selector(f"{tag}") is not None for tag in ("h1", "h2")] == [True, True]


def test_shapes_and_swap_keep_to_sizes_that_are_drawn(tmp_path, chromium) -> None:
    """On a model of many sizes, without examples or a control."""
    toy = ROOT / "tests" / "assets" / "toy" / "base.yaml"
    sizes = "sampling.sizes={min: 32, max: 96, multiple: 16, max_area: 4096}"
    with (
        serving(tmp_path / "out", "--base", DEBUG, toy, sizes, "parallel.device=cpu") as running,
        visiting(chromium, running.url) as page,
    ):
        ready(page)
        assert not page.is_visible("#examples") and page.get_by_role("tab", name="Control").count() == 0
        wanted = [page.input_value("#width input"), page.input_value("#height input")]
        page.click("#swap")
        page.wait_for_function("wide => document.querySelector('#width input').value === wide", arg=wanted[1])
        assert page.input_value("#height input") == wanted[0]
        page.click("#shapes button >> text=1:1")
        page.wait_for_function(
            "document.querySelector('#width input').value === document.querySelector('#height input').value"
        )

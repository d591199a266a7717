"""Folder names are safe for any prompt, and what a PNG says about its prompt comes back exactly."""

import re
from pathlib import Path, PureWindowsPath

from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from sat.sampling.output import folder_name, read_png_text, safe_name, write_png
from sat.sampling.prompts import Prompt

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)


@given(text, st.integers(0, 10**6))
@example('a/b\\c:d*e?f"g<h>i|j', 0)
@example("..", 1)
@example("", 2)
@example("CON", 3)
@example("🍎🍏 \x00\x1b[31m\n", 4)
@example("x" * 10_000 + "/../" * 2500, 5)
def test_a_folder_name_is_one_safe_path_component(prompt: str, index: int) -> None:
    name = folder_name(Prompt(index, prompt))
    assert re.fullmatch(rf"{index}_[A-Za-z0-9_-]{{0,20}}", name)
    assert Path("out", name).parent == Path("out")
    assert PureWindowsPath(name).name == name


@given(st.from_regex(r"\A[A-Za-z0-9 _-]{0,60}\Z"))
def test_spaces_become_underscores_and_nothing_else_changes(prompt: str) -> None:
    assert safe_name(prompt) == prompt.replace(" ", "_")[:20]


@given(text)
def test_unsafe_characters_do_not_use_up_the_twenty(prompt: str) -> None:
    assert safe_name("/.🍎" * 50 + "a red apple" + prompt).startswith("a_red_apple")


@given(text)
@example("nul \0 and\r\nline ends")
@example("é" * 10_000)
def test_the_prompt_in_a_png_comes_back(tmp_path_factory, prompt: str) -> None:
    path = tmp_path_factory.mktemp("png") / "a.png"
    write_png(path, Image.new("RGB", (2, 2)), {"prompt": prompt})
    assert read_png_text(path) == {"prompt": prompt}

"""Code shown in the documents is code that works."""

from __future__ import annotations

import re

import pytest
import yaml

from sat.mixin import Mixin
from tests.architecture.tree import ROOT, files

PAGES = [path for path in files() if path.suffix == ".md"]


def blocks(language: str) -> list[tuple[str, str]]:
    """(file, code) of every fenced block of a language."""
    pattern = re.compile(rf"^```{language}\n(.*?)^```", re.MULTILINE | re.DOTALL)
    return [
        (str(path.relative_to(ROOT)), code) for path in PAGES for code in pattern.findall(path.read_text())
    ]


@pytest.mark.parametrize(("page", "code"), blocks("python"), ids=lambda text: text.splitlines()[0])
def test_python_compiles(page: str, code: str) -> None:
    compile(code, page, "exec")


@pytest.mark.parametrize(("page", "code"), blocks("yaml"), ids=lambda text: text.splitlines()[0])
def test_yaml_parses(page: str, code: str) -> None:
    yaml.safe_load(code)


def test_the_example_mixin_fits_its_host() -> None:
    """Defining the class checks its hook and parameters."""
    code = next(code for page, code in blocks("python") if page == "docs/hooks.md")
    names: dict[str, object] = {}
    exec(compile(code, "docs/hooks.md", "exec"), names)
    made = names["LayerNorms"]
    assert isinstance(made, type) and issubclass(made, Mixin)

"""Pages that say what the code says: config reference, the code of extend.md, the two READMEs."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from sat.cli import sample
from tests.architecture.tree import ROOT


def module(path: Path) -> ModuleType:
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None, f"{path} is importable"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_config_reference_is_current() -> None:
    page = module(ROOT / "docs" / "generate_config.py").page()
    assert (ROOT / "docs" / "config_reference.md").read_text() == page, "run python docs/generate_config.py"


def test_the_code_of_the_page_on_extending_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that begin with a file's name become that file; those that begin with ``# use`` are run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    text = (ROOT / "docs" / "extend.md").read_text()
    used = 0
    for language, code in re.findall(r"^```(python|yaml)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        first = re.match(r"# (\S+?)(:|$)", code.splitlines()[0])
        assert first, f"a block of {language} begins with its file's name, or with use"
        if first[1] != "use":
            Path(first[1]).write_text(code)
            continue
        names: dict[str, object] = {}
        exec(compile(code, "docs/extend.md", "exec"), names)
        used += 1
        if "picture" in names:
            assert names["picture"].size == (64, 48)
            hooks = str(names["pipe"].generator.engine.network.hooks)
            assert re.search(r"^layer +gain -> default$", hooks, re.MULTILINE), hooks
    assert sample.main(["--base", "configs/debug.yaml", "my.yaml", "--check"]) == 0
    for name in ("my_parts", "my_format"):
        sys.modules.pop(name)
    assert used == 2


def _skeleton(name: str) -> dict[str, list[str]]:
    """What both languages must share: commands, links, pictures, and the number of headings and rows."""
    text = (ROOT / name).read_text("utf-8")
    blocks = re.findall(r"^```(?:bash|python)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    links = re.findall(r"\]\(([^)#\s]+)", text)
    headings = re.findall(r"^(#+) ", text, re.MULTILINE)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    return {
        "commands": [line for block in blocks for line in block.splitlines()],
        "links and pictures": sorted({link for link in links if not link.startswith("README")}),
        "headings": headings,
        "rows of tables": [line.split("|")[-2].strip() for line in rows if "`tests/" in line],
        "rows": ["|"] * len(rows),
    }


@pytest.mark.parametrize("part", ["commands", "links and pictures", "headings", "rows of tables", "rows"])
def test_both_readmes_are_in_step(part: str) -> None:
    english, chinese = _skeleton("README.md")[part], _skeleton("README_zh.md")[part]
    assert [x for x in english if x not in chinese] == [], f"not in README_zh.md: {part}"
    assert [x for x in chinese if x not in english] == [], f"not in README.md: {part}"
    assert len(english) == len(chinese)

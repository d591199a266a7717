"""The documentation builds as a site without a warning and asks no other machine for anything."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.configs import ROOT


def test_the_site_builds_without_warnings_and_is_whole_in_itself(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="needs mkdocs-material (requirements-docs.txt)")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert "WARNING -" not in done.stderr
    pages = {path.parent.name: path.read_text("utf-8") for path in (tmp_path / "site").rglob("index.html")}
    assert {"site", "zh", "install", "config_reference", "tour", "troubleshooting"} <= set(pages)
    loaded = re.compile(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=[\"']?(https?:)?//", re.IGNORECASE)
    assert not [name for name, text in pages.items() if loaded.search(text)]
    assert (tmp_path / "site/files/configs/tiny_prompts.txt").is_file()
    assert (
        "images/tiny_prompts.png" in pages["site"] and (tmp_path / "site/images/tiny_prompts.png").is_file()
    )

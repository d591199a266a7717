"""Hooks of mkdocs: pages and files from outside ``docs/``, and the notebook as a page.

Links between the documents work in the repository. Here they become the site's: pages are copied under the
names in ``OUTSIDE``, other files under ``files/``.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = {
    "README.md": "index.md",
    "README_zh.md": "zh.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "data/README.md": "data_sample.md",
}
NOTEBOOK = "docs/tour.ipynb"
BOOST = {
    "troubleshooting.md": 8,
    "from_diffusers.md": 2,
    "changelog.md": 0.2,
    "config_reference.md": 0.5,
    "log.md": 0.2,
}

_LINK = re.compile(r"(?<=\]\()([^)#\s]+)(?=(?:#[^)\s]*)?\))")


def on_config(config: Any) -> Any:
    """Put pages that ``nav`` does not name under More, so that every page can be reached."""
    listed = set(_pages(config.nav))
    found = {path.name for path in (ROOT / "docs").glob("*.md")} | set(OUTSIDE.values()) | {"tour.md"}
    if rest := sorted(found - listed):
        config.nav.append({"More": rest})
    return config


def _pages(nav: Any) -> Iterator[str]:
    for item in nav if isinstance(nav, list) else nav.values() if isinstance(nav, dict) else [nav]:
        if isinstance(item, str):
            yield item
        else:
            yield from _pages(item)


def on_files(files: Files, config: Any) -> Files:
    """Add pages from outside ``docs/``, the notebook, and every linked file."""
    for source, name in OUTSIDE.items():
        text = (ROOT / source).read_text("utf-8")
        files.append(File.generated(config, name, content=rewritten(text, posixpath.dirname(source))))
    files.append(File.generated(config, "tour.md", content=_notebook((ROOT / NOTEBOOK).read_text("utf-8"))))
    texts = {source: (ROOT / source).read_text("utf-8") for source in OUTSIDE}
    texts |= {f"docs/{path.name}": path.read_text("utf-8") for path in (ROOT / "docs").glob("*.md")}
    linked = {
        target for source, text in texts.items() for target in _targets(text, posixpath.dirname(source))
    }
    for target in sorted(linked):
        name = _place(target)
        if name.startswith("files/") and (ROOT / target).is_file():
            files.append(File.generated(config, name, abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Rewrite links out of ``docs/`` to the site's."""
    if page.file.src_uri in BOOST:  # what people search for by its symptom is answered there
        page.meta["search"] = {"boost": BOOST[page.file.src_uri]}
    outside = page.file.src_uri in OUTSIDE.values() or page.file.src_uri == "tour.md"
    return markdown if outside else rewritten(markdown, "docs")


def rewritten(text: str, folder: str) -> str:
    """``text`` of the repository's ``folder`` with links of the site; all its pages lie in one folder."""
    return _LINK.sub(lambda match: _place(_inside(match[1], folder)) if _local(match[1]) else match[1], text)


def _targets(text: str, folder: str) -> Iterator[str]:
    yield from (_inside(target, folder) for target in _LINK.findall(text) if _local(target))


def _local(target: str) -> bool:
    return "://" not in target and not target.startswith("mailto:")


def _inside(target: str, folder: str) -> str:
    """Path of a link in the repository."""
    return posixpath.normpath(posixpath.join(folder, target))


def _place(path: str) -> str:
    """Path in the site of a file of the repository."""
    if path in OUTSIDE:
        return OUTSIDE[path]
    if path == NOTEBOOK:
        return "tour.md"
    return path.removeprefix("docs/") if path.startswith("docs/") else f"files/{path}"


def _notebook(text: str) -> str:
    """A notebook as Markdown: texts, code in blocks, and what the code printed and drew."""
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"]).strip("\n")
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            printed = "".join(output.get("text", data.get("text/plain", ""))).strip("\n")
            if "image/png" in data:
                parts.append(
                    f'<img alt="output" src="data:image/png;base64,{"".join(data["image/png"]).strip()}">'
                )
            elif printed:
                parts.append(f"```text\n{printed}\n```")
    return "\n\n".join(parts) + "\n"

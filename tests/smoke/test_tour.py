"""docs/tour.ipynb runs from the top in a fresh kernel, and is kept without outputs."""

from __future__ import annotations

import json

import pytest

from tests.configs import ROOT

NOTEBOOK = ROOT / "docs" / "tour.ipynb"


def test_the_notebook_is_kept_without_outputs() -> None:
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in cells)


def test_the_notebook_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat", reason="needs requirements-docs.txt")
    nbclient = pytest.importorskip("nbclient", reason="needs requirements-docs.txt")
    pytest.importorskip("ipykernel", reason="needs requirements-docs.txt")
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    place = {"metadata": {"path": str(ROOT / "docs")}}
    done = nbclient.NotebookClient(notebook, timeout=240, kernel_name="python3", resources=place).execute()
    outputs = [output for cell in done["cells"] for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
    printed = "".join(output.get("text", "") for output in outputs)
    assert "probe" not in printed.split("layer 0:")[0] and "layer 5:" in printed
    assert "top-1 100%" in printed

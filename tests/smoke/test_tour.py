"""docs/tour.ipynb runs from the top in a fresh kernel, and is kept with what it printed and drew."""

from __future__ import annotations

import json
import re

import pytest

from tests.configs import ROOT

NOTEBOOK = ROOT / "docs" / "tour.ipynb"


def test_the_notebook_is_kept_with_its_outputs_and_nothing_of_the_machine() -> None:
    text = NOTEBOOK.read_text("utf-8")
    outputs = [output for cell in json.loads(text)["cells"] for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert len(text) < 400_000 and not re.search(r"/(tmp|home|root|work)/", text)


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

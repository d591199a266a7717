"""Names of before the rings still work: configs, manifests, adapters, runs, imports, and pages' code."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sat import compat
from sat.config.load import load_full
from sat.config.schema import Experiment
from sat.config.yaml_source import ConfigError
from tests.architecture.test_pages import module
from tests.architecture.tree import ROOT

BEFORE = ROOT / "tests" / "fixtures" / "before_rings"
CONFIGS = sorted(path.name for path in (BEFORE / "configs").glob("*.yaml"))
CASCADES = [name for name in CONFIGS if "\ncascade:" in (BEFORE / "configs" / name).read_text()]
MODELS = [name for name in CONFIGS if "\nmodel:\n  target:" in (BEFORE / "configs" / name).read_text()]
OVERLAYS = [name for name in CONFIGS if name not in CASCADES + MODELS]
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


# -- Python imports


@pytest.mark.parametrize("old", sorted(compat.MODULES))
def test_an_old_module_is_found_under_its_old_name(old: str) -> None:
    new = importlib.import_module(compat.MODULES[old])
    sys.modules.pop(old, None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        moved = importlib.import_module(old)
    if old not in compat.FOLDERS:
        assert f"{old} is now {compat.MODULES[old]}" in "".join(str(w.message) for w in caught)
    for name in getattr(new, "__all__", [n for n in vars(new) if not n.startswith("_")][:3]):
        assert getattr(moved, name) is getattr(new, name)
    with pytest.raises(AttributeError):
        _ = moved.surely_not_there


@pytest.mark.parametrize("old", sorted(compat.NAMES))
def test_an_old_name_is_the_object_of_its_new_name(old: str) -> None:
    where, _, name = old.rpartition(".")
    now, _, today = compat.target(old).rpartition(".")
    found = getattr(importlib.import_module(now), today)
    if where in compat.MODULES:
        assert getattr(importlib.import_module(where), name) is found


def test_a_name_that_never_was_is_an_import_error() -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("sat.nothing")
    with pytest.raises(ImportError, match="Nothing"):
        exec("from sat.diffusion.process import Nothing")


def test_the_page_of_moved_names_is_current() -> None:
    page = module(ROOT / "docs" / "generate_moved.py").page()
    assert (ROOT / "docs" / "moved.md").read_text("utf-8") == page, "run python docs/generate_moved.py"


# -- configs and files


def as_before(experiment: Experiment) -> Experiment:
    """``experiment`` without what came later: words of the page, back-projections of the small relays."""
    return replace(experiment, page=None, sampling=replace(experiment.sampling, back_projections=0))


@pytest.mark.parametrize("name", MODELS)
def test_a_config_of_before_is_the_config_of_now(name: str) -> None:
    old, new = load_full([BEFORE / "configs" / name]), load_full([ROOT / "configs" / name])
    assert old.experiment == as_before(new.experiment)
    said = "\n".join(map(str, old.notices))
    if "sat.diffusion.parameterisation" in (BEFORE / "configs" / name).read_text():
        assert re.search(rf"{name}:\d+.*parameterisation.*prediction", said), said
    assert not [n for n in new.notices if "is now" in str(n)]


@pytest.mark.parametrize("name", OVERLAYS)
def test_a_config_of_before_laid_over_a_model_is_that_of_now(name: str) -> None:
    """What the small models refuse is refused alike."""
    family = "tiny_base.yaml" if any(word in name for word in ("base", "relay", "unet")) else "tiny.yaml"
    found: list[object] = []
    for folder in (BEFORE / "configs", ROOT / "configs"):
        try:
            found.append(as_before(load_full([folder / family, folder / name]).experiment))
        except ConfigError as error:
            found.append([(problem.key, problem.what) for problem in error.problems])
    assert found[0] == found[1]


@pytest.mark.parametrize("path", sorted((BEFORE / "resolved").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_resolved_config_of_before_loads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sat.config.cascade import load_cascade

    monkeypatch.chdir(ROOT)
    assert load_cascade([path], []).stages


@pytest.mark.parametrize("path", sorted((BEFORE / "manifests").glob("*.json")), ids=lambda path: path.stem)
def test_a_manifest_of_before_names_classes_that_are_found(path: Path) -> None:
    targets = re.findall(r'"target": "([^"]+)"', path.read_text())
    assert targets
    for target in targets:
        where, _, name = compat.target(target).rpartition(".")
        assert hasattr(importlib.import_module(where), name), target


def test_a_run_of_before_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "run"
    shutil.copytree(BEFORE / "run", run)
    (run / "resolved.yaml").write_text((run / "resolved.yaml").read_text().replace("outputs/lora", str(run)))
    words = ["train.py", "--base", str(run / "resolved.yaml"), "--resume", "train.steps=3"]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[2]["loss"] == pytest.approx(2.1843581199645996, rel=1e-5)  # as the code of before went on


def test_an_adapter_and_a_model_of_before_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    from sat import Pipeline

    monkeypatch.chdir(ROOT)
    adapter = BEFORE / "run" / "checkpoints" / "step_00000002" / "native" / "adapter.safetensors"
    overrides = [("adapters.load", [{"path": str(adapter)}]), ("checkpoint.model", str(BEFORE / "native"))]
    pipe = Pipeline.from_config([BEFORE / "configs" / "debug.yaml"], overrides, device="cpu")
    assert len(pipe.adapters) == 1
    assert torch.isfinite(pipe("a red apple").latents).all()


# -- code of the pages


def _old_pages() -> list[tuple[str, str]]:
    out = []
    for page in ("extend.md", "hooks.md"):
        text = (BEFORE / "docs" / page).read_text()
        out += [(page, code) for code in re.findall(r"^```(?:python|yaml)\n(.*?)^```", text, re.M | re.S)]
    cells = json.loads((BEFORE / "docs" / "tour.ipynb").read_text())["cells"]
    return out + [("tour.ipynb", "".join(c["source"])) for c in cells if c["cell_type"] == "code"]


def test_the_code_of_the_old_pages_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As written: a block that begins with a file name becomes that file, the rest runs in order."""
    monkeypatch.syspath_prepend(str(tmp_path))
    space: dict[str, dict[str, object]] = {}
    for page, code in _old_pages():
        if page == "tour.ipynb" and page not in space:
            monkeypatch.chdir(ROOT / "docs")  # as its kernel starts; the first cell goes up from there
        elif page != "tour.ipynb":
            monkeypatch.chdir(tmp_path)
        first = re.match(r"# (\S+\.(?:py|yaml))", code)
        if first:
            Path(first[1]).write_text(code)
            continue
        names = space.setdefault(page if page == "tour.ipynb" else code, {})
        exec(compile(code, page, "exec"), names)
    for name in ("my_parts", "my_format", "probes"):
        sys.modules.pop(name, None)
    assert len(space) >= 4

"""Import order, and the start-up cost of the commands."""

from __future__ import annotations

import ast
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.architecture.tree import ROOT, sources, tree

ENTRY_POINTS = [
    name for name in ("sample.py", "train.py", "convert.py", "prompt_optimize.py") if (ROOT / name).exists()
]
HEAVY = ("torch", "deepspeed", "numpy", "pydantic", "omegaconf", "yaml", "wandb", "PIL", "sentencepiece")


def test_layers_import_only_what_lies_below_them() -> None:
    """The contracts are in pyproject.toml under tool.importlinter."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from importlinter.cli import lint_imports_command as run; run()",
            "--no-cache",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_test_peers_are_never_imported_by_the_package() -> None:
    """Not even inside a function, which import-linter also sees; this names the line.

    But for one file: networks that score pictures (an extra), which only ``sat.cli.evaluate`` loads.
    """
    peers = {"transformers", "diffusers", "peft", "torchvision", "xformers", "SwissArmyTransformer"}
    found = []
    for path in sources():
        for node in ast.walk(tree(path)):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            allowed = {"transformers"} if path == ROOT / "sat/apps/evaluate/backbones.py" else set()
            if {name.partition(".")[0] for name in names} & (peers - allowed):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not found


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert not _loaded("import sat") & set(HEAVY)


@pytest.mark.parametrize("script", ENTRY_POINTS)
def test_help_needs_no_torch(script: str) -> None:
    code = f"import runpy, sys; sys.argv = [{script!r}, '--help']\n"
    code += f"try: runpy.run_path({script!r}, run_name='__main__')\nexcept SystemExit: pass"
    assert not _loaded(code) & set(HEAVY)


@pytest.mark.parametrize("script", ENTRY_POINTS)
def test_help_takes_less_than_a_second(script: str) -> None:
    """Of processor time, the best of a few: the machine may be busy with something else."""
    best = float("inf")
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0, done.stderr.decode()
        best = min(best, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        if best < 1.0:
            return
    pytest.fail(f"{script} --help took {best:.2f} s")


@pytest.mark.parametrize("path", [ROOT / name for name in ENTRY_POINTS], ids=lambda p: p.name)
def test_entry_points_only_call_the_command_line(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 15


def _loaded(code: str) -> set[str]:
    """Top-level modules a fresh interpreter has after running ``code``."""
    ask = "\nimport sys as _s; print('\\n' + ' '.join({name.partition('.')[0] for name in _s.modules}))"
    done = subprocess.run(
        [sys.executable, "-c", code + ask], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(done.stdout.splitlines()[-1].split())

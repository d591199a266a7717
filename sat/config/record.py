"""What a run leaves behind to be repeated and understood: ``resolved.yaml`` and ``run.json``."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sat.config.load import dump
from sat.config.paths import HOME
from sat.config.schema import Experiment
from sat.util.files import write_text

PACKAGES = ("torch", "deepspeed", "numpy", "safetensors", "sentencepiece", "pydantic", "pillow")
"""Distributions whose versions may change the numbers of a run."""


def record(
    folder: Path,
    experiment: Experiment,
    *,
    hooks: str = "",
    world: int = 1,
    seeds: Mapping[str, int] | None = None,
    weights: Mapping[str, Any] | None = None,
    device: str = "",
    command: Sequence[str] | None = None,
) -> None:
    """Write ``resolved.yaml`` (``--base`` reads it) and ``run.json`` into ``folder``; call it on one rank.

    ``hooks`` is the printed table of hook owners, ``weights`` a digest per checkpoint part, ``command`` the
    program with its arguments (None: this process's).
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "resolved.yaml", dump(experiment))
    facts = {
        "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": list(sys.argv if command is None else command),
        "code": commit(),
        "versions": versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device,
        "world": world,
        "parallel": experiment.parallel.sizes,
        "seeds": dict(seeds or {"sampling": experiment.sampling.seed}),
        "weights": dict(weights or {}),
        "hooks": hooks.splitlines(),
        "config": "resolved.yaml",
    }
    write_text(folder / "run.json", json.dumps(facts, indent=2, ensure_ascii=False) + "\n")


def amend(folder: Path, facts: Mapping[str, Any]) -> None:
    """Add what is known only at a run's end to its ``run.json``; call it on one rank."""
    path = folder / "run.json"
    written = json.loads(path.read_text("utf-8"))
    write_text(path, json.dumps({**written, **facts}, indent=2, ensure_ascii=False) + "\n")


def commit(root: Path = HOME) -> dict[str, Any] | None:
    """The commit of the code at ``root``, and whether tracked files were changed; None outside a checkout."""
    if not (root / ".git").exists():
        return None
    found = _git(root, "rev-parse", "HEAD")
    if found is None:
        return None
    changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    return {"commit": found, "dirty": None if changes is None else bool(changes)}


def _git(root: Path, *arguments: str) -> str | None:
    """What git prints; None when there is no git, it fails, or it takes longer than ten seconds."""
    command = ["git", "-C", str(root), "--no-optional-locks", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def versions() -> dict[str, str]:
    """Installed versions of this project and of :data:`PACKAGES`."""
    from sat import __version__

    found = {"sat": __version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found

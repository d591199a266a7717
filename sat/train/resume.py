"""The run folder: which checkpoints are whole, which are torn, and how one becomes whole.

``RUN/checkpoints/step_00000100/`` holds the engine's files and ends with ``COMPLETE``, written by rank 0
after a barrier behind every rank's writes. The marker lists the files and their sizes; a folder without a
marker, or whose files do not match it, is torn and never read.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

MARKER = "COMPLETE"
NATIVE = "native"  # the folder of the trained weights
FORMAT = 2
_NAME = re.compile(r"step_(\d{8,})")


class ResumeError(RuntimeError):
    """A checkpoint that this run cannot continue from."""


@dataclass(frozen=True)
class Layout:
    """How a run is shared out. ``world``: processes; ``data``: of these, with images of their own."""

    world: int
    data: int
    tensor: int
    zero: int
    batch_size: int
    accumulate: int

    @property
    def images(self) -> int:
        """Images of an optimizer step."""
        return self.data * self.batch_size * self.accumulate


@dataclass(frozen=True)
class Progress:
    """What is needed beside weights and optimizer state to go on exactly.

    ``step``: optimizer steps tried; ``skipped``: of these, not applied; ``images`` seen by all ranks;
    ``seconds`` of training; ``loader``: the data position, the same on every rank; ``cut``: the optimizer's
    state is cut by parameters, so that any layout reads it; ``parameters``: name and shape.
    """

    step: int
    skipped: int
    images: int
    seconds: float
    loader: Mapping[str, Any]
    layout: Layout
    dtype: str
    cut: bool
    parameters: Mapping[str, list[int]]

    def check(self, now: Progress, where: Path) -> list[str]:
        """Refuse to resume where it cannot be done; otherwise what is laid out anew, in words."""
        self._same_parameters(now, where)
        was, is_ = self.layout, now.layout
        shares = [
            (was.world, is_.world, "number of processes"),
            (was.tensor, is_.tensor, "parallel.tensor"),
            (was.zero, is_.zero, "train.zero"),
        ]
        anew = [f"{what} {before} -> {after}" for before, after, what in shares if before != after]
        if anew and not self.cut:
            raise ResumeError(
                f"{where}: {', '.join(anew)}, but the state of its optimizer cannot be shared out anew (it "
                f"is not one number for each weight): resume with {was.world} processes, parallel.tensor "
                f"{was.tensor} and train.zero {was.zero}, or start a new run from its {NATIVE} folder"
            )
        if was.data != is_.data and (was.batch_size, was.accumulate) == (is_.batch_size, is_.accumulate):
            raise ResumeError(
                f"{where} was written with {was.images} images a step ({was.data} x {was.batch_size} x "
                f"accumulate {was.accumulate}); {is_.data} ranks make it {is_.images}: {_keep(was, is_)}"
            )
        if was.images != is_.images:
            anew.append(f"images a step {was.images} -> {is_.images}")
        if self.dtype != now.dtype:
            anew.append(f"train.dtype {self.dtype} -> {now.dtype}")
        return anew

    def _same_parameters(self, now: Progress, where: Path) -> None:
        if dict(self.parameters) == dict(now.parameters):
            return
        changed = sorted(
            name
            for name in {*self.parameters, *now.parameters}
            if self.parameters.get(name) != now.parameters.get(name)
        )
        name = changed[0]
        raise ResumeError(
            f"{where} trains other parameters than this run: {len(changed)} differ, first {name!r}: "
            f"shape {self.parameters.get(name, 'absent')} there, {now.parameters.get(name, 'absent')} here"
        )


def _keep(was: Layout, now: Layout) -> str:
    """What keeps the images of a step on ``now.data`` ranks."""
    if was.images % (now.data * was.batch_size) == 0:
        return f"set train.accumulate={was.images // (now.data * was.batch_size)} to go on alike"
    if was.images % now.data == 0:
        return f"set train.batch_size={was.images // now.data} train.accumulate=1 to go on with as many"
    return "they do not divide so: set train.batch_size and train.accumulate to what a step shall have"


@dataclass(frozen=True)
class Saved:
    """A whole checkpoint."""

    step: int
    path: Path

    def progress(self) -> Progress:
        """The counters and data position it was written with."""
        marker = json.loads((self.path / MARKER).read_text())
        if marker["format"] != FORMAT:
            raise ResumeError(
                f"{self.path} is of another version (format {marker['format']}, this one reads {FORMAT}): "
                f"start a new run from its {NATIVE} folder"
            )
        progress = marker["progress"]
        return Progress(**{**progress, "layout": Layout(**progress["layout"])})


class RunFolder:
    """``RUN`` and the checkpoints in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.checkpoints = root / "checkpoints"

    def saved(self) -> list[Saved]:
        """Whole checkpoints, oldest first. Torn ones are named in a warning."""
        whole: list[Saved] = []
        for path, step in self._folders():
            if reason := torn(path):
                log.warning("checkpoint %s is torn (%s): skipped", path, reason)
            else:
                whole.append(Saved(step, path))
        return whole

    def path(self, step: int) -> Path:
        """The folder of the checkpoint of ``step``."""
        return self.checkpoints / f"step_{step:08d}"

    def begin(self, step: int) -> Path:
        """An empty folder for the checkpoint of ``step``; rank 0 only, before the others write."""
        path = self.path(step)
        if path.exists():
            (path / MARKER).unlink(missing_ok=True)  # first, so that it is torn if we die while deleting
            shutil.rmtree(path)
        path.mkdir(parents=True)
        return path

    def commit(self, path: Path, progress: Progress) -> None:
        """Make the checkpoint whole; rank 0 only, after every rank has written."""
        files = sorted(file for file in path.rglob("*") if file.is_file())
        for file in files:
            _flush(file)
        sizes = {file.relative_to(path).as_posix(): file.stat().st_size for file in files}
        text = json.dumps({"format": FORMAT, "progress": asdict(progress), "files": sizes}, indent=1)
        partial = path / f".{MARKER}.tmp"
        partial.write_text(text)
        _flush(partial)
        partial.replace(path / MARKER)
        _flush(path)

    def prune(self, keep: int) -> None:
        """Delete all but the newest ``keep`` whole checkpoints, and torn ones older than the newest."""
        whole = [(path, step) for path, step in self._folders() if not torn(path)]
        if not whole:
            return
        newest = whole[-1][1]
        kept = {path for path, _ in whole[-keep:]}
        for path, step in self._folders():
            if path not in kept and step < newest:
                (path / MARKER).unlink(missing_ok=True)
                shutil.rmtree(path, ignore_errors=True)

    def _folders(self) -> list[tuple[Path, int]]:
        """(folder, step) of every checkpoint folder, by step."""
        if not self.checkpoints.is_dir():
            return []
        named = [(path, _NAME.fullmatch(path.name)) for path in self.checkpoints.iterdir() if path.is_dir()]
        return sorted(((path, int(match[1])) for path, match in named if match), key=lambda pair: pair[1])


def torn(path: Path) -> str | None:
    """Why the checkpoint folder is not whole, or None if it is."""
    marker = path / MARKER
    if not marker.is_file():
        return f"no {MARKER} file: the run stopped while writing it"
    try:
        files: dict[str, int] = json.loads(marker.read_text())["files"]
    except (ValueError, KeyError, OSError) as error:
        return f"its {MARKER} file is not readable: {error}"
    for name, size in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    return None


def _flush(path: Path) -> None:
    """Have the system put a file or folder on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some file systems cannot sync a folder
        log.debug("cannot sync %s", path)
    finally:
        os.close(descriptor)

"""Run folder and its checkpoints: commit, find the whole ones, and check that a run can resume.

``RUN/checkpoints/step_00000100/`` holds the engine's files and ends with ``COMPLETE``, written by rank 0
after a barrier behind every rank's writes. The marker lists the files and their sizes; a folder without a
marker, or with files that do not match it, is torn and never read.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sat.checkpoint.verify import CheckpointError, Verify, Written, check_record, own_check
from sat.errors import UserError
from sat.util.ending import ending

log = logging.getLogger(__name__)

MARKER = "COMPLETE"
NATIVE = "native"  # the folder of the trained weights
FORMAT = 2
_NAME = re.compile(r"step_(\d{8,})")


class ResumeError(UserError, RuntimeError):
    """Checkpoint from which this run cannot resume."""

    exit_code = 1


@dataclass(frozen=True)
class Layout:
    """Layout of a run over ranks. ``world``: processes; ``data``: teams with images of their own."""

    world: int
    data: int
    tensor: int
    zero: int
    batch_size: int
    accumulate: int

    @property
    def images(self) -> int:
        """Images in an optimizer step."""
        return self.data * self.batch_size * self.accumulate


@dataclass(frozen=True)
class Progress:
    """Counters and layout that an exact resume needs beside weights and optimizer state.

    ``step``: optimizer steps tried; ``skipped``: those not applied; ``images`` seen by all ranks; ``seconds``
    of training; ``loader``: position in the data, equal on every rank; ``cut``: the optimizer's state is cut
    by parameters, so that any layout reads it; ``parameters``: shapes by name; ``steps``: of the whole run;
    ``cycles``: last steps of the rate's schedules (:func:`sat.train.optim.rate`); ``groups``: as configured.
    ``draws``: number of the rule of random numbers (:data:`sat.train.loop.RULES`).
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
    steps: int | None = None  # None in older checkpoints
    cycles: Sequence[int] = ()
    groups: Sequence[Mapping[str, Any]] = ()
    draws: int = 1  # in older checkpoints, which do not say

    def check(self, now: Progress, where: Path) -> list[str]:
        """Changes of layout between the checkpoint ``where`` and this run, in words.

        Raises :class:`ResumeError` where the run cannot resume from it.
        """
        names = sorted({*self.parameters, *now.parameters})
        if changed := [n for n in names if self.parameters.get(n) != now.parameters.get(n)]:
            name = changed[0]
            raise ResumeError(
                f"{where} trains other parameters than this run: {len(changed)} differ, first {name!r}: "
                f"shape {self.parameters.get(name, 'absent')} there, "
                f"{now.parameters.get(name, 'absent')} here"
            )
        was, is_ = self.layout, now.layout
        shares = [
            (was.world, is_.world, "number of processes"),
            (was.tensor, is_.tensor, "parallel.tensor"),
            (was.zero, is_.zero, "train.zero"),
        ]
        targets, ours = ([group["targets"] for group in p.groups] for p in (self, now))
        if targets != ours and not self.cut:
            raise ResumeError(
                f"{where}: train.groups had the targets {targets}, now {ours}, but the optimizer's state "
                f"cannot be shared out anew: keep them, or start a new run from its {NATIVE} folder"
            )
        anew = [f"{what} {before} -> {after}" for before, after, what in shares if before != after]
        if anew and not self.cut:
            raise ResumeError(
                f"{where}: {', '.join(anew)}, but the state of its optimizer cannot be shared out anew (it "
                f"is not one number for each weight): resume with {was.world} processes, parallel.tensor "
                f"{was.tensor} and train.zero {was.zero}, or start a new run from its {NATIVE} folder"
            )
        if was.data != is_.data and (was.batch_size, was.accumulate) == (is_.batch_size, is_.accumulate):
            if was.images % (is_.data * was.batch_size) == 0:
                accumulate = was.images // (is_.data * was.batch_size)
                advice = f"set train.accumulate={accumulate} to go on alike"
            elif was.images % is_.data == 0:
                batch_size = was.images // is_.data
                advice = f"set train.batch_size={batch_size} train.accumulate=1 to go on with as many"
            else:
                advice = "they do not divide so: set train.batch_size and train.accumulate to what fits"
            raise ResumeError(
                f"{where} was written with {was.images} images a step ({was.data} x {was.batch_size} x "
                f"accumulate {was.accumulate}); {is_.data} ranks make it {is_.images}: {advice}"
            )
        if was.images != is_.images:
            anew.append(f"images a step {was.images} -> {is_.images}")
        if self.dtype != now.dtype:
            anew.append(f"train.dtype {self.dtype} -> {now.dtype}")
        if list(self.groups) != list(now.groups):
            anew.append("train.groups")
        return anew


@dataclass(frozen=True)
class Saved:
    """Whole checkpoint."""

    step: int
    path: Path

    def progress(self) -> Progress:
        """Counters and data position it was written with."""
        marker = json.loads((self.path / MARKER).read_text())
        if marker.get("format") != FORMAT:
            raise ResumeError(
                f"{self.path} is of another version (format {marker.get('format')}, this one reads "
                f"{FORMAT}): start a new run from its {NATIVE} folder"
            )
        try:
            progress = marker["progress"]
            lists = {name: tuple(progress.get(name, ())) for name in ("cycles", "groups")}
            read = Progress(**{**progress, "layout": Layout(**progress["layout"]), **lists})
        except (KeyError, TypeError, AttributeError) as error:
            raise ResumeError(
                f"{self.path / MARKER}: its counters are damaged ({error}): delete this folder to resume "
                f"from the checkpoint before"
            ) from error
        if read.step != self.step:
            raise ResumeError(f"{self.path / MARKER}: step {str(read.step)[:40]} is not its folder's")
        return read

    def verify(self, rank: int, world: int, gather: Callable[[str | None], list[str | None]]) -> int:
        """Compare the state files with the marker's digests, each rank its share; their number.

        Raises on every rank.
        """
        records = json.loads((self.path / MARKER).read_text()).get("digests")
        if records is None:
            log.info("%s holds no digests of its files, an older version wrote it", self.path)
            records = {}
        problem = None
        try:
            for name in sorted(records)[rank::world]:
                check = check_record(self.path / name, records[name], Verify())
                check.finish()
        except (CheckpointError, OSError) as error:
            problem = str(error)
        if told := [text for text in gather(problem) if text is not None]:
            raise ResumeError(f"{told[0]}; or delete {self.path} to resume from the checkpoint before")
        return len(records)


class RunFolder:
    """Run folder with its checkpoints."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.checkpoints = root / "checkpoints"

    def saved(self) -> list[Saved]:
        """Whole checkpoints, oldest first. Torn ones are named in a warning."""
        whole: list[Saved] = []
        for path, step in self.folders():
            if reason := torn(path):
                log.warning("checkpoint %s is torn (%s): skipped", path, reason)
            else:
                whole.append(Saved(step, path))
        return whole

    def path(self, step: int) -> Path:
        """Folder of the checkpoint of ``step``."""
        return self.checkpoints / f"step_{step:08d}"

    def begin(self, step: int) -> Path:
        """Make an empty folder for the checkpoint of ``step``; rank 0 only, before the others write."""
        path = self.path(step)
        if ending.lock is not None:
            ending.lock.check()
        if path.exists():
            (path / MARKER).unlink(missing_ok=True)  # first, so that it is torn if we die while deleting
            shutil.rmtree(path)
        path.mkdir(parents=True)
        return path

    def commit(self, path: Path, progress: Progress, written: Mapping[str, Written] | None = None) -> None:
        """Make the checkpoint whole; rank 0 only, after every rank has written.

        ``written``: digests of the files that resuming reads, by their names in the folder.
        """
        if ending.lock is not None:
            ending.lock.check()
        files = sorted(file for file in path.rglob("*") if file.is_file())
        for file in files:
            _flush(file)
        sizes = {file.relative_to(path).as_posix(): file.stat().st_size for file in files}
        marker: dict[str, Any] = {"format": FORMAT, "progress": asdict(progress), "files": sizes}
        if written is not None:
            marker["digests"] = {name: file.record(name) for name, file in written.items()}
        text = json.dumps({**marker, "check": own_check(marker)}, indent=1)
        partial = path / f".{MARKER}.tmp"
        partial.write_text(text)
        _flush(partial)
        partial.replace(path / MARKER)
        _flush(path)

    def prune(self, keep: int, spared: Callable[[int], bool] = lambda step: False) -> None:
        """Delete all but the newest ``keep`` whole checkpoints, and torn ones older than the newest.

        Whole ones of ``spared`` steps stay.
        """
        whole = [(path, step) for path, step in self.folders() if not torn(path)]
        if not whole:
            return
        newest = whole[-1][1]
        kept = {path for path, _ in whole[-keep:]} | {path for path, step in whole if spared(step)}
        for path, step in self.folders():
            if path not in kept and step < newest:
                (path / MARKER).unlink(missing_ok=True)
                shutil.rmtree(path, ignore_errors=True)

    def folders(self) -> list[tuple[Path, int]]:
        """(folder, step) of every checkpoint folder, by step."""
        if not self.checkpoints.is_dir():
            return []
        named = [(path, _NAME.fullmatch(path.name)) for path in self.checkpoints.iterdir() if path.is_dir()]
        return sorted(((path, int(match[1])) for path, match in named if match), key=lambda pair: pair[1])


def torn(path: Path) -> str | None:
    """Reason why a checkpoint folder is not whole, None if it is."""
    marker = path / MARKER
    if not marker.is_file():
        return f"no {MARKER} file: the run stopped while writing it"
    try:
        content: dict[str, Any] = json.loads(marker.read_text())
        files: dict[str, int] = dict(content["files"])
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        return f"its {MARKER} file is not readable: {error}"
    known = content.get("format") == FORMAT and {"check", "digests"} & set(content)
    if known and content.get("check") != own_check(content):
        return f"its {MARKER} file is not what was written"
    for name, size in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    return None


def _flush(path: Path) -> None:
    """Sync a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some file systems cannot sync a folder
        log.debug("cannot sync %s", path)
    finally:
        os.close(descriptor)

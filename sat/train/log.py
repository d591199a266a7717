"""The record of a run: ``metrics.jsonl`` always, wandb and tensorboard, one plain line for the reader."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TextIO

import torch
from torch import Tensor

from sat.parallel.collectives import mean

log = logging.getLogger(__name__)


_UNSHOWN = ("step", "images", "seconds")
"""Numbers of a row that its line for the reader leaves out."""


class Averages:
    """Running means of named scalars since the last ``take``, kept on the device they come from."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Count one more value of each name; values that are not finite are left out of the mean."""
        for name, value in values.items():
            value = value.detach().float()
            finite = torch.isfinite(value)
            pair = torch.stack([torch.where(finite, value, torch.zeros_like(value)), finite.float()])
            self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def take(self) -> dict[str, float]:
        """The means over everything added on every rank, NaN where nothing finite was; then start anew."""
        names = sorted(self._sums)
        if not names:
            return {}
        table = mean(torch.stack([self._sums[name] for name in names])).tolist()
        self._sums = {}
        return {
            name: total / count if count else math.nan
            for name, (total, count) in zip(names, table, strict=True)
        }


class Record:
    """Writes one row of numbers per call, on rank 0. Numbers that are not finite become null in the file."""

    def __init__(self, folder: Path, *, step: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        _cut(path, step)
        self._file: TextIO = path.open("a", encoding="utf-8")
        self._wandb: Any = None
        self._board: Any = None

    def start_tensorboard(self, folder: Path, *, step: int) -> None:
        """Mirror the rows to ``folder/tensorboard``; what it holds after ``step`` is dropped."""
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def start_wandb(
        self,
        folder: Path,
        mode: Literal["offline", "online", "disabled"],
        project: str,
        config: Mapping[str, Any],
    ) -> None:
        """Mirror the rows to wandb; a missing or failing wandb costs a warning, never the run."""
        if mode == "disabled":
            return
        try:
            import wandb

            quiet = wandb.Settings(silent=True, console="off", save_code=False)
            self._wandb = wandb.init(
                project=project, dir=str(folder), mode=mode, config=dict(config), settings=quiet
            )
        except Exception as error:  # noqa: BLE001 - whatever a tracker raises must not end a training run
            log.warning(
                "wandb does not start (%s): metrics go to metrics.jsonl only", str(error).splitlines()[0]
            )

    def write(self, row: Mapping[str, float]) -> None:
        """Append ``row``; its ``step`` is the x axis."""
        clean = {k: v if math.isfinite(v) else None for k, v in row.items()}
        self._file.write(json.dumps(clean) + "\n")
        self._file.flush()
        if self._wandb is not None:
            self._wandb.log(clean, step=int(row["step"]))
        if self._board is not None:
            for name, value in clean.items():
                if value is not None and name != "step":
                    self._board.add_scalar(name, value, int(row["step"]))
            self._board.flush()

    def close(self) -> None:
        """Finish the file and wandb."""
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish()
        if self._board is not None:
            self._board.close()


def line(row: Mapping[str, float], steps: int) -> str:
    """``row`` as one line to read."""
    head = f"step {int(row['step'])}/{steps}"
    shown = [f"{k} {_short(v)}" for k, v in row.items() if k not in _UNSHOWN]
    left = row["seconds_per_step"] * (steps - row["step"]) if "seconds_per_step" in row else math.nan
    return "  ".join([head, *shown, *([f"left {clock(left)}"] if math.isfinite(left) else [])])


def clock(seconds: float) -> str:
    """``h:mm:ss``."""
    whole = max(0, int(seconds))
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def _short(value: float) -> str:
    """Four digits, in the notation that is shortest."""
    return f"{value:.4g}"


def _cut(path: Path, step: int) -> None:
    """Drop rows after ``step``: a resumed run writes them again."""
    if not path.exists():
        return
    kept = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(text)
        except ValueError:
            continue  # a line cut off by a crash
        if row.get("step", 0) <= step:
            kept.append(text)
    partial = path.with_suffix(".tmp")
    partial.write_text("".join(f"{text}\n" for text in kept), encoding="utf-8")
    partial.replace(path)

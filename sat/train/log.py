"""Log of a run: means and model FLOP use, written to ``metrics.jsonl``, wandb and tensorboard."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sat.config.schema import TrainConfig
from sat.data.batch import Batch
from sat.engine import DiffusionEngine
from sat.estimate.trace import flops_of
from sat.parallel.collectives import mean
from sat.parallel.launch import Runtime
from sat.sampling.output import read_png_text
from sat.train.objectives import Objective
from sat.util.host import install, write_text
from sat.util.log import clock
from sat.util.pictures import open_picture, shown

log = logging.getLogger(__name__)


_UNSHOWN = ("step", "images", "seconds")
"""Numbers of a row that its log line leaves out."""
_DETAILS = ("tokens_per_second", "mfu", "data_wait", "memory_gb", "memory_reserved_gb", "epoch")
"""Numbers that it leaves out where no details were asked for (``-v``)."""


class Averages:
    """Means of named scalars, and elements of vectors, since the last ``take``, kept on their device."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}  # (sum, count)

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Count the values of each name; those that are not finite stay out of the mean."""
        for name, value in values.items():
            value = value.detach().float()
            finite = torch.isfinite(value)
            pair = torch.stack([torch.where(finite, value, torch.zeros_like(value)), finite.float()])
            pair = pair.sum(1) if value.dim() else pair
            self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def take(self) -> dict[str, float]:
        """Means over all ranks, NaN where nothing finite was added; start anew."""
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
    """Writes a row of numbers per call, on rank 0; numbers that are not finite become null in the file."""

    def __init__(self, folder: Path, *, step: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        if path.exists():  # a resumed run writes the rows after ``step`` again
            kept = []
            for text in path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError):  # a line cut off by a crash
                    if json.loads(text).get("step", 0) <= step:
                        kept.append(text)
            partial = path.with_suffix(".tmp")
            partial.write_text("".join(f"{text}\n" for text in kept), encoding="utf-8")
            partial.replace(path)
        self._file: TextIO = path.open("a", encoding="utf-8")
        self._wandb: Any = None
        self._board: Any = None

    def start_tensorboard(self, folder: Path, *, step: int, train: TrainConfig, config: str) -> None:
        """Mirror the rows to ``folder/tensorboard``; rows there after ``step`` are dropped.

        ``config`` is the resolved YAML, which is written there with the run's name, group, tags and notes.
        """
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        about = {
            "run": train.wandb_name or folder.resolve().name,
            "group": train.wandb_group,
            "tags": ", ".join(train.wandb_tags),
            "notes": train.wandb_notes,
        }
        told = "\n\n".join(f"**{name}**: {value}" for name, value in about.items() if value)
        self._board.add_text("run", told, step)
        self._board.add_text("config", "\n".join(f"    {line}" for line in config.splitlines()), step)

    def start_wandb(
        self, folder: Path, train: TrainConfig, config: Mapping[str, Any], *, resume: bool
    ) -> None:
        """Mirror the rows to wandb; a missing or failing wandb costs a warning, never the run.

        The run's id is kept in ``folder``; with ``resume`` the same run goes on.
        """
        if train.wandb == "disabled":
            return
        kept = folder / "wandb_id"
        try:
            import wandb

            if not (resume and kept.is_file()):
                write_text(kept, f"{uuid4().hex[:8]}\n")
            self._wandb = wandb.init(
                project=train.project, dir=str(folder), mode=train.wandb, config=dict(config),
                id=kept.read_text().strip(), resume="allow", name=train.wandb_name or folder.resolve().name,
                group=train.wandb_group, tags=train.wandb_tags, notes=train.wandb_notes,
                settings=wandb.Settings(silent=True, console="off", save_code=False),
            )  # fmt: skip
        except ImportError:
            log.warning(
                "train.wandb is %s and wandb is not installed: metrics go to metrics.jsonl only "
                "(%s, or train.wandb=disabled)", train.wandb, install("wandb"),
            )  # fmt: skip
        except Exception as error:  # noqa: BLE001 - whatever a tracker raises must not end a training run
            log.warning(
                "wandb does not start (%s): metrics go to metrics.jsonl only", str(error).splitlines()[0]
            )

    def write(self, row: Mapping[str, float]) -> None:
        """Append ``row``; its ``step`` is the x axis."""
        clean = {k: v if math.isfinite(v) else None for k, v in row.items()}
        self._file.write(json.dumps(clean) + "\n")
        self._file.flush()
        named = {grouped(name): value for name, value in clean.items() if name != "step"}
        if self._wandb is not None:
            self._wandb.log(named, step=int(row["step"]))
        if self._board is not None:
            for name, value in named.items():
                if value is not None:
                    self._board.add_scalar(name, value, int(row["step"]))
            self._board.flush()

    def pictures(self, step: int, folder: Path) -> None:
        """Show the pictures in ``folder`` under their files' names, those of ``train.sample_prompts``."""
        files = [file for file in sorted(folder.glob("*.png")) if file.stem != "grid"]
        if not files or (self._wandb is None and self._board is None):
            return
        made = {f"samples/{file.stem}": (file, read_png_text(file) or {}) for file in files}
        if self._wandb is not None:
            import wandb

            images = {
                name: wandb.Image(str(file), caption=text.get("prompt"))
                for name, (file, text) in made.items()
            }
            self._wandb.log(images, step=step)
        if self._board is not None:
            for name, (file, _) in made.items():
                with open_picture(file) as picture:
                    self._board.add_image(name, np.asarray(shown(picture)), step, dataformats="HWC")
            self._board.flush()

    def close(self) -> None:
        """Finish the file and wandb."""
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish()
        if self._board is not None:
            self._board.close()


def grouped(name: str) -> str:
    """The name of a number in the trackers, which group by what stands before a slash."""
    if "/" in name:
        return name
    return f"speed/{name}" if name in _SPEED else f"train/{name}"


_SPEED = frozenset(
    {"images_per_second", "seconds_per_step", "tokens_per_second", "mfu", "data_wait", "memory_gb"}
    | {"memory_reserved_gb", "seconds"}
)
WIDTH = 100
"""Columns of a log line."""
_FIRST = {
    "loss": "loss", "validation/loss": "validation/loss", "validation/shuffled": "shuffled", "lr": "lr",
    "grad_norm": "norm", "images_per_second": "images/s", "seconds_per_step": "s/step",
    "data_wait": "wait", "memory_gb": "GB",
}  # fmt: skip
"""Numbers that a log line shows before all others, and what it calls them."""
_LAST = ("tokens_per_second", "memory_reserved_gb", "epoch", "mfu")


def line(row: Mapping[str, float], steps: int) -> str:
    """``row`` as a log line of 100 columns, with the time left; what does not fit is in ``metrics.jsonl``."""
    left = row["seconds_per_step"] * (steps - row["step"]) if "seconds_per_step" in row else math.nan
    end, details = [f"left {clock(left)}"] if math.isfinite(left) else [], log.isEnabledFor(logging.DEBUG)
    hidden = {*_UNSHOWN, *(() if details else _DETAILS), *(() if row.get("skipped") else ("skipped",))}
    order = [*_FIRST, *(name for name in row if name not in _FIRST and name not in _LAST), *_LAST]
    out = f"step {int(row['step'])}/{steps}"
    room = WIDTH - sum(len(text) + 2 for text in end)
    for name in (name for name in order if name in row and name not in hidden):
        text = f"  {_FIRST.get(name, name.removeprefix('validation/'))} {row[name]:.4g}"
        if details or len(out) + len(text) <= room:
            out += text
    return "  ".join([out, *end])


# -- model FLOP use: operations that a step needs over those that the device could do in its time


PEAKS = {
    "B200": 2250.0, "H200": 989.0, "H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.0, "A100": 312.0,
    "L40S": 362.0, "L40": 181.0, "L4": 121.0, "A10G": 70.0, "A10": 125.0, "RTX 4090": 165.2,
    "MI300X": 1307.4,
}  # fmt: skip
"""Dense bf16 TFLOP/s by words of the device's name, longer ones first. Source: the makers' data sheets."""


def peak_flops(config: TrainConfig, runtime: Runtime) -> float | None:
    """Peak FLOP/s of a rank: ``train.peak_tflops``, or those of a known device for bf16, or None."""
    if config.peak_tflops is not None:
        return config.peak_tflops * 1e12
    if config.dtype == "fp32" and config.autocast is None:
        return None
    name = runtime.device_name
    return next((peak * 1e12 for part, peak in PEAKS.items() if re.search(rf"\b{part}\b", name)), None)


def token_counter(engine: DiffusionEngine, objective: Objective) -> Callable[[Batch], int]:
    """A counter of a batch's tokens: patches (else latent cells), and text where the network trains."""
    patch = getattr(engine.network, "patch", 1)
    text = engine.conditioner.max_length if "model" in objective.parts() else 0

    def count(batch: Batch) -> int:
        if batch.latent_moments is not None:
            h, w = batch.latent_moments.shape[-2:]
        else:
            size = batch.target_size[0].tolist() if batch.image is None else batch.image.shape[-2:]
            _, h, w = engine.latent_shape(*size)
        return len(batch) * (h * w // patch**2 + text)

    return count


class _Count(TorchDispatchMode):
    """Counts FLOPs, without those recomputed for the backward pass."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        # Only a recomputed forward pass has gradients switched on inside the backward pass.
        if not (torch._C._current_graph_task_id() >= 0 and torch.is_grad_enabled()):
            self.flops += flops_of(func, args, kwargs or {}, out)
        return out


class Meter:
    """Sums the FLOPs of micro-batches on this rank, counted once for every shape."""

    def __init__(self, peak: float) -> None:
        self.peak = peak
        self._known: dict[tuple[object, ...], int] = {}
        self._total = 0

    @contextmanager
    def micro(self, batch: Batch) -> Iterator[None]:
        """Around the forward and backward pass of ``batch``."""
        held = (batch.image, batch.latent_moments, batch.low_moments, batch.text)
        shape = tuple(None if x is None else tuple(x.shape) for x in held)
        if shape in self._known:
            yield
        else:
            with _Count() as count:
                yield
            self._known[shape] = count.flops
        self._total += self._known[shape]

    def take(self, seconds: float) -> float:
        """Share of the peak that was used in ``seconds``; start anew."""
        total, self._total = self._total, 0
        return total / seconds / self.peak

"""Choices a config leaves to this machine (``auto``): made by rank 0 for all ranks, to be written down."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import nn

from sat.checkpoint.format import DTYPES
from sat.config.schema import Experiment, TrainConfig
from sat.config.yaml_source import read
from sat.errors import UserError
from sat.kernels import measured
from sat.kernels.apply import Speed, measured_convolutions, measured_speed
from sat.kernels.attention import Backend
from sat.parallel.collectives import from_main
from sat.parallel.launch import fast_half

if TYPE_CHECKING:
    from sat.engine import DiffusionEngine

log = logging.getLogger(__name__)

CHOICES: Mapping[str, tuple[object, ...]] = {
    "dtype": tuple(DTYPES), "attention": get_args(Backend), "fold": (True, False, "ragged"),
    "pack": (True, False, "packed_sigmoid", "plain_sigmoid"), "convolutions": ("packed", "plain"),
}  # fmt: skip
"""Fields of ``sampling`` and ``train`` that may be ``auto``, and what is chosen for them."""


def as_recorded(experiment: Experiment, resolved: Path) -> Experiment:
    """``experiment`` with what is ``auto`` as the run chose it that wrote the file ``resolved``, if any.

    So that a run that goes on, perhaps on another machine, draws and trains as it began.
    """
    try:
        tree = read(resolved).tree
    except (UserError, OSError):  # absent or damaged: chosen anew
        return experiment
    for name in ("sampling", "train"):
        now, then = getattr(experiment, name), tree.get(name)
        if now is not None and isinstance(then, Mapping):
            known = {key: then[key] for key, values in CHOICES.items() if then.get(key) in values}
            left = {key: value for key, value in known.items() if getattr(now, key, None) == "auto"}
            experiment = replace(experiment, **{name: replace(now, **left)})
    return experiment


def settle_dtype(experiment: Experiment, device: torch.device | None, *, main: bool = True) -> Experiment:
    """``experiment`` with the device's fastest safe type where a dtype is ``auto``; call it on every rank.

    On a CPU bf16 where it is faster than fp32, else fp32; on a GPU bf16, and fp16 for sampling where it has
    no bf16. Training is in fp32 with ``train.zero`` 0 or ``autocast``. ``device`` None: some GPU.
    """
    cpu, sampling, train = _is_cpu(device), experiment.sampling, experiment.train

    def choose() -> Any:
        return ("fp32" if measured.slow(torch.bfloat16) else "bf16") if cpu else fast_half(device)

    if "auto" in (sampling.dtype, train and train.dtype):
        fast = _of_main(choose, main=main)
        if sampling.dtype == "auto":
            sampling = replace(sampling, dtype=fast)
        if train is not None and train.dtype == "auto":
            narrow = fast == "bf16" and train.zero and train.autocast is None
            train = replace(train, dtype="bf16" if narrow else "fp32")
    return replace(experiment, sampling=sampling, train=train)


def tell_slow(dtype: str, advice: str, device: torch.device) -> None:
    """Warn once where this CPU is slower in ``dtype`` than in fp32, with the setting of ``advice``."""
    if _is_cpu(device) and dtype != "fp32" and measured.slow(DTYPES[dtype]):
        _warn(dtype, advice, measured.convolves(DTYPES[dtype]))


@functools.cache
def _warn(dtype: str, advice: str, has: bool) -> None:
    why = (
        "is slower in {} than in fp32" if has else "has no {} arithmetic: products are 5 to 100 times slower"
    )
    log.warning("this processor %s; set %s", why.format(dtype), advice)


def slow_convolutions(dtype: str) -> str:
    """Sentence about memory that no estimate for this CPU counts in ``dtype``; empty where there is none."""
    if dtype == "fp32" or measured.convolves(DTYPES[dtype]):
        return ""
    return (
        f"not counted: buffers of {dtype} convolutions, which this processor has no instructions for: "
        f"the autoencoder and a UNet may take more than twice as much; fp32 is counted whole"
    )


def settle_sampling(
    experiment: Experiment,
    engine: DiffusionEngine,
    cells: tuple[int, int],
    device: torch.device,
    *,
    main: bool = True,
) -> Experiment:
    """``experiment`` with the ways of ``sampling`` measured that are ``auto``, for ``engine``.

    On a CPU, for pictures of ``cells`` (h, w). Elsewhere, where all but ``attention`` have no effect, all are
    left. Call it on every rank.
    """
    sampling = experiment.sampling
    speed = Speed(sampling.attention, sampling.pack, sampling.fold, sampling.compile)
    if not _is_cpu(device):
        return experiment
    speed = _of_main(lambda: measured_speed(engine.network, speed, cells, 2 * sampling.at_once), main=main)
    chosen = replace(sampling, attention=speed.attention, pack=speed.pack, fold=speed.fold)
    if chosen.convolutions == "auto":
        way = _of_main(lambda: measured_convolutions(engine.first_stage, cells), main=main)
        chosen = replace(chosen, convolutions=way)
    return replace(experiment, sampling=chosen)


def settle_training(
    train: TrainConfig,
    network: nn.Module,
    cells: tuple[int, int],
    device: torch.device,
    *,
    packs: bool,
    main: bool = True,
) -> TrainConfig:
    """``train`` with ``attention`` and, where weights are to be packed, ``pack`` measured on a CPU.

    As :func:`settle_sampling`; ``packs``: frozen weights are there, and nothing else keeps them unpacked.
    """
    if not _is_cpu(device):
        return train
    speed = Speed(train.attention, train.pack if packs else False, fold=False)
    speed = _of_main(lambda: measured_speed(network, speed, cells, train.batch_size, trains=True), main=main)
    train = replace(train, attention=speed.attention)
    return replace(train, pack=speed.pack) if packs else train


def _is_cpu(device: torch.device | None) -> bool:
    return device is not None and device.type == torch.device("cpu").type


def _of_main(choose: Callable[[], Any], *, main: bool) -> Any:
    return from_main(choose() if main else None)

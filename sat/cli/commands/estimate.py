"""``train.py --plan``: estimate of a training's memory, tokens and FLOPs, as a table."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

from sat.config.schema import Experiment, OffloadConfig
from sat.config.settle import settle_dtype, slow_convolutions
from sat.parallel.launch import data_ranks, pick_device
from sat.train.backend import check_backend
from sat.train.estimate import GAPS, LIVE, Estimate, Estimator, find_settings, zero3_offload
from sat.train.measure import on_host, sections

GB = 1e9
STAGES: tuple[Literal[0, 1, 2, 3], ...] = (0, 1, 2, 3)


def estimate(experiment: Experiment, ranks: int | None, budget: int | None) -> None:
    """Print the estimate for ``ranks`` ranks (None: those started, or one team) and how to fit ``budget``."""
    if os.environ.get("RANK", "0") != "0":
        return
    experiment = settle_dtype(experiment, pick_device("cpu") if on_host(experiment) else None)
    train, _ = sections(experiment)
    sizes = experiment.parallel.sizes
    count = ranks or int(os.environ.get("WORLD_SIZE", math.prod(sizes.values())))
    if train.backend == "plain":
        check_backend(train, count)
    readers = data_ranks(count, **sizes)  # ranks that read different images
    estimator = Estimator()
    now = estimator.estimate(experiment, count)

    height, width = now.measured.size
    model, objective = (c.target.rpartition(".")[2] for c in (experiment.model, train.objective))
    precision = train.dtype if train.autocast is None else f"{train.dtype} with {train.autocast} autocast"
    lora = experiment.adapters.lora
    print(
        f"{model}, {objective}{'' if lora is None else f', LoRA of rank {lora.rank}'}: "
        f"{height} x {width} (height x width), {train.batch_size} x {train.accumulate} images a rank and "
        f"step, {precision}, ZeRO {now.zero}, {_ranks(now.ranks)}, "
        f"{'with' if train.activation_checkpointing else 'without'} activation checkpointing"
    )
    print(f"memory of each rank in GB (1e9 bytes), {'on the CPU' if now.host else 'on a GPU'}")
    for line in [*_table(now), *_others(estimator, experiment, count)]:
        print(line)

    measured, images = now.measured, now.batch_size * now.accumulate * readers
    tokens = measured.image_tokens + measured.text_tokens
    flops = measured.trace.flops / now.batch_size
    print(
        f"each optimizer step: {images} images, {images * tokens:,} tokens "
        f"({measured.image_tokens:,} image + {measured.text_tokens} text each), "
        f"{images * flops / 1e12:,.4g} TFLOP ({flops / 1e12:,.4g} an image)"
    )
    left = "the device's context, libraries' workspaces, what the allocator leaves unused, "
    print(f"not counted: {'' if now.host else left}sampling, loaded adapters")
    if now.host and (narrow := slow_convolutions(train.autocast or train.dtype)):
        print(narrow)
    if count > readers:
        layout = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
        print(f"weights, activations and TFLOP are those of the first rank of a team of {layout}")
    if budget is not None:
        for line in _fitting(estimator, experiment, count, budget):
            print(line)


def _gb(size: float) -> str:
    return f"{size / GB:.2f}" if size >= 0.095 * GB else f"{size / GB:.3f}"


def _ranks(count: int) -> str:
    return "1 rank" if count == 1 else f"{count} ranks"


def _table(now: Estimate) -> Iterator[str]:
    """Lines of what the memory of a rank consists of."""

    def row(name: str, size: float, note: str = "") -> str:
        return f"  {name:<24}{_gb(size):>8}   {note}".rstrip()

    weights, trace = now.weights, now.measured.trace
    roles = ", ".join(f"{count / 1e6:,.1f} M {role}" for role, count in now.measured.weights.roles.items())
    count = f"{weights.trained_elements / 1e6:,.1f} M parameters" + (f": {roles}" if roles else "")
    yield row("weights, trained", weights.trained, count)
    frozen = ", ".join(f"{name} {_gb(size)}" for name, size in weights.frozen.items())
    yield row("weights, frozen", sum(weights.frozen.values()), frozen)
    part = "" if now.zero == 0 or now.sharing == 1 else f"1/{now.sharing} of them"
    yield row("float32 masters", now.masters, part)
    yield row("optimizer state", now.optimizer, part)
    yield row("moving average (EMA)", now.average, part)
    yield row("gradients", now.gradients, part if now.zero > 1 else "")
    if now.zero and not now.host:
        yield row("gradient buffer", now.bucket, "DeepSpeed's")
    yield row("activations", trace.peak(), f"{_gb(trace.kept)} of them kept for the backward pass")
    if now.host:
        yield row("batches being read", now.loading)
        yield row("process, libraries", now.process)
        gaps = now.total - now.lasting - max(phase.extra for phase in now.phases)
        yield row("gaps between tensors", gaps, f"{GAPS:.0%} of what is in use, as measured with glibc")
    if now.offloaded:
        what = (
            f"masters, optimizer, EMA, weights; {_gb(now.locked)} of it rounding and copies of pinned buffers"
        )
        yield row("in the CPU's memory", now.offloaded + now.locked, what)
    phases = ", ".join(f"{phase.name} {_gb(now.peak(phase))}" for phase in now.phases)
    yield row("most at a time", now.total, phases)


def _others(estimator: Estimator, experiment: Experiment, ranks: int) -> Iterator[str]:
    """Lines of the peak at other ZeRO stages, with and without checkpointing; offloaded in the last alone."""
    train, _ = sections(experiment)
    yield f"most at a time, otherwise the same:{'checkpointing':>25}{'without':>12}"
    gathered = f"(estimate: at most {LIVE / 1e9:g} G weights gathered)"
    rows = [
        (f"ZeRO {zero} {gathered if zero == 3 else ''}", replace(train, zero=zero, offload=OffloadConfig()))
        for zero in STAGES
        if (zero or train.dtype == "fp32") and not (zero and train.backend == "plain")
    ]
    if not on_host(experiment) and train.backend != "plain":
        away, _ = sections(zero3_offload(experiment))
        rows.append(("ZeRO 3 offloaded (configs/zero3_offload.yaml)", away))
    for name, stage in rows:
        totals = []
        for checkpointing in (True, False):
            changed = replace(stage, activation_checkpointing=checkpointing)
            totals.append(estimator.estimate(replace(experiment, train=changed), ranks).total)
        yield f"  {name:<46}{_gb(totals[0]):>12}{_gb(totals[1]):>12}"


def _fitting(estimator: Estimator, experiment: Experiment, ranks: int, budget: int) -> Iterator[str]:
    """Lines of what brings the training into ``budget`` bytes a rank."""
    search = find_settings(estimator, experiment, ranks, budget)
    now, found = search.now, search.found
    if found is now:
        yield f"fits {_gb(budget)} GB with {_gb(budget - now.total)} to spare"
        return
    yield f"does not fit {_gb(budget)} GB: {_gb(now.total)}. One change alone gives:"
    for outcome in search.alone:
        yield f"  {_gb(outcome.total):>8}   {outcome}"
    if found is None:
        yield f"nothing of this is enough; all together: {_gb(search.best.total)}   {search.best}"
        return
    where = "" if found.ranks == now.ranks else f" on {_ranks(found.ranks)}"
    yield f"fits with{where}: {found} ({_gb(found.total)})"

"""A training run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from sat.config.schema.base import Broken, Component, Makes, Precision, Section
from sat.config.schema.model import CheckpointConfig


@dataclass(frozen=True)
class OffloadConfig(Section):
    """What waits in the CPU's memory until it is needed: the optimizer, which then steps there; weights."""

    section = "train.offload"
    optimizer: bool = False
    parameters: bool = False


@dataclass(frozen=True)
class TrainConfig(Section):
    """One training run; ``batch_size`` is per rank and accumulation step, ``warmup`` in optimizer steps.

    ``dtype`` is that of the weights (half precision keeps float32 masters, so it needs ``zero`` above 0);
    ``autocast`` computes in bf16 with ``fp32`` weights. ``max_minutes`` saves and stops early;
    ``max_bad_steps`` steps in a row with a loss that is not finite end the run.
    ``compile``: one compiled block for all layers of what is trained. ``pack``: beside LoRA on a CPU, keep
    frozen weights in the order of its matrix products, once for each pass: faster, and one more copy.
    """

    section = "train"
    objective: Annotated[Component, Makes("sat.train.objectives.Objective")]
    steps: int
    batch_size: int = 1
    accumulate: int = 1
    dtype: Precision = "fp32"
    autocast: Literal["bf16"] | None = None
    zero: Literal[0, 1, 2, 3] = 0
    offload: OffloadConfig = field(default_factory=OffloadConfig)
    optimizer: Annotated[Component, Makes("torch.optim.Optimizer")] = Component("torch.optim.AdamW")
    lr: float = 1e-4
    schedule: Literal["constant", "cosine"] = "constant"
    warmup: int = 0
    min_lr_ratio: float = 0.0
    weight_decay: float = 0.0
    clip: float | None = 1.0
    ema: float | None = None
    activation_checkpointing: bool = False
    seed: int = 0
    log_every: int = 10
    save_every: int = 1000
    keep_last: int = 2
    background_save: bool = False
    sample_every: int | None = None
    sample_prompts: list[str] = field(default_factory=list)
    validate_every: int | None = None
    max_minutes: float | None = None
    max_bad_steps: int = 20
    wandb: Literal["offline", "online", "disabled"] = "offline"
    tensorboard: bool = False
    peak_tflops: float | None = None
    project: str = "cogview3"
    allocator: bool = True
    pack: bool = True
    attention: Literal["auto", "torch"] = "auto"
    compile: bool = False
    init_from: CheckpointConfig | None = None

    def _rules(self) -> Broken:
        counts = ("steps", "batch_size", "accumulate", "log_every", "save_every", "keep_last")
        yield from self._at_least_1(*counts, "sample_every", "validate_every", "max_bad_steps")
        yield from self._ranges()
        if self.autocast is not None and self.dtype != "fp32":
            yield "autocast", f"computes in bf16 with `dtype` fp32 weights, but `dtype` is {self.dtype}"
        if self.dtype != "fp32" and self.zero == 0:
            yield (
                "zero",
                f"`dtype` {self.dtype} needs 1, 2 or 3, which keep float32 masters of the weights; got 0",
            )
        if self.offload.optimizer and self.zero == 0:
            yield "offload", "`optimizer` needs `zero` 1, 2 or 3, which keep the optimizer apart; got 0"
        if self.offload.parameters and self.zero != 3:
            yield "offload", f"`parameters` needs `zero` 3, which shares out the weights; got {self.zero}"
        if self.sample_every is not None and not self.sample_prompts:
            yield "sample_prompts", "`sample_every` is set but there is no prompt to sample"

    def _ranges(self) -> Broken:
        ranges = {
            "warmup": (0 <= self.warmup <= self.steps, f"0 to `steps` ({self.steps})"),
            "lr": (self.lr > 0, "more than 0"),
            "min_lr_ratio": (0 <= self.min_lr_ratio <= 1, "0 to 1"),
            "weight_decay": (self.weight_decay >= 0, "at least 0"),
            "clip": (self.clip is None or self.clip > 0, "more than 0 or null"),
            "ema": (self.ema is None or 0 <= self.ema < 1, "a decay of at least 0 and below 1, or null"),
            "peak_tflops": (self.peak_tflops is None or self.peak_tflops > 0, "more than 0 or null"),
            "max_minutes": (self.max_minutes is None or self.max_minutes > 0, "more than 0 minutes or null"),
        }
        for name, (holds, expected) in ranges.items():
            if not holds:
                yield name, f"expected {expected}, got {getattr(self, name)}"

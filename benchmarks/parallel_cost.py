"""What parallel layouts of CogView3-Plus cost, computed: operations and bytes sent over given rates.

    python benchmarks/parallel_cost.py [--accumulate 4]

Nothing here is measured. Volumes are exact counts of what ``sat/parallel`` sends (``bench_parallel.py``
counts the same on real ranks); seconds are those volumes over the rates of :class:`Gpu`: peaks times
assumed shares, printed with the tables. L = text + image tokens, D width, R rows in the network (2 with
classifier-free guidance), t, s, g, d the tensor, sequence, guidance and data ranks. A layer needs
24 L D^2 + 4 L^2 D operations a row; of each rank it sends, in a forward pass,

    tensor     2 all-reduces of R L D elements:  2 (t - 1) / t each
    sequence   2 all-to-alls, of q, k, v and of the output:  4 R (L / s) D (s - 1) / s
    guidance   once a step, not a layer: its half of the prediction
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from itertools import product

HALF = 2  # bytes of a bf16 element


@dataclass(frozen=True)
class Gpu:
    """One GPU of a node of ``node``, H100 SXM class. Rates: peak times the share taken to be attained."""

    matmul: float = 0.65 * 989e12  # dense bf16 operations a second
    attention: float = 0.30 * 989e12  # head size 40 fills 40 of the 64 lanes that kernels compute
    memory: float = 0.70 * 3.35e12  # bytes a second
    inside: float = 0.75 * 450e9  # NVLink, bytes a second and direction
    between: float = 0.75 * 50e9  # 400 Gb/s InfiniBand for each GPU
    start: float = 15e-6  # seconds before a collective moves its first byte, inside a node
    node: int = 8


@dataclass(frozen=True)
class Model:
    """CogView3-Plus-3B."""

    dim: int = 2560
    depth: int = 30
    text: int = 224
    trained: float = 2.849e9
    split: float = 0.994  # of the weights, shared out by tensor ranks: embeddings and the head are whole
    channels: int = 16
    passes: int = 14  # times a layer's norms, modulations and residuals touch (L, D) in memory

    def tokens(self, side: int) -> int:
        """Text and patches of a picture of ``side`` x ``side`` pixels: a patch is 16 pixels."""
        return self.text + (side // 16) ** 2


@dataclass(frozen=True)
class Layout:
    """Ranks along each axis of the mesh."""

    tensor: int = 1
    sequence: int = 1
    guidance: int = 1
    data: int = 1

    @property
    def inner(self) -> int:
        """Ranks that make one picture together."""
        return self.tensor * self.sequence * self.guidance

    def __str__(self) -> str:
        names = ("guidance", "sequence", "tensor", "data")
        return (
            " x ".join(f"{name} {getattr(self, name)}" for name in names if getattr(self, name) > 1) or "one"
        )


@dataclass(frozen=True)
class Cost:
    """One forward pass: seconds of each kind on the busiest rank, bytes that a rank sends."""

    compute: float
    glue: float
    tensor: float
    sequence: float
    guidance: float
    sent: float

    @property
    def seconds(self) -> float:
        """All of them one after the other: nothing is taken to overlap."""
        return self.compute + self.glue + self.tensor + self.sequence + self.guidance


def forward(model: Model, gpu: Gpu, layout: Layout, rows: int, side: int) -> Cost:
    """Cost of one look of the network at ``rows`` rows of ``side`` x ``side`` pixels."""
    t, s, g = layout.tensor, layout.sequence, layout.guidance
    length, dim = model.tokens(side), model.dim
    rows = -(-rows // g)
    products = 24 * length * dim**2 / gpu.matmul + 4 * length**2 * dim / gpu.attention
    state = rows * (length / s) * dim * HALF
    reduced = 2 * 2 * (t - 1) / t * state
    exchanged = 4 * (s - 1) / s * state / t
    wide = 0 if g == 1 else rows * model.channels * (side // 8) ** 2 * 4
    link = gpu.inside if layout.inner <= gpu.node else gpu.between
    depth = model.depth
    return Cost(
        depth * rows * products / (t * s),
        depth * model.passes * state / gpu.memory,
        depth * (reduced / link + (2 * gpu.start if t > 1 else 0)),
        depth * (exchanged / link + (2 * gpu.start if s > 1 else 0)),
        wide / link + (gpu.start if g > 1 else 0),
        depth * (reduced + exchanged) + wide,
    )


@dataclass(frozen=True)
class Step:
    """One optimizer step of full fine-tuning: seconds, and bytes a rank keeps."""

    seconds: float
    images: int
    reducing: float  # of the seconds, those that go into gradients and weights
    kept: float


def train(model: Model, gpu: Gpu, layout: Layout, side: int, batch: int, accumulate: int) -> Step:
    """SFT with ZeRO 2, blocks recomputed, latents and text from caches: four forwards' work a micro-batch."""
    once = forward(model, gpu, replace(layout, guidance=1), batch, side)
    own = model.trained * (1 - model.split * (1 - 1 / layout.tensor))
    ranks = layout.data * layout.sequence
    link = gpu.inside if ranks * layout.tensor <= gpu.node else gpu.between
    reducing = 2 * own * HALF * (ranks - 1) / ranks / link  # gradients scattered, weights gathered
    kept = own * (HALF + HALF / ranks + 16 / ranks)  # weights, gradients, masters + Adam + EMA
    kept += model.depth * batch * model.tokens(side) / layout.sequence * model.dim * HALF
    return Step(4 * accumulate * once.seconds + reducing, batch * accumulate * layout.data, reducing, kept)


def layouts(ranks: int, axes: tuple[str, ...]) -> list[Layout]:
    """All ways to lay ``ranks`` out along ``axes`` in powers of two; at most 2 for guidance."""
    powers = [2**i for i in range(ranks.bit_length())]
    found = []
    for sizes in product(powers, repeat=len(axes)):
        layout = Layout(**dict(zip(axes, sizes, strict=True)))
        if layout.inner * layout.data == ranks and layout.guidance <= 2:
            found.append(layout)
    return found


def sampling_table(model: Model, gpu: Gpu, side: int, largest: int = 8) -> list[str]:
    """Every layout of up to one node for one guided picture of ``side`` pixels, the fastest first."""
    base = forward(model, gpu, Layout(), 2, side).seconds
    lines = [
        "| GPUs | layout | ms a step | speed-up | of it sending, ms | MB sent a rank and step |",
        "|---|---|---|---|---|---|",
    ]
    ranks = 1
    while ranks <= largest:
        costs = [
            (forward(model, gpu, one, 2, side), one)
            for one in layouts(ranks, ("tensor", "sequence", "guidance"))
        ]
        for cost, layout in sorted(costs, key=lambda pair: pair[0].seconds)[:3]:
            sending = cost.tensor + cost.sequence + cost.guidance
            lines.append(
                f"| {ranks} | {layout} | {1e3 * cost.seconds:.1f} | {base / cost.seconds:.2f} | "
                f"{1e3 * sending:.1f} | {cost.sent / 1e6:,.0f} |"
            )
        ranks *= 2
    return lines


def training_table(model: Model, gpu: Gpu, side: int, accumulate: int) -> list[str]:
    """The three fastest layouts of 8, 16 and 64 GPUs for SFT at ``side`` pixels, that fit 80 GB."""
    lines = [
        "| GPUs | layout | images a second | of linear | of a step reducing, ms | kept a rank, GB |",
        "|---|---|---|---|---|---|",
    ]
    one = train(model, gpu, Layout(), side, 1, accumulate)
    linear = one.images / (one.seconds - one.reducing)
    for ranks in (8, 16, 64):
        steps = [
            (train(model, gpu, x, side, 1, accumulate), x)
            for x in layouts(ranks, ("tensor", "sequence", "data"))
        ]
        fitting = [pair for pair in steps if pair[0].kept < 72e9]
        for step, layout in sorted(fitting, key=lambda pair: -pair[0].images / pair[0].seconds)[:3]:
            rate = step.images / step.seconds
            lines.append(
                f"| {ranks} | {layout} | {rate:.1f} | {rate / linear / ranks:.2f} | "
                f"{1e3 * step.reducing:.0f} | {step.kept / 1e9:.1f} |"
            )
    return lines


def main() -> int:
    """Print the tables of docs/parallel.md."""
    reader = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    reader.add_argument(
        "--accumulate", type=int, default=1, help="micro-batches of one image a training step"
    )
    args = reader.parse_args()
    model, gpu = Model(), Gpu()
    print(gpu)
    for side in (1024, 2048):
        print(f"\none picture of {side} x {side}, guided, {model.tokens(side)} tokens\n")
        print("\n".join(sampling_table(model, gpu, side)))
    for side in (1024, 2048):
        print(f"\nSFT at {side} x {side}, ZeRO 2, one image a GPU, {args.accumulate} micro-batches a step\n")
        print("\n".join(training_table(model, gpu, side, args.accumulate)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

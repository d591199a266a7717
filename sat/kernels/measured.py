"""Choices among ways on a CPU that are as right and differ in speed by processor: measured, and kept.

A short measurement on the shapes in use decides, never a processor's name. An answer is kept in the user's
cache folder, a file a question, so that the next run of the same processor and torch draws the same bytes;
what a run chose stands in its resolved.yaml. ``SAT_MEASURE=0`` measures nothing: every answer is the usual
one.
"""

from __future__ import annotations

import copy
import errno
import functools
import hashlib
import json
import logging
import math
import os
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sat.first_stage.model import Decoder
from sat.kernels.exp_attention import heads_apart, heads_back, works
from sat.kernels.packed import (
    PackedFeedForward,
    PackedLinear,
    SigmoidFeedForward,
    packable,
    product,
    reordered,
)
from sat.transformer.transformer import FeedForward
from sat.util.host import read_bounded, write_text

log = logging.getLogger(__name__)

Work = Callable[[], object]
"""One sample of a way."""

VARIABLE = "SAT_MEASURE"
MARGIN = 0.95
"""Another way than the usual one must take less than this share of its time."""
SECONDS, LEAST_ROUNDS, MOST_ROUNDS = 0.1, 3, 15
"""Of one measurement, by the last clock, after a round that warms up."""
ROWS, WIDTH, KEYS, HEADS = 1024, 768, 4096, 4
"""Larger layers are measured at these sizes."""
MOST_PRODUCTS = 1.5e10
"""Multiplications of a layer above which folding is not measured: half a second a sample."""
FOLD_FROM = 512
"""Tokens from which two passes without the repeated ones can be faster than one with them."""
SHORTEST = 384
"""Keys below which starting two matrix products a head costs more than they save."""
CHANNELS, PIXELS = 256, 128
"""Wider autoencoders are not measured: their products take nearly all, and packing them takes a second and
memory. Larger pictures are measured at this side."""


# -- a question, its answer on disk, and the measurement between them


Clock = Callable[[], float]


def fastest(
    question: str,
    usual: str,
    other: str,
    make: Callable[[], Mapping[str, Work]],
    clocks: Sequence[Clock] = (time.perf_counter, time.process_time),
) -> str:
    """The faster of the ways ``usual`` and ``other``, by name, as it was measured here before or is now.

    ``make`` gives one sample of each way. ``other`` must be faster by every clock, seconds on the wall and of
    the processor: other programs' work moves one of them. Where no answer can be kept it is ``usual``, as
    another could differ from run to run.
    """
    if os.environ.get(VARIABLE) == "0":
        return usual
    asked = {**here(), "question": question}
    text = json.dumps(asked, sort_keys=True)
    file = cache_folder() / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"
    if (known := _kept(file, asked, (usual, other))) is not None:
        return known
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(file.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file.parent))
        times = least_times(make(), clocks)
        faster = all(b < MARGIN * a for a, b in zip(times[usual], times[other], strict=True))
        choice = other if faster else usual
        if (known := _kept(file, asked, (usual, other))) is not None:  # another process was first
            return known
        shown = {name: round(1000 * seconds[0], 3) for name, seconds in times.items()}
        write_text(file, json.dumps({**asked, "choice": choice, "ms": shown}, indent=1) + "\n")
    except OSError as error:
        _tell_unkept(str(error))
        return usual
    log.debug("measured once: %s: %s (ms: %s)", question, choice, shown)
    return choice


def least_times(ways: Mapping[str, Work], clocks: Sequence[Clock]) -> dict[str, list[float]]:
    """Least seconds of each way by each clock; the ways take turns, as what else runs slows some samples."""
    for work in ways.values():
        work()
    least = {name: [math.inf] * len(clocks) for name in ways}
    begun, rounds = clocks[-1](), 0
    while rounds < LEAST_ROUNDS or (rounds < MOST_ROUNDS and clocks[-1]() - begun < SECONDS):
        for name, work in ways.items():
            starts = [clock() for clock in clocks]
            work()
            taken = [clock() - start for clock, start in zip(clocks, starts, strict=True)]
            least[name] = [min(pair) for pair in zip(least[name], taken, strict=True)]
        rounds += 1
    return least


def cache_folder() -> Path:
    """Folder of the answers, in the user's cache."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "cogview3-sat" / "cpu"


@functools.cache
def here() -> dict[str, str]:
    """Facts that an answer holds for: the processor, what limits its instructions, and torch.

    They tell one processor from another, as a home folder may be shared; nothing is chosen by them.
    """
    facts = dict(re.findall(r"^([\w ]+?)\s*: (.*)$", _processors().partition("\n\n")[0], re.MULTILINE))
    same = [value for name, value in facts.items() if name not in _CHANGING]
    limits = [f"{name}={os.environ[name]}" for name in _LIMITS if name in os.environ]
    about = " ".join((platform.machine(), platform.processor(), *same, *limits))
    return {
        "processor": hashlib.sha256(about.encode()).hexdigest()[:16],
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }


_CHANGING = frozenset({"processor", "cpu MHz", "bogomips", "BogoMIPS", "core id", "apicid", "initial apicid",
                       "physical id", "siblings", "cpu cores", "microcode"})  # fmt: skip
_LIMITS = (
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "ATEN_CPU_CAPABILITY",
    "MKL_ENABLE_INSTRUCTIONS",
    "MKL_CBWR",
)


def _processors() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def _kept(file: Path, asked: Mapping[str, str], names: tuple[str, ...]) -> str | None:
    """The answer in ``file``; None if there is none, it is damaged, or of another question or machine."""
    try:
        found: Any = json.loads(read_bounded(file, 1 << 16))
        same = all(found[name] == value for name, value in asked.items())
        return found["choice"] if same and found["choice"] in names else None
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        return None


@functools.cache
def _tell_unkept(reason: str) -> None:
    log.warning(
        "ways on the CPU are not measured, as no answer can be kept in %s (%s): the usual ways are taken. "
        "Set XDG_CACHE_HOME to a folder that can be written, or name sampling.pack, fold, attention and "
        "convolutions",
        cache_folder(),
        reason,
    )


# -- the questions


@dataclass(frozen=True)
class Layer:
    """Sizes of one transformer layer in use, whole: ``rows`` of ``text`` and ``image`` tokens."""

    dim: int
    hidden: int
    head_dim: int
    rows: int
    text: int
    image: int
    dtype: torch.dtype

    @property
    def tokens(self) -> int:
        """Of one row."""
        return self.text + self.image

    def linears(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of the layer's products, no wider than :data:`WIDTH`."""
        cut = max(1.0, self.dim / WIDTH)
        dim, hidden = int(self.dim / cut), int(self.hidden / cut)
        return [(dim, 3 * dim), (dim, dim), (dim, hidden), (hidden, dim)]

    def __str__(self) -> str:
        return (
            f"{self.dim} x {self.hidden}, heads of {self.head_dim}, {self.rows} x {self.text} + {self.image} "
            f"tokens, {str(self.dtype).removeprefix('torch.')}"
        )


def packs(layer: Layer, *, trains: bool = False) -> bool:
    """True if products with packed weights are faster; ``trains``: forwards and to the input's gradient."""
    if not packable(layer.dtype):
        return False

    def make() -> Mapping[str, Work]:
        rows, gelu = min(ROWS, layer.rows * layer.tokens), None if trains else 2  # the product GELU follows
        weights = [_some(o, i, dtype=layer.dtype, fan=i) for i, o in layer.linears()]
        weights += [w.t() for w in weights if trains]
        inputs = [_some(rows, w.shape[1], dtype=layer.dtype) for w in weights]
        packed = [reordered(w) for w in weights]

        def plain() -> None:
            for n, (x, w) in enumerate(zip(inputs, weights, strict=True)):
                out = F.linear(x, w)
                if n == gelu:
                    F.gelu(out, approximate="tanh")

        def ours() -> None:
            for n, (x, w) in enumerate(zip(inputs, packed, strict=True)):
                product(x, w, None, *(("gelu", "tanh") if n == gelu else ()))

        return {"packed": _inference(ours), "plain": _inference(plain)}

    what = "frozen weights, both ways" if trains else "weights"
    return fastest(f"{what}: {layer}", "packed", "plain", make) == "packed"


def sigmoid(layer: Layer, *, packed: bool) -> bool:
    """True if GELU after the product, by a sigmoid, is faster than by tanh, in its pass where ``packed``."""
    if layer.dtype != torch.float32:
        return False

    def make() -> Mapping[str, Work]:
        inputs, hidden = layer.linears()[2]
        x = _some(min(ROWS, layer.rows * layer.tokens), inputs, dtype=layer.dtype)
        linear = nn.Linear(inputs, hidden, bias=False)
        linear.weight = nn.Parameter(_some(hidden, inputs, dtype=layer.dtype, fan=inputs), False)
        made = PackedLinear(linear) if packed else linear
        with torch.device("meta"):
            plain = FeedForward(inputs, hidden, gated=False, bias=False)
        tanh, logistic = PackedFeedForward(plain), SigmoidFeedForward(plain)
        return {
            "tanh": _inference(lambda: tanh.activated(made, x)),
            "sigmoid": _inference(lambda: logistic.activated(made, x)),
        }

    return fastest(f"GELU: {layer}{', packed' * packed}", "tanh", "sigmoid", make) == "sigmoid"


def attention(layer: Layer, *, trains: bool = False) -> str:
    """``exp`` or ``torch``, for logits that are known to be small; ``trains``: forwards and backwards."""
    if layer.tokens < SHORTEST or not works(layer.dtype) or (trains and layer.dtype != torch.float32):
        return "torch"

    def make() -> Mapping[str, Work]:
        keys = min(KEYS, layer.tokens)
        heads = min(HEADS * torch.get_num_threads(), layer.rows * max(1, layer.dim // layer.head_dim))
        sizes = [(1, heads, length, layer.head_dim) for length in (min(ROWS, keys), keys, keys)]
        normal = [F.layer_norm(_some(*size, dtype=layer.dtype), sizes[0][3:]) for size in sizes]
        q, k, v = (x.requires_grad_(trains) for x in normal)
        scale = layer.head_dim**-0.5

        def by_torch() -> None:
            out = F.scaled_dot_product_attention(q, k, v, scale=scale)
            if trains:
                torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

        def ours() -> None:
            out, sums = heads_apart(q, k, v, scale)
            if trains:
                heads_back(torch.ones_like(out), q, k, v, out, sums, scale)

        return {"torch": by_torch if trains else _inference(by_torch), "exp": _inference(ours)}

    usual = usual_attention(layer.dtype)
    other = "torch" if usual == "exp" else "exp"
    return fastest(f"attention{' and its gradient' * trains}: {layer}", usual, other, make)


def usual_attention(dtype: torch.dtype) -> str:
    """Kernel for small logits where nothing is measured: ``exp`` in bfloat16, which it was made for."""
    return "exp" if dtype == torch.bfloat16 and works(dtype) else "torch"


def folds(layer: Layer, *, packed: bool, kernel: str) -> bool | Literal["ragged"]:
    """True if a step is faster by two passes, one of them with a single text token, than by one with all.

    Of layers that take long the products decide, which the repeated tokens are spared: nothing is measured.
    Of few tokens ``ragged`` if one pass of all rows end to end, half of them with a single text token, is
    faster than one with all.
    """
    if not layer.text:
        return False
    short = layer.tokens < FOLD_FROM
    products = layer.rows * layer.tokens * sum(i * o for i, o in layer.linears())
    if layer.dim > WIDTH or products > MOST_PRODUCTS:
        return not short

    def make() -> Mapping[str, Work]:
        weights = [_some(o, i, dtype=layer.dtype, fan=i) for i, o in layer.linears()]
        linears = [
            functools.partial(product, packed=reordered(w), bias=None)
            if packed
            else functools.partial(F.linear, weight=w)
            for w in weights
        ]

        def block(x: Tensor, repeats: int, bias: Tensor | None = None) -> Tensor:
            """A layer of the usual kind, ``repeats`` keys for its first; ``bias`` (L, L): of the logits."""
            qkv, proj, up, down = linears
            size = x.shape[-1]
            h = F.layer_norm(x, (size,)).mul_(0.5).add_(0.1)
            q, k, v = qkv(h).view(*x.shape[:2], 3, -1, layer.head_dim).permute(2, 0, 3, 1, 4)
            q, k = (F.layer_norm(t, (layer.head_dim,)) for t in (q, k))
            if repeats:
                k, v = (torch.cat([t[:, :, :1].expand(-1, -1, repeats, -1), t], 2) for t in (k, v))
            exp, scale = kernel == "exp" and bias is None, layer.head_dim**-0.5
            out = heads_apart(q, k, v, scale)[0] if exp else F.scaled_dot_product_attention(q, k, v, bias)
            x = proj(out.transpose(1, 2).reshape(x.shape)).mul_(0.5).add_(x)
            h = F.layer_norm(x, (size,)).mul_(0.5).add_(0.1)
            return down(F.gelu(up(h), approximate="tanh")).mul_(0.5).add_(x)

        whole, one = (
            _some(n, length, layer.dim, dtype=layer.dtype)
            for n, length in ((layer.rows, layer.tokens), (layer.rows // 2, 1 + layer.image))
        )
        rest = whole[: layer.rows - layer.rows // 2]
        if short:
            joined = torch.cat([one.flatten(0, 1), rest.flatten(0, 1)])[None]  # (1, L, D)
            owner = torch.arange(layer.rows).repeat_interleave(
                torch.tensor([one.shape[1]] * len(one) + [layer.tokens] * len(rest))
            )
            apart = torch.zeros(len(owner), len(owner), dtype=layer.dtype)
            apart.masked_fill_(owner[:, None] != owner, float("-inf"))
            return {
                "ragged": _inference(lambda: block(joined, 0, apart)),
                "whole": _inference(lambda: block(whole, 0)),
            }
        return {
            "folded": _inference(lambda: (block(one, layer.text - 1), block(rest, 0))),
            "whole": _inference(lambda: block(whole, 0)),
        }

    question = f"text tokens: {layer}, {kernel}{', packed' * packed}"
    if short:
        return "ragged" if fastest(question, "whole", "ragged", make) == "ragged" else False
    return fastest(question, "folded", "whole", make) == "folded"


@dataclass(frozen=True)
class Maps:
    """Sizes of an autoencoder in use: channels of its levels, finest first; ``side``: pixels of a picture."""

    widths: tuple[int, ...]
    groups: int
    side: int

    def __str__(self) -> str:
        return f"{list(self.widths)} channels, {self.groups} groups, {self.side} pixels"


def convolutions(maps: Maps) -> Literal["packed", "plain"]:
    """``packed`` if the decoder of a float32 autoencoder is faster with its convolutions packed."""
    if max(maps.widths) > CHANNELS:
        return "plain"

    def make() -> Mapping[str, Work]:
        from sat.kernels.convolutions import convolvable, pack_convolutions

        with torch.device("meta"):
            plain = Decoder(maps.widths, blocks=1, groups=maps.groups, latent_channels=4).eval()
        for layer in plain.modules():
            for name, p in [*layer.named_parameters(recurse=False)]:
                some = _some(*p.shape, dtype=torch.float32, fan=p[0].numel())
                setattr(layer, name, nn.Parameter(some, requires_grad=False))
        packed = copy.deepcopy(plain)
        if convolvable():
            pack_convolutions(packed)
        cells = max(1, min(maps.side, PIXELS) >> (len(maps.widths) - 1))
        latent = _some(1, 4, cells, cells, dtype=torch.float32)
        return {"plain": _inference(lambda: plain(latent)), "packed": _inference(lambda: packed(latent))}

    return "packed" if fastest(f"convolutions: {maps}", "plain", "packed", make) == "packed" else "plain"


def convolves(dtype: torch.dtype) -> bool:
    """True if oneDNN convolves in the 16-bit ``dtype`` here; torch's own loops take buffers besides."""
    names = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    try:
        return bool(getattr(torch.ops.mkldnn, names[dtype])())
    except AttributeError:  # a torch that does not say
        return True


def slow(dtype: torch.dtype) -> bool:
    """True if this CPU is faster in float32 than in ``dtype``, in a matrix product and a convolution.

    Where oneDNN has no fast way in ``dtype`` nothing is measured: torch's loops take 5 to 170 times as long.
    """
    if not convolves(dtype):
        return True

    def works_in(dtype: torch.dtype) -> Work:
        x, weight = _some(256, 512, dtype=dtype), _some(1024, 512, dtype=dtype, fan=512)
        image, kernel = _some(1, 64, 24, 24, dtype=dtype), _some(64, 64, 3, 3, dtype=dtype, fan=576)
        return _inference(lambda: (F.linear(x, weight), F.conv2d(image, kernel)))

    name = str(dtype).removeprefix("torch.")
    ways = lambda: {name: works_in(dtype), "float32": works_in(torch.float32)}  # noqa: E731 - two words
    return fastest("types of numbers", name, "float32", ways) == "float32"


def _some(*size: int, dtype: torch.dtype, fan: int = 1) -> Tensor:
    """Normal values over the root of ``fan``, as layers have them: GELU and exp take longer for large ones.

    Of a generator of their own: the state of torch's is the run's.
    """
    return torch.randn(size, generator=torch.Generator().manual_seed(0)).div_(math.sqrt(fan)).to(dtype)


def _inference(work: Callable[[], object]) -> Work:
    def run() -> None:
        with torch.inference_mode():
            work()

    return run

"""Running a transformer faster from outside: one compiled block, packed linears, a CUDA graph."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sat.kernels.packed import Packable, PackedLinear, packable
from sat.transformer.attention import Attention, FeedForward
from sat.transformer.context import Context, LayerModulation
from sat.transformer.hooks import TransformerHooks
from sat.transformer.transformer import Transformer, call_block

log = logging.getLogger(__name__)


def pack(model: nn.Module) -> int:
    """Replace the linears of all attention and feed-forward layers in ``model``; how many there were.

    Only plain and split layers on the CPU, in a type that oneDNN multiplies fast here; adapted and quantised
    ones stay what they are, and so do packed ones.
    """
    count = 0
    for module in [m for m in model.modules() if isinstance(m, (Attention, FeedForward))]:
        for name, child in [(n, c) for n, c in module.named_children() if not isinstance(c, PackedLinear)]:
            if not (type(child) is nn.Linear or isinstance(child, Packable)):
                continue
            if child.weight.device.type == "cpu" and packable(child.weight.dtype):
                made = child.packed() if isinstance(child, Packable) else PackedLinear(child)
                setattr(module, name, made)
                count += 1
    return count


@dataclass(frozen=True)
class CompiledBlock:
    """Calls every block through one compiled function, so that what is compiled for one layer serves all.

    Modulations are computed outside and handed in; a block then depends on its number only through hooks.
    ``alike``: no hook here looks at that number, and all layers are layer 0 to the compiler. Otherwise it
    makes one graph a layer. Sizes are compiled as they come: a new one compiles again.
    """

    function: Callable[..., Tensor]
    alike: bool

    def __call__(
        self,
        block: nn.Module,
        x: Tensor,
        ctx: Context,
        layer: int,
        hooks: TransformerHooks,
        modulation: LayerModulation | None,
    ) -> Tensor:
        ctx = replace(ctx, image=None, emb=None, text=None, tokens=None, table=None, modulation=None)
        return self.function(block, x, ctx, 0 if self.alike else layer, hooks, modulation)


def compile_blocks(transformer: Transformer, *, alike: bool, **options: Any) -> None:
    """Let ``transformer`` run its blocks compiled; ``options`` go to ``torch.compile``."""
    compiled = torch.compile(call_block, dynamic=False, **options)
    transformer.run_block = CompiledBlock(compiled, alike)


class Recording(NamedTuple):
    """A recorded pass: where its inputs lie, how it is run again, and where its output appears."""

    context: Context  # whose tensors are the recorded ones
    run: Callable[[], None]
    out: Tensor


Record = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
"""(work) -> how to repeat it on the same memory, and where its result appears."""


class Replay:
    """A transformer's pass recorded once for each shape of its context, then replayed: no launches between.

    Worth it where a step is bound by launching kernels: small pictures on a fast GPU. Inputs are copied into
    the recorded tensors, those of a step at each step, others when they are another picture's. ``record``
    makes the recording.
    """

    def __init__(self, transformer: Transformer, record: Record) -> None:
        self.transformer, self.record = transformer, record
        self.recorded: dict[Any, Recording] = {}
        self._copied: dict[Any, tuple[Tensor, ...]] = {}

    def __call__(self, ctx: Context) -> Tensor:
        given = tuple(_tensors(ctx))
        key = (ctx.grid, ctx.text_len, tuple((t.shape, t.dtype, t.device) for t in given))
        if key not in self.recorded:
            kept: Context = _mapped(ctx, torch.clone)
            run, out = self.record(lambda: self.transformer.run(kept))
            self.recorded[key] = Recording(kept, run, out)
        else:
            last = self._copied[key]
            pairs = zip(_tensors(self.recorded[key].context), given, last, strict=True)
            fresh = [(to, now) for to, now, before in pairs if now is not before]
            if fresh:
                torch._foreach_copy_([to for to, _ in fresh], [now for _, now in fresh])
        self._copied[key] = given
        recording = self.recorded[key]
        recording.run()
        return recording.out.clone()


def cuda_record(work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """``work`` as a CUDA graph, after the warm-up on a side stream that recording asks for."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = work()
    return graph.replay, out


def replayed(transformer: Transformer, device: torch.device) -> None:
    """Let ``transformer`` replay its pass as a CUDA graph. Raises where there is no GPU."""
    if device.type == "cpu" or not torch.cuda.is_available():
        raise ValueError(
            "sampling.graphs records CUDA graphs, but the network is on the CPU: set it to false"
        )
    transformer.replay = Replay(transformer, cuda_record)


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested dataclasses and tuples, in order."""
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))
    elif isinstance(value, tuple):
        for item in value:
            yield from _tensors(item)


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with ``change`` applied to its tensors."""
    if isinstance(value, Tensor):
        return change(value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _mapped(getattr(value, f.name), change) for f in fields(value)})
    if isinstance(value, tuple):
        items = [_mapped(item, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value

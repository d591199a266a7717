"""Compiled blocks, recomputed activations and recorded passes, put on a transformer from outside."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import checkpoint

from sat.errors import UserError
from sat.mixin import Mixin, replaces, wraps
from sat.mixins.cross_attention import CrossAttention
from sat.parallel.tensor import ShareOfDropout
from sat.transformer import Context, Transformer, TransformerHooks
from sat.transformer.hooks import Layer, LayerModulation, Run

# -- one compiled block


GRAPHS = 32
"""Graphs that one kind of layer may need: widths, sizes, and passes with and without gradients."""


class CompileError(UserError, RuntimeError):
    """The compiler gave up, and the rest would run uncompiled."""

    exit_code = 1


class CompiledBlocks(Mixin):
    """Calls every block through one compiled function, so that what is compiled for one layer serves all.

    Modulations are computed outside and handed in, and so is a layer's own cross-attention; a block then
    depends on its number only through other hooks. ``alike``: none of them looks at that number, and all
    layers are layer 0 to the compiler. Otherwise it makes one graph a layer.
    """

    host = TransformerHooks

    def __init__(self, transformer: Transformer, function: Callable[..., Tensor], alike: bool) -> None:
        super().__init__()
        own = dict(transformer.mixins.items()).get(transformer.resolved.owners["cross"][-1])
        crosses = [own.single(layer) for layer in own.layers] if isinstance(own, CrossAttention) else []
        self._host = (transformer, crosses if alike else [])  # in a tuple: not registered inside itself
        self.function, self.alike = function, alike

    @replaces("layer")
    def layer(self, x: Tensor, ctx: Context, layer: int) -> Tensor:
        transformer, crosses = self._host
        hooks, modulation = transformer.hooks, transformer.modulation(ctx, layer)
        ctx = replace(ctx, image=None, emb=None, text=None, tokens=None, table=None, modulation=None)
        if crosses and ctx.text_kv is not None:
            hooks = replace(hooks, cross=crosses[layer].cross)
            ctx = replace(ctx, text_kv=(ctx.text_kv[layer],))
        number = 0 if self.alike else layer
        try:
            return self.function(transformer.blocks[layer], x, ctx, number, hooks, modulation)
        except Exception as error:
            if not type(error).__name__.startswith("FailOn"):  # the class moves between versions of torch
                raise
            raise CompileError(
                f"sampling.compile (train.compile in training): the compiler gave up at its "
                f"{torch._dynamo.config.cache_size_limit}th graph, blocks would run uncompiled: set it to "
                f"false, or see with TORCH_LOGS=recompiles what differs from call to call"
            ) from error


_WARNS = logging.getLogger("torch._dynamo.convert_frame")


class FailOnLimit(RuntimeError):
    """The compiler reached its limit of graphs."""


class _Limit(logging.Handler):
    """Makes an error of the compiler's warning about its limit; torch 2.5 has no setting for that."""

    def emit(self, record: logging.LogRecord) -> None:
        if "hit config." in record.getMessage():
            raise FailOnLimit(record.getMessage())


def compile_blocks(transformer: Transformer, *, alike: bool, **options: Any) -> None:
    """Let ``transformer`` run its blocks compiled; ``options`` go to ``torch.compile``.

    The first size is compiled as it is, the second with a free number of tokens, which serves all others. A
    transformer whose ``layer`` hook a mixin of the model's own replaces keeps that.
    """
    if transformer.resolved.owners["layer"][-1] == "default":
        function = torch.compile(_call, **options)
        config = torch._dynamo.config  # under its names before torch 2.6
        needed = GRAPHS * (1 if alike else len(transformer.blocks))
        config.cache_size_limit += needed  # transformers share it, as their blocks share the function
        config.accumulated_cache_size_limit += needed
        if hasattr(config, "fail_on_cache_limit_hit"):
            config.fail_on_cache_limit_hit = True
        elif not any(isinstance(handler, _Limit) for handler in _WARNS.handlers):
            _WARNS.addHandler(_Limit())
        transformer.extend("compiled_blocks", CompiledBlocks(transformer, function, alike))


def _call(
    block: nn.Module,
    x: Tensor,
    ctx: Context,
    layer: int,
    hooks: TransformerHooks,
    modulation: LayerModulation | None,
) -> Tensor:
    out: Tensor = block(x, ctx, layer, hooks, modulation)
    return out


# -- activations recomputed in the backward pass


class Recompute(Mixin):
    """Recomputes each block in the backward pass instead of keeping its activations.

    ``draws``: blocks draw random numbers (dropout), which recomputing must repeat.
    """

    host = TransformerHooks

    def __init__(self, draws: bool) -> None:
        super().__init__()
        self.draws = draws

    @wraps("layer")
    def layer(self, inner: Layer, x: Tensor, ctx: Context, layer: int) -> Tensor:
        if not torch.is_grad_enabled():
            return inner(x, ctx, layer)
        run = partial(checkpoint, inner, use_reentrant=False, preserve_rng_state=self.draws)
        return run(x, ctx, layer)  # type: ignore[no-any-return]


def recompute(module: nn.Module) -> int:
    """Recompute the blocks of every transformer in ``module``; returns their number.

    To be put on after adapters, whose dropout is looked for here.
    """
    found = [transformer for transformer in module.modules() if isinstance(transformer, Transformer)]
    for transformer in found:
        draws = any(isinstance(layer, (_DropoutNd, ShareOfDropout)) for layer in transformer.modules())
        transformer.extend("recompute", Recompute(draws))
    return len(found)


# -- passes recorded once and replayed


RECORDINGS = 8
"""Recordings that are kept, of the sizes drawn last: each has its inputs and output to itself."""


class Recording(NamedTuple):
    """A recorded pass: its inputs' memory, a call that runs it again, and the memory of its output."""

    context: Context  # whose tensors are the recorded ones
    run: Callable[[], None]
    out: Tensor


Record = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
"""(work) -> a call that repeats it on the same memory, and the memory of its result."""


class Recorded(Mixin):
    """A transformer's pass recorded once for each shape of its context, then replayed: no launches between.

    Worth it where a step is bound by launching kernels: small pictures on a fast GPU. Inputs are copied into
    the recorded tensors, those of a step at each step, others when they are another picture's. ``record``
    makes the recording.
    """

    host = TransformerHooks

    def __init__(self, record: Record) -> None:
        super().__init__()
        self.record = record
        self.recordings: dict[Any, Recording] = {}
        self._copied: dict[Any, tuple[Tensor, ...]] = {}

    @wraps("run")
    def run(self, inner: Run, ctx: Context) -> Tensor:
        given = tuple(_tensors(ctx))
        key = (ctx.grid, ctx.segments, ctx.text_repeat, tuple((t.shape, t.dtype, t.device) for t in given))
        if key not in self.recordings:
            kept: Context = _mapped(ctx, torch.clone)
            again, out = self.record(lambda: inner(kept))
            self.recordings[key] = Recording(kept, again, out)
            if len(self.recordings) > RECORDINGS:
                del self._copied[oldest := next(iter(self.recordings))], self.recordings[oldest]
        else:
            last = self._copied[key]
            self.recordings[key] = self.recordings.pop(key)  # to the end: used last
            pairs = zip(_tensors(self.recordings[key].context), given, last, strict=True)
            fresh = [(to, now) for to, now, before in pairs if now is not before]
            if fresh:
                torch._foreach_copy_([to for to, _ in fresh], [now for _, now in fresh])
        self._copied[key] = given
        recording = self.recordings[key]
        recording.run()
        return recording.out.clone()


class CudaRecorder:
    """Records work on ``device`` as CUDA graphs, which share one pool: each is read before the next replays.

    The device need not be the current one; other threads may go on to use it meanwhile.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool: Any = None

    def __call__(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Record ``work``, after the warm-up on a side stream that recording asks for."""
        with torch.cuda.device(self.device):
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    work()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                out = work()
        return partial(self._replay, graph), out

    def _replay(self, graph: torch.cuda.CUDAGraph) -> None:
        with torch.cuda.device(self.device):
            graph.replay()


def replayed(transformer: Transformer, device: torch.device) -> None:
    """Let ``transformer`` replay its pass as a CUDA graph. Raises where there is no GPU."""
    if device.type == "cpu" or not torch.cuda.is_available():
        raise ValueError(
            "sampling.graphs records CUDA graphs, but the network is on the CPU: set it to false"
        )
    transformer.extend("recorded", Recorded(CudaRecorder(device)))


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

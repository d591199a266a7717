"""Rules between sections, checked once each section is sound by itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Final

from torch import nn

from sat.adapters import groups
from sat.config.component import build
from sat.config.parts import build_empty, quantizers
from sat.config.schema import BucketsConfig, Component, Experiment, LoraConfig
from sat.config.targets import resolve, signature
from sat.config.yaml_source import Key, Marks, Problem, dotted, where
from sat.parallel.tensor import check_sharding
from sat.sharding import family_sharding

if TYPE_CHECKING:
    from sat.kernels.quantize import Quantizer

_UNKNOWN: Final = object()


def constraints(experiment: Experiment, marks: Marks) -> list[Problem]:
    """Broken rules between the sections of ``experiment``; without any, what its classes refuse."""
    return [
        Problem(str(where(marks, key)), dotted(key), what)
        for key, what in list(_broken(experiment)) or refusals(experiment)
    ]


def _broken(e: Experiment) -> Iterator[tuple[Key, str]]:
    yield from _equal(e)
    yield from _sizes(e)
    yield from _pictures(e)
    yield from _steps(e)
    yield from _guidance(e)
    yield from _halves(e)
    yield from _adapters(e)
    yield from _memory(e)


def _equal(e: Experiment) -> Iterator[tuple[Key, str]]:
    """Widths and lengths that two parts must agree on."""
    model, text, size = (_reader(e, c) for c in (e.model, e.conditioning.text, e.conditioning.size))
    first = _reader(e, e.first_stage)
    sixfold = size("dim")
    pairs = [
        ("text_len", model("text_len"), "conditioning.max_length", e.conditioning.max_length),
        ("text_dim", model("text_dim"), "conditioning.text.params.dim", text("dim")),
        ("channels", model("channels"), "first_stage.params.latent_channels", first("latent_channels")),
        (
            "size_dim",
            model("size_dim"),
            "6 x conditioning.size.params.dim",
            6 * sixfold if isinstance(sixfold, int) else _UNKNOWN,
        ),
    ]
    for name, ours, other, theirs in pairs:
        if _UNKNOWN not in (ours, theirs) and ours != theirs:
            yield ("model", "params", name), f"{name} {ours} of the model does not fit {other} {theirs}"


def _sizes(e: Experiment) -> Iterator[tuple[Key, str]]:
    """The network and the autoencoder must be able to make every size the rule allows."""
    model, first = _reader(e, e.model), _reader(e, e.first_stage)
    patch, table, multipliers = _granule(model), model("table_size"), first("multipliers")
    if patch is None or multipliers is _UNKNOWN:
        return
    factor = 2 ** (len(multipliers) - 1)
    cell, rule = factor * patch, e.sampling.sizes
    if rule.multiple % cell:
        yield (
            ("sampling", "sizes", "multiple"),
            f"{rule.multiple} is not a multiple of {cell}, the pixels of the network's smallest unit "
            f"({factor} x {patch} latent cells)",
        )
    if e.sampling.tile is not None and e.sampling.tile % patch:
        yield ("sampling", "tile"), f"{e.sampling.tile} is not a multiple of {patch} latent cells"
    if (
        rule.multiple % cell == 0
        and table is not _UNKNOWN
        and _has_table(e.model)
        and rule.max // cell > min(table)
    ):
        yield (
            ("sampling", "sizes", "max"),
            f"{rule.max} pixels are {rule.max // cell} patches, more than the position table {list(table)}",
        )


def _pictures(e: Experiment) -> Iterator[tuple[Key, str]]:
    """Training pictures must divide into latent cells."""
    multipliers = _reader(e, e.first_stage)("multipliers")
    if e.data is None or multipliers is _UNKNOWN:
        return
    factor = 2 ** (len(multipliers) - 1)
    for name, side in (("height", e.data.height), ("width", e.data.width)):
        if side is not None and side % factor:
            yield ("data", name), f"{side} is not a multiple of {factor}, the pixels of one latent cell"
    if e.data.buckets is not None:
        yield from _buckets(e, e.data.buckets, factor)


def _buckets(e: Experiment, buckets: BucketsConfig, factor: int) -> Iterator[tuple[Key, str]]:
    """Every bucket must divide into the network's smallest units, and fit its position table."""
    from sat.data.buckets import BucketRule

    model = _reader(e, e.model)
    cell = factor * (_granule(model) or 1)
    if buckets.step % cell:
        yield (
            ("data", "buckets", "step"),
            f"{buckets.step} is not a multiple of {cell}, the pixels of the network's smallest unit",
        )
        return
    rule = BucketRule(buckets.areas, buckets.step, buckets.max_ratio)
    longest = max(max(size) for area in rule.areas for size in rule.sizes(area))
    table = model("table_size")
    if table is not _UNKNOWN and _has_table(e.model) and longest // cell > min(table):
        yield (
            ("data", "buckets"),
            f"the longest side of a bucket, {longest} pixels, is {longest // cell} patches, more than the "
            f"position table {list(table)}: lower area or max_ratio",
        )


def _granule(model: Any) -> int | None:
    """Latent cells, a side, of the network's smallest unit: a patch, or a cell of a UNet's lowest level."""
    patch, levels = model("patch"), model("multipliers")
    if isinstance(patch, int):
        return patch
    return None if levels is _UNKNOWN else 2 ** (len(levels) - 1)


def _steps(e: Experiment) -> Iterator[tuple[Key, str]]:
    """The schedule and the process must have the steps that are asked for."""
    try:
        process = build(e.diffusion.process, imports=e.imports)
        schedule = build(e.diffusion.schedule, imports=e.imports)
    except (ValueError, TypeError):
        return  # said with the component itself
    try:
        process.hooks.levels(schedule, e.sampling.steps)
    except ValueError as error:
        yield ("sampling", "steps"), str(error)


def _guidance(e: Experiment) -> Iterator[tuple[Key, str]]:
    """A network that takes the guidance strength as an input is guided by it alone, and no other is."""
    takes = _reader(e, e.model)("guidance_dim") not in (_UNKNOWN, None)
    guider = resolve(e.sampling.guider.target, e.imports)
    embedded, unguided = (resolve(f"sat.diffusion.guidance.{n}", ()) for n in ("Embedded", "Unguided"))
    if takes and guider not in (embedded, unguided):
        yield (
            ("sampling", "guider"),
            f"the model takes the guidance strength as an input (guidance_dim), as distilled models do: use "
            f"sat.diffusion.guidance.Embedded instead of {e.sampling.guider.target}, which would guide twice",
        )
    if not takes and guider is embedded:
        yield (
            ("sampling", "guider"),
            "sat.diffusion.guidance.Embedded hands the guidance strength to the network, but this model "
            "takes none (model.params.guidance_dim is null): use ClassifierFree, or a distilled config",
        )


def _halves(e: Experiment) -> Iterator[tuple[Key, str]]:
    """Ranks share the halves of guidance only where a guider has both."""
    guider = e.sampling.guider
    kinds = [resolve(f"sat.diffusion.guidance.{n}", ()) for n in ("Embedded", "Unguided")]
    plain = resolve(guider.target, e.imports) in kinds
    if e.parallel.guidance > 1 and (plain or _reader(e, guider)("scale") == 1):
        scale = "" if plain else " at scale 1"
        yield (
            ("parallel", "guidance"),
            f"{guider.target.rpartition('.')[2]}{scale} looks once at each picture, so there are no halves "
            f"of guidance to share: set it to 1, and the ranks draw different pictures",
        )


def _adapters(e: Experiment) -> Iterator[tuple[Key, str]]:
    """LoRA trains the parts that the objective trains, and an objective that trains those LoRA adapts."""
    lora = e.adapters.lora
    if e.train is not None and lora is None and e.adapters.load and not e.adapters.merge:
        yield (
            ("adapters", "merge"),
            "training whole weights with loaded adapters needs them merged: set it to true",
        )
    if lora is None or e.train is None:
        return
    objective = _reader(e, e.train.objective)
    trains = objective("train_text")
    wants = any(groups.of_text(target) for target in lora.targets)
    if trains is not _UNKNOWN and wants and not trains:
        yield (
            ("adapters", "lora", "targets"),
            "the text encoder is targeted, but the objective does not train it: set "
            "train.objective.params.train_text=true",
        )
    if trains is True and not wants:
        yield (
            ("adapters", "lora", "targets"),
            f"the objective trains the text encoder (train_text), but no target is in it: add text_encoder, "
            f"or set train_text to false (targets: {', '.join(lora.targets)})",
        )
    try:
        rounds = resolve(e.train.objective.target, e.imports).rounds(e.train.objective.params)
    except ValueError:
        return  # said with the objective itself
    if rounds:
        yield (
            ("adapters", "lora"),
            "distillation gives the network a new input, which low-rank factors cannot: set it to null",
        )


def _memory(e: Experiment) -> Iterator[tuple[Key, str]]:
    """What does not go together with ways to save memory and time."""
    memory, sampling = e.memory, e.sampling
    yield from _cache(e)
    if sampling.compile and memory.network == "blocks":
        yield (
            ("memory", "network"),
            "compiled blocks (sampling.compile) cannot come and go one by one: use keep or cpu",
        )
    if sampling.graphs and (memory.network != "keep" or memory.adaln != "keep"):
        yield (
            ("memory", "network"),
            "a recorded pass (sampling.graphs) needs its weights to stay where they are: use keep, also for "
            "memory.adaln",
        )
    for name in ("network", "text_encoder"):
        if getattr(memory.quantize, name) is not None and e.parallel.tensor > 1:
            yield (
                ("memory", "quantize", name),
                f"layers are split over {e.parallel.tensor} tensor ranks, and split layers are not "
                f"quantised: set it to null, or parallel.tensor to 1",
            )


def _cache(e: Experiment) -> Iterator[tuple[Key, str]]:
    """Runs whose steps cannot be told apart, or of which no rank sees enough, are not cached."""
    where = ("sampling", "cache")
    if e.sampling.cache is None:
        return
    if e.sampling.tile is not None:
        yield (
            where,
            "denoising by tiles (sampling.tile) shows the network other squares in between, which the cache "
            "would take for steps: set one of them to null",
        )
    if e.sampling.graphs:
        yield where, "a recorded pass (sampling.graphs) computes every block: set one of them to null"
    if max(e.parallel.sequence, e.parallel.guidance) > 1:
        yield (
            where,
            "ranks that share a picture (parallel.sequence, parallel.guidance) would decide for themselves: "
            "set it to null",
        )


def _has_table(model: Component) -> bool:
    """Without a mixin of its own, ``position`` is the table."""
    return "position" not in (model.params.get("mixins") or {})


def _reader(e: Experiment, component: Component) -> Any:
    """A function from a parameter's name to its value, written or default; _UNKNOWN when there is none."""
    takes = signature(resolve(component.target, e.imports))

    def read(name: str) -> Any:
        return component.params.get(name, takes.defaults.get(name, _UNKNOWN))

    return read


# -- refusals of the classes themselves: every component is made once, without memory for its weights


def refusals(experiment: Experiment) -> Iterator[tuple[Key, str]]:
    """(key, why) of components whose classes refuse their values, found by making them without memory."""
    c, d, s = experiment.conditioning, experiment.diffusion, experiment.sampling
    components: dict[Key, Component | None] = {
        ("model",): experiment.model,
        ("first_stage",): experiment.first_stage,
        **{("diffusion", f.name): getattr(d, f.name) for f in fields(d)},
        ("conditioning", "text"): c.text,
        ("conditioning", "size"): c.size,
        ("sampling", "guider"): s.guider,
        ("sampling", "sampler"): s.sampler,
        ("sampling", "cache"): s.cache,
    }
    empty: dict[Key, nn.Module] = {}
    for key, component in components.items():
        try:
            if component is not None and key[0] != "diffusion":
                empty[key] = build_empty(component, experiment.imports)
            elif component is not None:  # schedules compute their tables
                build(component, imports=experiment.imports)
        except (ValueError, TypeError, ArithmeticError, LookupError, RuntimeError, AssertionError) as error:
            yield key, f"{component.target if component else ''} refuses these parameters: {error}"
    if (size := experiment.parallel.tensor) > 1:
        yield from _splits(
            {key: empty[key] for key in (("model",), ("conditioning", "text")) if key in empty}, size
        )
    if experiment.adapters.lora is not None and {("model",), ("conditioning", "text")} <= set(empty):
        yield from _targets(experiment.adapters.lora, empty[("model",)], empty[("conditioning", "text")])
    if s.cache is not None and ("model",) in empty:
        yield from _cached(empty[("model",)])
    for part, quantizer in quantizers(experiment.memory.quantize).items():
        yield from _quantised(quantizer, empty.get(_PARTS[part]))


def _splits(parts: Mapping[Key, nn.Module], size: int) -> Iterator[tuple[Key, str]]:
    """Parts that do not divide over ``size`` tensor ranks."""
    for module in parts.values():
        try:
            check_sharding(module, family_sharding(type(module)), size)
        except ValueError as error:
            yield ("parallel", "tensor"), str(error)


def _targets(lora: LoraConfig, model: nn.Module, text: nn.Module) -> Iterator[tuple[Key, str]]:
    """Targets of LoRA that the model has no layers for."""
    from sat.adapters.factors import AdapterError
    from sat.adapters.names import choose

    try:
        choose({"model": model, "text": text}, lora.targets, lora.rank, lora.ranks)
    except AdapterError as error:
        yield ("adapters", "lora", "targets"), str(error)


def _cached(network: nn.Module) -> Iterator[tuple[Key, str]]:
    """Why steps of ``network`` cannot be cached."""
    from sat.diffusion.step_cache import transformer_of

    try:
        transformer_of(network)
    except ValueError as error:
        yield ("sampling", "cache"), str(error)


_PARTS: dict[str, Key] = {"model": ("model",), "text": ("conditioning", "text")}


def _quantised(quantizer: Quantizer, module: nn.Module | None) -> Iterator[tuple[Key, str]]:
    """Why ``quantizer`` does nothing for the empty ``module``, or cannot do it."""
    if module is None:
        return  # said with the component itself
    names = list(quantizer.wanted(module))
    if not names:
        yield (
            ("memory", "quantize", "layers"),
            f"none of {', '.join(quantizer.patterns)} is a linear of {type(module).__name__}",
        )
    odd = [name for name in names if module.get_submodule(name).in_features % 2]  # type: ignore[operator]
    if odd and quantizer.scheme.kind == "int4":
        yield (
            ("memory", "quantize", "layers"),
            f"int4 keeps two inputs in a byte, but {odd[0]} has an odd number of them: leave it out",
        )

"""Rules between sections, and refusals of components' classes; checked once each section is sound."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from sat.adapters import groups
from sat.adapters.factors import AdapterError
from sat.config.build import build_empty, quantizers
from sat.config.check import built, resolve, signature
from sat.config.schema import Component, Experiment
from sat.config.yaml_source import Key, Marks, Problem, problem
from sat.data.buckets import BucketRule
from sat.diffusion.guidance import Embedded, Unguided
from sat.diffusion.step_cache import transformer_of
from sat.parallel.tensor import check_sharding
from sat.sharding import family_sharding
from sat.transformer import Transformer

Broken = Iterator[tuple[Key, str]]
Objects = dict[Key, Any]
"""The objects of components by their keys: those without weights as they are used later, modules empty."""

_INNER = (
    ValueError, TypeError, ArithmeticError, LookupError, RuntimeError, AssertionError, MemoryError,
    AttributeError,
)  # fmt: skip
_MODEL, _TEXT, _CACHE = ("model",), ("conditioning", "text"), ("sampling", "cache")


def constraints(experiment: Experiment, marks: Marks) -> list[Problem]:
    """Every broken rule between the sections of ``experiment``, and every refusal of a class."""
    objects: Objects = {}
    broken = list(_refusals(experiment, objects))
    rules: list[Callable[[Experiment, Objects], Broken]] = [
        _widths,
        _sizes,
        _backend,
        _data,
        _drawing,
        _adapters,
        _control,
        _prompts_alone,
        _memory,
    ]
    for rule in rules:
        try:
            broken += rule(experiment, objects)
        except _INNER:  # of a value that a component refuses, which is said already
            if not broken:
                raise
    return [problem(marks, key, what) for key, what in broken]


def _refusals(e: Experiment, objects: Objects) -> Broken:
    """Make every component once, modules without memory for their weights, into ``objects``."""
    c, d, s = e.conditioning, e.diffusion, e.sampling
    modules: dict[Key, Component] = {
        _MODEL: e.model, ("first_stage",): e.first_stage, _TEXT: c.text, ("conditioning", "size"): c.size
    }  # fmt: skip
    light: dict[Key, Component | None] = {
        ("diffusion", "schedule"): d.schedule, ("diffusion", "prediction"): d.prediction,
        ("diffusion", "process"): d.process, ("diffusion", "loss"): d.loss,
        ("sampling", "guider"): s.guider, ("sampling", "sampler"): s.sampler, _CACHE: s.cache,
    }  # fmt: skip
    for key, component in {**modules, **light}.items():
        if component is None:
            continue
        try:
            make: Callable[..., Any] = build_empty if key in modules else built
            objects[key] = make(component, e.imports)
        except _INNER as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            yield key, f"{component.target} refuses these parameters: {reason}"


def _param(e: Experiment, component: Component, name: str) -> Any:
    """A parameter of ``component``, written or default; None where there is none."""
    takes = signature(resolve(component.target, e.imports))
    return component.params.get(name, takes.defaults.get(name))


def _widths(e: Experiment, objects: Objects) -> Broken:
    """Widths and lengths that two parts must agree on."""
    c, size = e.conditioning, _param(e, e.conditioning.size, "dim")
    channels = _param(e, e.first_stage, "latent_channels")
    pairs = [
        ("text_len", "conditioning.max_length", c.max_length),
        ("text_dim", "conditioning.text.params.dim", _param(e, c.text, "dim")),
        ("channels", "first_stage.params.latent_channels", channels),
        ("size_dim", "6 x conditioning.size.params.dim", 6 * size if isinstance(size, int) else None),
    ]
    for name, other, theirs in pairs:
        ours = _param(e, e.model, name)
        if None not in (ours, theirs) and ours != theirs:
            yield ("model", "params", name), f"{name} {ours} of the model does not fit {other} {theirs}"


def _sizes(e: Experiment, objects: Objects) -> Broken:  # noqa: C901
    """The network and the autoencoder must be able to make every size of the rule, the data, its buckets."""
    levels = _param(e, e.first_stage, "multipliers")
    if levels is None:
        return
    factor = 2 ** (len(levels) - 1)
    for name, side in () if e.data is None else (("height", e.data.height), ("width", e.data.width)):
        if side is not None and side % factor:
            yield ("data", name), f"{side} is not a multiple of {factor}, the pixels of one latent cell"
    patch, levels = _param(e, e.model, "patch"), _param(e, e.model, "multipliers")
    if not isinstance(patch, int):  # the network's smallest unit is then a cell of a UNet's lowest level
        patch = None if levels is None else 2 ** (len(levels) - 1)
    if patch is None:
        return
    # Without a mixin of its own, ``position`` is a table.
    table = None if "position" in (e.model.params.get("mixins") or {}) else _param(e, e.model, "table_size")
    cell, rule, tile = factor * patch, e.sampling.sizes, e.sampling.tile
    unit = f"a multiple of {cell}, the pixels of the network's smallest unit"
    if rule.multiple % cell:
        yield (
            ("sampling", "sizes", "multiple"),
            f"{rule.multiple} is not {unit} ({factor} x {patch} latent cells)",
        )
    elif table is not None and rule.max // cell > min(table):
        yield (
            ("sampling", "sizes", "max"),
            f"{rule.max} pixels are {rule.max // cell} patches, more than the position table {list(table)}",
        )
    if tile is not None and tile % patch:
        yield ("sampling", "tile"), f"{tile} is not a multiple of {patch} latent cells"
    buckets = None if e.data is None else e.data.buckets
    if buckets is None:
        return
    if buckets.step % cell:
        yield ("data", "buckets", "step"), f"{buckets.step} is not {unit}"
        return
    ratios = BucketRule(buckets.areas, buckets.step, buckets.max_ratio)
    longest = max(max(size) for area in ratios.areas for size in ratios.sizes(area))
    if table is not None and longest // cell > min(table):
        yield (
            ("data", "buckets"),
            f"the longest side of a bucket, {longest} pixels, is {longest // cell} patches, more than the "
            f"position table {list(table)}: lower area or max_ratio",
        )


def _backend(e: Experiment, objects: Objects) -> Broken:
    """The optimizer and the teams of ranks must be the backend's."""
    if e.train is None:
        return
    try:
        optimizer = resolve(e.train.optimizer.target, e.imports)
    except ValueError:
        return  # said with the optimizer itself
    if optimizer.__module__.startswith("torch.") and optimizer.__name__ == "Muon":
        what = "takes matrices alone: write sat.train.optim.Muon, which gives the rest to AdamW"
        yield ("train", "optimizer"), f"torch's Muon {what}"
    elif getattr(optimizer, "needs_matrices", False) and e.train.backend != "plain":
        what = "steps matrices, and DeepSpeed may give it flat vectors: set train.backend to plain"
        yield ("train", "optimizer"), f"{optimizer.__name__} {what}"
    if e.train.backend == "plain" and (team := {k: n for k, n in e.parallel.sizes.items() if n > 1}):
        name, size = next(iter(team.items()))
        yield ("parallel", name), f"is {size}, and train.backend plain is one process: set it to 1"


def _data(e: Experiment, objects: Objects) -> Broken:  # noqa: C901 - rules of one section
    """The objective must use the extra pictures and the weights that sources give."""
    if e.data is None or e.train is None:
        return
    try:
        objective = resolve(e.train.objective.target, e.imports)
    except ValueError:
        return  # said with the objective itself
    for name, what in objective.broken(e.train.objective.params, e.train.zero):
        yield ("train", "objective", "params", name), what
    for name in ("keep_best", "patience"):
        if getattr(e.train, name) and e.train.validate_every is not None and not e.data.validation:
            yield ("train", name), "goes by the held-out loss, and there are no pictures in data.validation"
    sources = [("sources", i, one) for i, one in enumerate(e.data.sources)]
    for part, i, source in (*sources, *(("validation", i, one) for i, one in enumerate(e.data.validation))):
        key = ("data", part, str(i))
        for name in source.extras.keys() - objective.extras:
            yield (*key, name), f"{objective.__name__} makes no use of a {name}: set it to null"
        for name in sorted(objective.required - source.extras.keys()):
            what = f"{objective.__name__} needs a {name} of every picture: such as {{column: {name}}}"
            yield (*key, name), what
        if source.loss_weight != 1 and not objective.weighs:
            what = f"{objective.__name__} does not weigh the losses of pictures: set it to 1"
            yield (*key, "loss_weight"), what


def _drawing(e: Experiment, objects: Objects) -> Broken:  # noqa: C901
    """The schedule must have the steps; guidance, step cache and ranks must suit the network."""
    process, schedule = objects.get(("diffusion", "process")), objects.get(("diffusion", "schedule"))
    if e.sampling.back_projections and process is not None and process.input is None:
        what = (
            "is for a model that enlarges pictures (relay), and this one draws from noise alone: set it to 0"
        )
        yield ("sampling", "back_projections"), what
    if process is not None and schedule is not None:
        try:
            process.hooks.levels(schedule, e.sampling.steps)
        except ValueError as error:
            yield ("sampling", "steps"), str(error)

    guider, target = objects.get(("sampling", "guider")), e.sampling.guider.target
    takes, once = _param(e, e.model, "guidance_dim") is not None, isinstance(guider, (Embedded, Unguided))
    if takes and guider is not None and not once:
        yield (
            ("sampling", "guider"),
            f"the model takes the guidance strength as an input (guidance_dim), as distilled models do: use "
            f"sat.diffusion.guidance.Embedded instead of {target}, which would guide twice",
        )
    if not takes and isinstance(guider, Embedded):
        yield (
            ("sampling", "guider"),
            "sat.diffusion.guidance.Embedded hands the guidance strength to the network, but this model "
            "takes none (model.params.guidance_dim is null): use ClassifierFree, or a distilled config",
        )
    if e.parallel.guidance > 1 and (once or getattr(guider, "scale", None) == 1):
        scale = "" if once else " at scale 1"
        yield (
            ("parallel", "guidance"),
            f"{target.rpartition('.')[2]}{scale} looks once at each picture, so there are no halves "
            f"of guidance to share: set it to 1, and the ranks draw different pictures",
        )

    for index, item in enumerate(e.sampling.controls):
        if item.image is None:
            yield (
                ("sampling", "controls", str(index), "image"),
                "needs a picture, or a folder with one a prompt",
            )

    regions, place = e.sampling.regions, ("sampling", "regions")
    if regions is not None and e.sampling.tile is not None:
        yield place, "denoising by tiles (sampling.tile) shows parts of the picture: set one of them to null"
    if regions is not None and (e.sampling.compile or e.sampling.graphs):
        yield place, "regions change attention for a picture: set sampling.compile and graphs to false"
    if regions is not None and _MODEL in objects:
        found = [module for module in objects[_MODEL].modules() if isinstance(module, Transformer)]
        if not any({"joint_attention", "cross"} & set(module.mixins) for module in found):
            yield place, "needs a network with joint attention or cross-attention: set it to null"
    if e.sampling.cache is None:
        return
    if e.sampling.tile is not None:
        yield (
            _CACHE,
            "denoising by tiles (sampling.tile) shows the network other squares in between, which the cache "
            "would take for steps: set one of them to null",
        )
    if e.sampling.graphs:
        yield _CACHE, "a recorded pass (sampling.graphs) computes every block: set one of them to null"
    if max(e.parallel.sequence, e.parallel.guidance) > 1:
        yield (
            _CACHE,
            "ranks that share a picture (parallel.sequence, parallel.guidance) would decide for themselves: "
            "set it to null",
        )
    if _MODEL in objects:
        try:
            transformer_of(objects[_MODEL])
        except ValueError as error:
            yield _CACHE, str(error)


def _adapters(e: Experiment, objects: Objects) -> Broken:  # noqa: C901 - one rule after another
    """LoRA trains the parts that the objective trains, and an objective that trains those LoRA adapts."""
    lora, targets = e.adapters.lora, ("adapters", "lora", "targets")
    if lora is not None and _MODEL in objects and _TEXT in objects:
        from sat.adapters.names import choose

        try:
            parts = {"model": objects[_MODEL], "text": objects[_TEXT]}
            chosen = choose(parts, lora.targets, lora.rank, lora.ranks)
            maps = [name for name, (layer, _) in chosen.items() if layer.kernel]
            if maps and (lora.dora or lora.lokr is not None):
                what = "DoRA" if lora.dora else "LoKr"
                yield targets, f"{maps[0]!r} is a convolution, which takes LoRA factors alone, no {what}"
        except AdapterError as error:
            yield targets, str(error)
    if e.train is None:
        return
    if e.adapters.tokens and not _param(e, e.train.objective, "train_text"):
        yield (
            ("adapters", "tokens"),
            "new words are learned through the text encoder: set train.objective.params.train_text=true",
        )
    if lora is None and e.adapters.tokens:
        return
    if lora is None:
        if e.adapters.load and not e.adapters.merge:
            what = "training whole weights with loaded adapters needs them merged: set it to true"
            yield ("adapters", "merge"), what
        return
    trains = _param(e, e.train.objective, "train_text")
    wants = any(groups.of_text(target) for target in lora.targets)
    if trains is not None and wants and not trains:
        yield (
            targets,
            "the text encoder is targeted, but the objective does not train it: set "
            "train.objective.params.train_text=true",
        )
    if trains and not wants and not e.adapters.tokens:
        yield (
            targets,
            f"the objective trains the text encoder (train_text), but no target is in it: add text_encoder, "
            f"or set train_text to false (targets: {', '.join(lora.targets)})",
        )
    try:
        rounds = resolve(e.train.objective.target, e.imports).rounds(e.train.objective.params)
    except ValueError:
        return  # said with the objective itself
    if rounds and not isinstance(e.train.objective.params.get("guidance"), (int, float)):
        what = (
            "a pair of guidance strengths is a new input of the network, which low-rank factors cannot add: "
        )
        yield (
            ("train", "objective", "params", "guidance"),
            f"{what}give one strength, which is folded in, or train whole weights (adapters.lora=null)",
        )


def _prompts_alone(e: Experiment, objects: Objects) -> Broken:
    """Lists of prompts without pictures, which few objectives do with."""
    if e.train is None or e.data is None:
        return
    sources = [*(("sources", i, one) for i, one in enumerate(e.data.sources)),
               *(("validation", i, one) for i, one in enumerate(e.data.validation))]  # fmt: skip
    lists = [(name, i) for name, i, one in sources if one.path.suffix.lower() == ".txt"]
    if not lists:
        return
    name, i = lists[0]
    at = ("data", name, str(i), "path")
    kind = resolve(e.train.objective.target, e.imports)
    process = objects.get(("diffusion", "process"))
    if not kind.pictureless(e.train.objective.params) or getattr(process, "input", None) is not None:
        what = "is a list of prompts without pictures: that is for method dmd2 without adversarial and relay"
        yield at, what
    if len(lists) < len([one for one in sources if one[0] == name]) and name == "sources":
        yield at, "is a list of prompts without pictures, and other sources have some: take one kind"
    for key in ("cache", "buckets"):
        if getattr(e.data, key) is not None:
            yield ("data", key), "keeps or sorts pictures, and a list of prompts has none: set it to null"


def _control(e: Experiment, objects: Objects) -> Broken:
    """A control learns from an objective that hands it pictures."""
    if e.train is None:
        return
    control, key = e.adapters.control, ("adapters", "control")
    if control is None:
        if e.data is not None and any(source.control is not None for source in e.data.sources):
            what = "pictures for a control are given (`control`), but adapters.control is null"
            yield ("data", "sources"), what
        return
    if control.train and _param(e, e.train.objective, "train_text"):
        yield key, "the text encoder does not learn beside a control: set train_text to false"
    if "control" not in resolve(e.train.objective.target, e.imports).extras:
        yield key, f"{e.train.objective.target} makes no use of a control: set it to null"


def _memory(e: Experiment, objects: Objects) -> Broken:
    """Ways to save memory and time that exclude each other, or do not suit the model."""
    memory, sampling, tensor = e.memory, e.sampling, e.parallel.tensor
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
        if getattr(memory.quantize, name) is not None and tensor > 1:
            yield (
                ("memory", "quantize", name),
                f"layers are split over {tensor} tensor ranks, and split layers are not "
                f"quantised: set it to null, or parallel.tensor to 1",
            )
    modules: dict[str, nn.Module] = {
        part: objects[key] for part, key in (("model", _MODEL), ("text", _TEXT)) if key in objects
    }
    for module in modules.values() if tensor > 1 else ():
        try:
            check_sharding(module, family_sharding(type(module)), tensor)
        except ValueError as error:
            yield ("parallel", "tensor"), str(error)
    for part, quantizer in quantizers(memory.quantize).items():
        names = list(quantizer.wanted(modules[part])) if part in modules else []
        if part in modules and not names:
            what = f"none of {', '.join(quantizer.patterns)} is a linear of {type(modules[part]).__name__}"
            yield ("memory", "quantize", "layers"), what
        odd = [n for n in names if modules[part].get_submodule(n).in_features % 2]  # type: ignore[operator]
        if odd and quantizer.scheme.kind == "int4":
            yield (
                ("memory", "quantize", "layers"),
                f"int4 keeps two inputs in a byte, but {odd[0]} has an odd number of them: leave it out",
            )

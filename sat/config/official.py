"""Official CogView3 configs (``args`` and ``model`` with ``sgm.*`` targets) as experiments of this project.

Every official key is translated, refused with its line, or named in a notice: nothing is dropped silently.
Facts about the official keys are from ``sat/configs/cogview3_plus.yaml``, ``sample_dit.py`` and ``dit.py``.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sat.config.merge import plain_merge
from sat.config.official_keys import (
    FIRST_STAGE,
    FIXED,
    GUIDERS,
    INSTEAD,
    MIXINS,
    NETWORK,
    NOTHING,
    PARAMETERISATIONS,
    SAMPLERS,
    SCHEDULES,
    T5,
)
from sat.config.paths import find
from sat.config.source import ConfigError, Key, Marks, Problem, Source, Where, dotted, shown, where

_SIDES = (512, 2048, 32)
"""Smallest and largest side and their multiple in pixels. Source: official ``sample_dit.py:140-143``."""


class Translated(NamedTuple):
    """An official config as a native tree, and what in it has no effect here."""

    source: Source
    notices: list[str]


def is_official(tree: Mapping[str, Any]) -> bool:
    """Whether ``tree`` looks like an official config rather than one of ours."""
    model = tree.get("model")
    configs = isinstance(model, Mapping) and any(str(k).endswith("_config") for k in model)
    return configs or ("args" in tree and set(tree) <= {"args", "model", "data", "deepspeed"})


def translate(sources: list[Source], t5: Mapping[str, Any] | None = None) -> Translated:
    """Official files, merged left to right, as one native source.

    ``t5`` is the Hugging Face ``config.json`` of the text encoder; None reads it beside the weights, and
    takes T5-XXL's shape when there is none.
    """
    tree: dict[str, Any] = {}
    marks: Marks = {}
    for source in sources:
        tree = plain_merge(tree, source.tree)
        marks |= source.marks
    o = Official(tree, marks)
    if o.subtree("model"):
        _engine(o, t5)
    _args(o)
    o.finish()
    return Translated(Source(o.out, o.out_marks), o.notices())


class Official:
    """An official tree being read: remembers the keys used, collects the native tree and the problems."""

    def __init__(self, tree: Mapping[str, Any], marks: Marks) -> None:
        self.tree = tree
        self.marks = marks
        self.used: set[str] = set()
        self.out: dict[str, Any] = {}
        self.out_marks: Marks = {}
        self.problems: list[Problem] = []
        self.notes: list[str] = []

    def subtree(self, key: str) -> Any:
        """What is at ``key``, without counting as used; None when absent."""
        node: Any = self.tree
        for part in key.split("."):
            if isinstance(node, list):
                node = node[int(part)] if int(part) < len(node) else None
            elif isinstance(node, Mapping):
                node = node.get(part)
            else:
                return None
        return node

    def take(self, key: str, default: Any = None) -> Any:
        """The value at ``key``, counted as used."""
        self.used.add(key)
        found = self.subtree(key)
        return default if found is None else found

    def put(self, native: str, value: Any, key: str) -> None:
        """Write ``value`` at the dotted ``native`` key; messages about it point to the official ``key``."""
        path: Key = tuple(native.split("."))
        node = self.out
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = value
        mark = where(self.marks, tuple(key.split(".")))
        for end in range(1, len(path) + 1):
            self.out_marks.setdefault(path[:end], mark)
        self.out_marks[path] = mark

    def move(self, key: str, native: str) -> None:
        """Translate ``key`` to ``native`` unchanged, when it is there."""
        value = self.take(key)
        if value is not None:
            self.put(native, value, key)

    def choose(self, key: str, choices: Mapping[str, str], what: str) -> str:
        """Our target for the official class named at ``key.target``."""
        target = str(self.take(f"{key}.target"))
        name = target.rpartition(".")[2]
        if name not in choices:
            self.refuse(
                f"{key}.target", f"{what} {target} is not supported yet (supported: {', '.join(choices)})"
            )
        return choices.get(name, "")

    def refuse(self, key: str, what: str) -> None:
        """Note why the official config cannot be translated."""
        self.problems.append(Problem(str(where(self.marks, tuple(key.split(".")))), key, what))

    def finish(self) -> None:
        """Check the fixed keys; raise when anything was refused."""
        for key in self._leaves():
            if any(fnmatch.fnmatch(key, p) and self.subtree(key) == value for p, value in NOTHING.items()):
                self.used.add(key)
            for pattern, value in FIXED.items():
                if fnmatch.fnmatch(key, pattern):
                    self.used.add(key)
                    if self.subtree(key) != value:
                        self.refuse(key, f"only {value!r} is supported, got {shown(self.subtree(key))}")
        if self.problems:
            raise ConfigError(self.problems)

    def notices(self) -> list[str]:
        """One line for each group of keys that is not honoured, by what happens instead."""
        groups: dict[str, list[str]] = {}
        for key in self._leaves():
            if not any(key == used or key.startswith(f"{used}.") for used in self.used):
                why = next((w for p, w in INSTEAD.items() if fnmatch.fnmatch(key, p)), "without effect here")
                groups.setdefault(why, []).append(key)
        lines = [f"{self._file()}: not honoured: {', '.join(keys)} ({why})" for why, keys in groups.items()]
        return [*self.notes, *lines]

    def _file(self) -> str:
        return str(self.marks.get((), Where("official config"))).rpartition(":")[0] or "official config"

    def _leaves(self) -> list[str]:
        found: list[str] = []

        def walk(node: Any, key: Key) -> None:
            if isinstance(node, Mapping):
                for name, child in node.items():
                    walk(child, (*key, str(name)))
            elif isinstance(node, list) and any(isinstance(child, Mapping) for child in node):
                for index, child in enumerate(node):
                    walk(child, (*key, str(index)))
            elif node is not None:
                found.append(dotted(key))

        walk(self.tree, ())
        return found


def _engine(o: Official, t5: Mapping[str, Any] | None) -> None:
    """The ``model`` section: network, diffusion, conditioning, first stage, as far as they are there."""
    parts: dict[str, Callable[[], None]] = {
        "network_config": lambda: _network(o),
        "denoiser_config": lambda: _diffusion(o),
        "sampler_config": lambda: _sampler(o),
        "conditioner_config": lambda: _conditioner(o, t5),
        "first_stage_config": lambda: _first_stage(o),
    }
    for name, translate_part in parts.items():
        if o.subtree(f"model.{name}"):
            translate_part()


def _network(o: Official) -> None:
    at = "model.network_config.params"
    target = str(o.take("model.network_config.target"))
    if target.endswith("UNetModel"):
        o.refuse(
            "model.network_config.target",
            "the UNet models (CogView3-Base, CogView3-Relay and their distilled versions) are not supported "
            "yet; CogView3-Plus is",
        )
        raise ConfigError(o.problems)
    if not target.endswith("DiffusionTransformer"):
        o.refuse(
            "model.network_config.target",
            f"network {target} is not supported yet (supported: DiffusionTransformer)",
        )
        raise ConfigError(o.problems)
    o.put("model.target", "sat.models.cogview3_plus.CogView3Plus", "model.network_config.target")
    for theirs, ours in NETWORK.items():
        o.move(f"{at}.{theirs}", f"model.params.{ours}")
    if o.subtree(f"{at}.time_embed_dim") is None:  # official default: as wide as the transformer
        o.put("model.params.emb_dim", o.subtree(f"{at}.hidden_size"), f"{at}.hidden_size")
    position = f"{at}.modules.pos_embed_config"
    table = [o.take(f"{position}.params.max_height"), o.take(f"{position}.params.max_width")]
    if None not in table:
        o.put("model.params.table_size", table, f"{position}.params.max_height")
    _same(o, f"{at}.out_channels", f"{at}.in_channels")
    patch, block = o.subtree(f"{at}.patch_size"), o.take(f"{at}.block_size", 16)
    if isinstance(patch, int) and block != 8 * patch:
        o.refuse(f"{at}.block_size", f"expected {8 * patch} pixels (8 x patch_size {patch}), got {block}")
    for name in ("pos_embed", "patch_embed", "attention", "final_layer"):
        o.choose(f"{at}.modules.{name}_config", MIXINS[name], "mixin")
    if (dtype := o.take(f"{at}.dtype")) is not None:
        o.put("sampling.dtype", dtype, f"{at}.dtype")


def _same(o: Official, key: str, as_key: str) -> None:
    """Two official keys that are one parameter here."""
    value, other = o.take(key), o.subtree(as_key)
    if None not in (value, other) and value != other:
        o.refuse(key, f"expected {other!r} as in {as_key}, got {shown(value)}")


def _schedule(o: Official, at: str) -> tuple[str, dict[str, Any]]:
    """Our schedule for the discretization at ``at``."""
    target = o.choose(at, SCHEDULES, "discretization")
    for key, value in (("linear_start", 0.00085), ("linear_end", 0.012), ("num_timesteps", 1000)):
        if (given := o.take(f"{at}.params.{key}")) not in (None, value):
            o.refuse(f"{at}.params.{key}", f"only {value} is supported, got {shown(given)}")
    shift = o.take(f"{at}.params.shift_scale", 1.0)
    return target, {"shift": shift} if target.endswith("ZeroSNR") else {}


def _diffusion(o: Official) -> None:
    at = "model.denoiser_config"
    o.choose(at, {"DiscreteDenoiser": ""}, "denoiser")
    target, params = _schedule(o, f"{at}.params.discretization_config")
    o.put("diffusion.schedule", {"target": target, "params": params}, f"{at}.params.discretization_config")
    scaling = o.choose(f"{at}.params.scaling_config", PARAMETERISATIONS, "scaling")
    o.put("diffusion.parameterisation", {"target": scaling, "params": {}}, f"{at}.params.scaling_config")
    if o.take(f"{at}.params.quantize_c_noise", True) and target.endswith("ZeroSNR"):
        o.refuse(f"{at}.params.quantize_c_noise", "only false is supported with the zero-SNR schedule")
    if (loss := o.subtree("model.loss_fn_config.target")) not in (None, "torch.nn.Identity"):
        o.notes.append(f"official loss {loss} is not translated; training takes diffusion.loss")


def _sampler(o: Official) -> None:
    at = "model.sampler_config"
    o.put("sampling.sampler", {"target": o.choose(at, SAMPLERS, "sampler"), "params": {}}, f"{at}.target")
    o.move(f"{at}.params.num_steps", "sampling.steps")
    own = _schedule(o, f"{at}.params.discretization_config")
    if o.subtree("model.denoiser_config") and own != _schedule(
        o, "model.denoiser_config.params.discretization_config"
    ):
        o.refuse(f"{at}.params.discretization_config", "expected the discretization of denoiser_config")
    guider = f"{at}.params.guider_config"
    if o.subtree(guider):
        target = o.choose(guider, GUIDERS, "guider")
        scale = o.take(f"{guider}.params.scale")
        params = {"scale": scale} if target.endswith("ClassifierFree") and scale is not None else {}
        o.put("sampling.guider", {"target": target, "params": params}, guider)


_SIZE_KEYS = ["original_size_as_tuple", "crop_coords_top_left", "target_size_as_tuple"]


def _conditioner(o: Official, t5: Mapping[str, Any] | None) -> None:
    at = "model.conditioner_config.params.emb_models"
    o.choose("model.conditioner_config", {"GeneralConditioner": ""}, "conditioner")
    models = o.subtree(at)
    keys = (
        [m.get("input_key") if isinstance(m, Mapping) else None for m in models]
        if isinstance(models, list)
        else []
    )
    if (
        sorted(map(str, keys)) != sorted(["txt", *_SIZE_KEYS])
        or [k for k in keys if k != "txt"] != _SIZE_KEYS
    ):
        o.refuse(at, f"expected txt, then {', '.join(_SIZE_KEYS)}, got {keys}")
        return
    text = f"{at}.{keys.index('txt')}"
    o.choose(text, {"FrozenT5Embedder": ""}, "text encoder")
    o.move(f"{text}.params.max_length", "conditioning.max_length")
    if (folder := o.take(f"{text}.params.model_dir")) is not None:
        o.put("checkpoint.text", folder, f"{text}.params.model_dir")
    o.put("conditioning.text", {"target": _T5_TARGET, "params": _t5_params(o, folder, t5)}, text)
    dims = []
    for index, name in enumerate(keys):
        o.used |= {f"{at}.{index}.input_key", f"{at}.{index}.is_trainable"}
        if name != "txt":
            o.choose(f"{at}.{index}", {"ConcatTimestepEmbedderND": ""}, "size embedding")
            dims.append(o.take(f"{at}.{index}.params.outdim"))
    if len(set(dims)) > 1:
        o.refuse(at, f"expected one outdim for all three sizes, got {dims}")
    o.put(
        "conditioning.size",
        {"target": "sat.conditioning.size.SizeConditioner", "params": {"dim": dims[0]}},
        at,
    )


_T5_TARGET = "sat.models.t5.T5Encoder"


def _t5_params(o: Official, folder: Any, t5: Mapping[str, Any] | None) -> dict[str, Any]:
    """The text encoder's shape: given, read beside its weights, or T5-XXL's."""
    mark = o.marks.get((), Where(""))
    found = find(Path(folder) / "config.json", mark.folder) if isinstance(folder, str) else None
    if t5 is None and found is not None:
        try:
            t5 = json.loads(found.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError([Problem(str(found), "", f"not valid JSON: {error}")]) from error
    if t5 is not None:
        return t5_params(t5)
    width = o.subtree("model.network_config.params.modules.patch_embed_config.params.text_hidden_size")
    if width not in (None, 4096):
        o.notes.append(
            f"there is no config.json in {folder}: the text encoder is taken for T5-XXL, but {width} wide"
        )
        return {"dim": width}
    return {}


def t5_params(config: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of our T5 encoder from a Hugging Face ``config.json``."""
    return {ours: config[theirs] for theirs, ours in T5.items() if theirs in config}


def _first_stage(o: Official) -> None:
    at = "model.first_stage_config"
    names = {
        "AutoencodingEngine": "pair",
        "AutoencoderKLInferenceWrapper": "single",
        "AutoencoderKL": "single",
    }
    if o.choose(at, names, "autoencoder") == "pair":
        encoder, decoder = f"{at}.params.encoder_config.params", f"{at}.params.decoder_config.params"
        o.choose(f"{at}.params.encoder_config", {"Encoder": ""}, "encoder")
        o.choose(f"{at}.params.decoder_config", {"Decoder": ""}, "decoder")
        if o.subtree(f"{at}.params.regularizer_config"):
            o.choose(f"{at}.params.regularizer_config", {"DiagonalGaussianRegularizer": ""}, "regulariser")
        for key in (*FIRST_STAGE, "mid_attn", "attn_type"):
            _same(o, f"{decoder}.{key}", f"{encoder}.{key}")
        quant = False
    else:
        encoder, quant = f"{at}.params.ddconfig", True
        _same(o, f"{at}.params.embed_dim", f"{encoder}.z_channels")
    o.put("first_stage.target", "sat.first_stage.autoencoder.AutoencoderKL", f"{at}.target")
    for theirs, ours in FIRST_STAGE.items():
        o.move(f"{encoder}.{theirs}", f"first_stage.params.{ours}")
    kind = o.take(f"{encoder}.attn_type")
    attention = bool(o.take(f"{encoder}.mid_attn", True)) and kind != "none"
    o.put("first_stage.params.mid_attention", attention, encoder)
    o.put("first_stage.params.quant_convs", quant, at)
    o.move("model.scale_factor", "first_stage.params.scale_factor")
    o.move(f"{at}.params.ckpt_path", "checkpoint.first_stage")


def _args(o: Official) -> None:
    """The ``args`` section, and the sizes that ``sample_dit.py`` allows."""
    for theirs, ours in (
        ("load", "checkpoint.model"),
        ("batch_size", "sampling.batch_size"),
        ("grid_num_columns", "sampling.grid_columns"),
        ("output_dir", "output.dir"),
        ("seed", "sampling.seed"),
    ):
        o.move(f"args.{theirs}", ours)
    for flag in ("fp16", "bf16"):
        if o.take(f"args.{flag}"):
            o.put("sampling.dtype", flag, f"args.{flag}")
    if o.take("args.input_type", "cli") == "txt":
        o.move("args.input_file", "sampling.prompt_file")
    _same(o, "args.sampling_latent_dim", "model.network_config.params.in_channels")
    both = o.take("args.sampling_image_size")
    sizes = [o.take("args.sampling_image_size_x", both), o.take("args.sampling_image_size_y", both)]
    rule = _rule(o)
    if rule:
        o.put("sampling.sizes", rule, "model.network_config")
    for name, side, axis in zip(("height", "width"), sizes, "xy", strict=True):
        fallback = min(1024, rule["max"]) if rule else None
        if side is not None or fallback is not None:
            o.put(
                f"sampling.{name}", side or fallback, f"args.sampling_image_size_{axis}" if side else "args"
            )


def _rule(o: Official) -> dict[str, int]:
    """The size rule of the official script, cut to what the position table holds."""
    params = o.out.get("model", {}).get("params", {})
    table, patch = params.get("table_size"), params.get("patch", 2)
    if not (isinstance(table, list) and all(isinstance(n, int) for n in [*table, patch])):
        return {}
    low, high, multiple = _SIDES
    cell = 8 * patch
    if min(table) * cell < low:
        low, multiple = cell, cell
    high = min(high, min(table) * cell)
    return {"min": low, "max": high, "multiple": multiple, "max_area": high * high}

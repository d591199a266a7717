"""Official CogView3 configs (``args`` and ``model`` with ``sgm.*`` targets) as experiments of this project.

Every official key is translated, refused with its line, or named in a notice: nothing is dropped silently.
Facts about the official keys are from ``sat/configs/*.yaml``, ``sample_dit.py``, ``sample_unet.py``,
``dit.py``, ``openaimodel.py`` and ``sgm/modules/diffusionmodules/{denoiser,sampling,loss}.py``.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sat.config.official_keys import (
    BLENDS,
    FIRST_STAGE,
    GUIDERS,
    LOSSES,
    MIXINS,
    NETWORK,
    PREDICTIONS,
    RELAY,
    SAMPLER_PARAMS,
    SAMPLERS,
    SCHEDULES,
    T5,
    UNET,
    UNET_FIXED,
    Official,
)
from sat.config.yaml_source import (
    ConfigError,
    Marks,
    Override,
    Problem,
    Source,
    Where,
    dotted,
    find,
    read_override,
    shown,
)

_SIDES = (512, 2048, 32)
"""Smallest and largest side and their multiple in pixels. Source: official ``sample_dit.py:140-143``."""
_UNET_SIDES = {"base": (256, 1024, 32), "relay": (512, 4096, 64)}
"""The same for the UNets, around the sizes of their training; relay's input is half as large."""


class Translated(NamedTuple):
    """An official config as a native tree, and what in it has no effect here."""

    source: Source
    notices: list[str]


def is_official(tree: Mapping[str, Any]) -> bool:
    """Whether ``tree`` looks like an official config rather than one of ours."""
    model = tree.get("model")
    configs = isinstance(model, Mapping) and any(str(k).endswith("_config") for k in model)
    return configs or ("args" in tree and set(tree) <= {"args", "model", "data", "deepspeed"})


def override_official(given: Override, source: Source) -> bool:
    """Set an official key of ``source``, in place; False, and nothing is done, when the key is one of ours.

    Official are all of ``args`` and what our ``model`` section does not have:
    ``model.first_stage_config.params.ddconfig.in_channels=3``.
    """
    key, value, mark = read_override(given)
    section, name = [*key, "", ""][:2]
    if not name or not (section == "args" or (section == "model" and name not in ("target", "params"))):
        return False
    node: Any = source.tree
    for name in key[:-1]:
        inside = _inside(node, name)
        if inside is None and isinstance(node, dict):
            inside = node[name] = {}
        node = inside
    if isinstance(node, list) and _inside(node, key[-1]) is not None:
        node[int(key[-1])] = value
    elif isinstance(node, dict):
        node[key[-1]] = value
    else:
        raise ConfigError([Problem("override", dotted(key), "names no key of the official config")])
    for known in [k for k in source.marks if k[: len(key)] == key]:
        del source.marks[known]
    source.marks[key] = mark
    return True


def _inside(node: Any, name: str) -> Any:
    """What a mapping or a list holds under ``name``; None where it holds nothing."""
    if isinstance(node, list):
        return node[int(name)] if name.isdigit() and int(name) < len(node) else None
    return node.get(name) if isinstance(node, dict) else None


def translate(sources: list[Source], t5: Mapping[str, Any] | None = None) -> Translated:
    """Official files, merged left to right, as one native source.

    ``t5`` is the Hugging Face ``config.json`` of the text encoder; None reads it beside the weights, and
    takes T5-XXL's shape when there is none.
    """
    tree: dict[str, Any] = {}
    marks: Marks = {}
    for source in sources:
        tree = _merged(tree, source.tree)
        marks |= source.marks
    o = Official(tree, marks)
    if o.subtree("model"):
        _engine(o, t5)
    _args(o)
    o.finish()
    return Translated(Source(o.out, o.out_marks), o.notices())


def _merged(old: Any, new: Any) -> Any:
    """``new`` over ``old``, mappings merged, all else replaced: how the official code composes its files."""
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        return copy.deepcopy(new)
    return {**old, **{name: _merged(old.get(name), value) for name, value in new.items()}}


def _engine(o: Official, t5: Mapping[str, Any] | None) -> None:
    """The ``model`` section: network, diffusion, conditioning, first stage, as far as they are there."""
    parts: dict[str, Callable[[], None]] = {
        "network_config": lambda: _network(o),
        "denoiser_config": lambda: _denoiser(o),
        "sampler_config": lambda: _sampler(o),
        "loss_fn_config": lambda: _loss(o),
        "conditioner_config": lambda: _conditioner(o, t5),
        "first_stage_config": lambda: _first_stage(o),
    }
    for name, translate_part in parts.items():
        if o.subtree(f"model.{name}"):
            translate_part()


def _network(o: Official) -> None:
    kinds = {"DiffusionTransformer": _transformer, "UNetModel": _unet}
    name = _class_name(o, "model.network_config")
    o.choose("model.network_config", dict.fromkeys(kinds, ""), "network")
    if name not in kinds:
        raise ConfigError(o.problems)
    kinds[name](o, "model.network_config.params")


def _unet(o: Official, at: str) -> None:
    """CogView3-Base, CogView3-Relay and their distilled versions."""
    o.put("model.target", "sat.models.cogview3_unet.CogView3UNet", "model.network_config.target")
    for theirs, ours in UNET.items():
        o.move(f"{at}.{theirs}", f"model.params.{ours}")
    for name, (value, default) in UNET_FIXED.items():
        if (given := o.take(f"{at}.{name}", default)) != value:
            o.refuse(f"{at}.{name}", f"only {value!r} is supported, got {shown(given)}")
    o.same(f"{at}.out_channels", f"{at}.in_channels")
    depths, multipliers = o.take(f"{at}.transformer_depth", 1), o.subtree(f"{at}.channel_mult")
    if isinstance(depths, int) and isinstance(multipliers, list):
        depths = [depths] * len(multipliers)
    o.put("model.params.depths", depths, f"{at}.transformer_depth")
    last = depths[-1] if isinstance(depths, list) and depths else depths
    if (middle := o.take(f"{at}.transformer_depth_middle", last)) != last:
        o.refuse(f"{at}.transformer_depth_middle", f"only {last}, the last depth, is supported, got {middle}")
    if str(attention := o.take(f"{at}.spatial_transformer_attn_type", "softmax")) not in _SOFTMAX:
        o.refuse(f"{at}.spatial_transformer_attn_type", f"expected one of {_SOFTMAX}, got {shown(attention)}")
    if (dtype := o.take(f"{at}.dtype")) is not None:
        o.put("sampling.dtype", dtype, f"{at}.dtype")


_SOFTMAX = ["softmax", "softmax-xformers"]


def _transformer(o: Official, at: str) -> None:
    """CogView3-Plus."""
    o.put("model.target", "sat.models.cogview3_plus.CogView3Plus", "model.network_config.target")
    for theirs, ours in NETWORK.items():
        o.move(f"{at}.{theirs}", f"model.params.{ours}")
    if o.subtree(f"{at}.time_embed_dim") is None:  # official default: as wide as the transformer
        o.put("model.params.emb_dim", o.subtree(f"{at}.hidden_size"), f"{at}.hidden_size")
    position = f"{at}.modules.pos_embed_config"
    table = [o.take(f"{position}.params.max_height"), o.take(f"{position}.params.max_width")]
    if None not in table:
        o.put("model.params.table_size", table, f"{position}.params.max_height")
    o.same(f"{at}.out_channels", f"{at}.in_channels")
    patch, block = o.subtree(f"{at}.patch_size"), o.take(f"{at}.block_size", 16)
    if isinstance(patch, int) and block != 8 * patch:
        o.refuse(f"{at}.block_size", f"expected {8 * patch} pixels (8 x patch_size {patch}), got {block}")
    for name in ("pos_embed", "patch_embed", "attention", "final_layer"):
        o.choose(f"{at}.modules.{name}_config", MIXINS[name], "mixin")
    if (dtype := o.take(f"{at}.dtype")) is not None:
        o.put("sampling.dtype", dtype, f"{at}.dtype")


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
    if o.out.get("model", {}).get("target", "").endswith("CogView3UNet"):  # which takes any length officially
        length = o.take(f"{text}.params.max_length", 77)
        o.put("conditioning.max_length", length, f"{text}.params.max_length")
        o.put("model.params.text_len", length, f"{text}.params.max_length")
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
        {"target": "sat.conditioning.condition.SizeConditioner", "params": {"dim": dims[0]}},
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
    width = o.out.get("model", {}).get("params", {}).get("text_dim")
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
            o.same(f"{decoder}.{key}", f"{encoder}.{key}")
        quant = False
    else:
        encoder, quant = f"{at}.params.ddconfig", True
        o.same(f"{at}.params.embed_dim", f"{encoder}.z_channels")
    o.put("first_stage.target", "sat.first_stage.model.AutoencoderKL", f"{at}.target")
    for theirs, ours in FIRST_STAGE.items():
        o.move(f"{encoder}.{theirs}", f"first_stage.params.{ours}")
        if found := re.fullmatch(r"(\d+)f", str(o.subtree(f"{encoder}.{theirs}"))):
            o.refuse(
                f"{encoder}.{theirs}",
                f"{found[0]!r} is a known typo of the official cogview3_base_distill_4step.yaml, which means "
                f"{found[1]}: correct it in the file, or add {encoder}.{theirs}={found[1]} to the command",
            )
    kind = o.take(f"{encoder}.attn_type")
    attention = bool(o.take(f"{encoder}.mid_attn", True)) and kind != "none"
    o.put("first_stage.params.mid_attention", attention, encoder)
    o.put("first_stage.params.quant_convs", quant, at)
    o.move("model.scale_factor", "first_stage.params.scale_factor")
    o.move(f"{at}.params.ckpt_path", "checkpoint.first_stage")


def _args(o: Official) -> None:
    """The ``args`` section, and the sizes that a model draws."""
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
    o.same("args.sampling_latent_dim", "model.network_config.params.in_channels")
    _relay_args(o)
    _sizes(o)


def _relay_args(o: Official) -> None:
    """Whether the model is a relay model must be said alike in both sections."""
    relay = "process" in o.out.get("diffusion", {})
    given = o.take("args.relay_model")
    if given not in (None, relay) and o.subtree("model.sampler_config"):
        o.refuse(
            "args.relay_model",
            f"expected {relay}, as the sampler is {_class_name(o, 'model.sampler_config')}; "
            f"got {shown(given)}",
        )
    if relay:
        o.move("args.input_dir", "sampling.input_dir")


def _sizes(o: Official) -> None:
    """Height, width and their rule; what ``args`` leaves out is the size of the model's training."""
    both = o.take("args.sampling_image_size")
    rule = _rule(o)
    if rule:
        o.put("sampling.sizes", rule, "model.network_config")
    trained = 512 if rule.get("max") == _UNET_SIDES["base"][1] else 1024
    for name, axis in (("height", "x"), ("width", "y")):
        key = f"args.sampling_image_size_{axis}"
        side = o.take(key)
        if side is None and both is not None:
            side, key = both, "args.sampling_image_size"
        if side is not None or rule:
            o.put(f"sampling.{name}", side or min(trained, rule["max"]), key if side else "args")


def _rule(o: Official) -> dict[str, int]:
    """The size rule of a UNet, or that of ``sample_dit.py`` cut to what the position table holds."""
    model = o.out.get("model", {})
    params = model.get("params", {})
    if str(model.get("target")).endswith("CogView3UNet"):
        low, high, multiple = _UNET_SIDES["relay" if "process" in o.out.get("diffusion", {}) else "base"]
        return {"min": low, "max": high, "multiple": multiple, "max_area": high * high}
    table, patch = params.get("table_size"), params.get("patch", 2)
    if not (isinstance(table, list) and all(isinstance(n, int) for n in [*table, patch])):
        return {}
    low, high, multiple = _SIDES
    cell = 8 * patch
    if min(table) * cell < low:
        low, multiple = cell, cell
    high = min(high, min(table) * cell)
    return {"min": low, "max": high, "multiple": multiple, "max_area": high * high}


# -- the official denoiser, sampler, guider and loss as our ``diffusion`` and ``sampling``

_TOTAL = 1000
"""Training timesteps of every official model."""
_SAMPLER, _LOSS, _DENOISER = "model.sampler_config", "model.loss_fn_config", "model.denoiser_config"
_NETWORK = "model.network_config.params"
_DEAF = {"ZeroSNRDDIMSampler", "LinearMultistepSampler"}
"""Official samplers that do not pass ``cfg_cond_scale`` to the network."""


def _denoiser(o: Official) -> None:
    """Schedule and prediction."""
    o.choose(_DENOISER, {"DiscreteDenoiser": ""}, "denoiser")
    levels, scales = (f"{_DENOISER}.params.{name}_config" for name in ("discretization", "scaling"))
    target, params = _schedule(o, levels)
    o.put("diffusion.schedule", {"target": target, "params": params}, levels)
    scaling = o.choose(scales, PREDICTIONS, "scaling")
    o.put("diffusion.prediction", {"target": scaling, "params": {}}, scales)
    quantised = f"{_DENOISER}.params.quantize_c_noise"
    if o.take(quantised, True) == target.endswith("ZeroSNR"):
        if target.endswith("ZeroSNR"):
            o.refuse(quantised, "only false is supported with the zero-SNR schedule")
        else:
            o.refuse(quantised, "only true is supported with this schedule")


def _schedule(o: Official, at: str) -> tuple[str, dict[str, Any]]:
    """Our schedule for the discretization at ``at``."""
    target = o.choose(at, SCHEDULES, "discretization")
    for key, value in (("linear_start", 0.00085), ("linear_end", 0.012), ("num_timesteps", _TOTAL)):
        if (given := o.take(f"{at}.params.{key}")) not in (None, value):
            o.refuse(f"{at}.params.{key}", f"only {value} is supported, got {shown(given)}")
    shift = o.take(f"{at}.params.shift_scale", 1.0)
    return target, {"shift": shift} if target.endswith("ZeroSNR") else {}


def _same_schedule(o: Official, at: str) -> None:
    """The discretization at ``at`` must be that of the denoiser, if there is one."""
    own = _schedule(o, at)
    if o.subtree(_DENOISER) and own != _schedule(o, f"{_DENOISER}.params.discretization_config"):
        o.refuse(at, "expected the discretization of denoiser_config")


def _sampler(o: Official) -> None:
    """Sampler, steps, guider; with a relay sampler also the process."""
    target = o.choose(_SAMPLER, SAMPLERS, "sampler")
    name = _class_name(o, _SAMPLER)
    params = {
        ours: value
        for theirs, ours in SAMPLER_PARAMS.get(name, {}).items()
        if (value := o.take(f"{_SAMPLER}.params.{theirs}")) is not None
    }
    if name == "DDIMSampler":
        params.setdefault("share", 0.1)  # the official default
    if name == RELAY:
        _relay_sampler(o, params)
    else:
        o.move(f"{_SAMPLER}.params.num_steps", "sampling.steps")
    o.put("sampling.sampler", {"target": target, "params": params}, f"{_SAMPLER}.target")
    _same_schedule(o, f"{_SAMPLER}.params.discretization_config")
    _guider(o, name)


def _relay_sampler(o: Official, params: dict[str, Any]) -> None:
    """The last ``partial_num_steps`` of ``num_steps``, from the low-resolution image."""
    at = f"{_SAMPLER}.params"
    steps, taken = o.take(f"{at}.num_steps"), o.take(f"{at}.partial_num_steps", 20)
    if not (isinstance(steps, int) and isinstance(taken, int) and 0 < taken <= steps):
        o.refuse(
            f"{at}.partial_num_steps",
            f"expected 1 to num_steps of the num_steps, got {shown(taken)} of {shown(steps)}",
        )
        return
    o.put("sampling.steps", taken, f"{at}.partial_num_steps")
    _relay(o, _TOTAL * taken / steps, "linear", f"{at}.partial_num_steps")
    if params.get("churn"):
        params["churn"] = params["churn"] * taken / steps  # official churn is counted over the whole run


def _relay(o: Official, partial: float, blend: str, key: str) -> None:
    """The process of relay diffusion over the first ``partial`` timesteps."""
    params = {"partial": partial, "blend": blend, "factor": o.take("model.lr_scale", 2)}
    mixin = {"target": "sat.mixins.relay.RelayNoise", "params": params}
    process = {"target": "sat.diffusion.process.Process", "params": {"mixins": {"relay": mixin}}}
    o.put("diffusion.process", process, key)


def _guider(o: Official, sampler_name: str) -> None:
    """Guidance by two predictions, by a strength that the network is told, or none."""
    at, strength = f"{_SAMPLER}.params.guider_config", f"{_SAMPLER}.params.cfg_cond_scale"
    guided = o.subtree(at)
    target = o.choose(at, GUIDERS, "guider") if guided else GUIDERS["IdentityGuider"]
    params = {}
    if target.endswith("ClassifierFree"):
        if (scale := o.take(f"{at}.params.scale")) is not None:
            params["scale"] = scale
        threshold = f"{at}.params.dyn_thresh_config"
        if o.subtree(threshold):
            o.choose(threshold, {"NoDynamicThresholding": ""}, "thresholding")
    if o.subtree(strength) is not None and sampler_name not in _DEAF:
        scale = o.take(strength)
        if target.endswith("ClassifierFree"):
            o.refuse(strength, "expected the guider IdentityGuider: guidance is either an input or computed")
        elif o.subtree(_NETWORK) is not None and o.subtree(f"{_NETWORK}.cfg_cond_embed_dim") is None:
            o.refuse(strength, f"the network takes none: there is no {_NETWORK}.cfg_cond_embed_dim")
        target, params, at = "sat.diffusion.guidance.Embedded", {"scale": scale}, strength
        o.same(f"{_SAMPLER}.params.cfg_cond_embed_dim", f"{_NETWORK}.cfg_cond_embed_dim")
    if guided or target.endswith("Embedded"):
        o.put("sampling.guider", {"target": target, "params": params}, at)


def _loss(o: Official) -> None:
    """The training loss, which inference configs name as ``torch.nn.Identity``."""
    name, params = _class_name(o, _LOSS), f"{_LOSS}.params"
    if name == "Identity":
        return
    o.choose(_LOSS, LOSSES, "loss")
    for key, only in (("type", "l2"), ("batch2model_keys", [])):
        if (given := o.take(f"{params}.{key}", only)) != only:
            o.refuse(f"{params}.{key}", f"only {only!r} is supported, got {shown(given)}")
    draws = f"{params}.sigma_sampler_config"
    if o.subtree(draws):
        o.choose(draws, {"DiscreteSampling": ""}, "sigma sampler")
        if o.take(f"{draws}.params.num_idx", _TOTAL) != _TOTAL:
            o.refuse(f"{draws}.params.num_idx", f"only {_TOTAL} is supported")
        _same_schedule(o, f"{draws}.params.discretization_config")
    if o.subtree(f"{_DENOISER}.params.weighting_config"):
        o.choose(f"{_DENOISER}.params.weighting_config", {"EpsWeighting": ""}, "weighting")
    offset = o.take(f"{params}.offset_noise_level", 0.0)
    o.put(
        "diffusion.loss",
        {"target": "sat.diffusion.loss.DenoisingLoss", "params": {"offset_noise": offset}},
        _LOSS,
    )
    if name == LOSSES_RELAY:
        _relay_loss(o, params)


LOSSES_RELAY = "LinearRelayDiffusionLoss"


def _relay_loss(o: Official, at: str) -> None:
    """Training's relay must be sampling's; without a relay sampler it alone says what relay is."""
    partial = o.take(f"{at}.partial_num_steps", 500)
    blend = o.take(f"{at}.blurring_schedule", "linear")
    if blend not in BLENDS:
        o.refuse(f"{at}.blurring_schedule", f"expected one of {', '.join(BLENDS)}, got {shown(blend)}")
        return
    process = o.out.get("diffusion", {}).get("process")
    if process is None:
        _relay(o, partial, blend, f"{at}.partial_num_steps")
        return
    sampled = process["params"]["mixins"]["relay"]["params"]
    pairs = (("partial_num_steps", partial, "partial"), ("blurring_schedule", blend, "blend"))
    for key, theirs, name in pairs:
        if theirs != sampled[name]:
            o.notes.append(
                f"{o.place(f'{at}.{key}')}: training relays with {name} {theirs}, sampling with "
                f"{sampled[name]}: diffusion.process takes that of sampling for both"
            )


def _class_name(o: Official, key: str) -> str:
    """The name of the official class at ``key``, without its module."""
    return str(o.subtree(f"{key}.target")).rpartition(".")[2]

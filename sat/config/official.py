"""Official CogView3 configs (``args`` and ``model`` with ``sgm.*`` targets) as experiments of this project.

Every official key is translated, refused with its line, or named in a notice: nothing is dropped silently.
Facts about the official keys are from ``sat/configs/*.yaml``, ``sample_dit.py``, ``sample_unet.py``,
``dit.py``, ``openaimodel.py`` and ``sgm/modules/diffusionmodules/{denoiser,sampling,loss}.py``.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sat.config import official_keys as keys
from sat.config.official_keys import Official
from sat.config.yaml_source import ConfigError, Marks, Override, Source, dotted, find, read_override, shown

_SIDES = (512, 2048, 32)
"""Smallest and largest side and their multiple in pixels. Source: official ``sample_dit.py:140-143``."""
_UNET_SIDES = {"base": (256, 1024, 32), "relay": (512, 4096, 64)}
"""The same for the UNets, around the sizes of their training; relay's input is half as large."""
_TOTAL = 1000
"""Training timesteps of every official model."""
_SIZE_KEYS = ["original_size_as_tuple", "crop_coords_top_left", "target_size_as_tuple"]
_NETWORK, _SAMPLER = "model.network_config.params", "model.sampler_config"
_LOSS, _DENOISER = "model.loss_fn_config", "model.denoiser_config"


class Translated(NamedTuple):
    """An official config as a native tree, and notices about keys without effect here."""

    source: Source
    notices: list[str]


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
    for end, name in enumerate(key, 1):
        index: Any = name
        if isinstance(node, list) and name.isdigit() and int(name) < len(node):
            index = int(name)
        elif not isinstance(node, dict):
            raise ConfigError.of("override", dotted(key), "names no key of the official config")
        if end == len(key):
            node[index] = value
        elif isinstance(node, dict) and node.get(name) is None:
            node[name] = {}
        node = node[index]
    for known in [k for k in source.marks if k[: len(key)] == key]:
        del source.marks[known]
    source.marks[key] = mark
    return True


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
    if o.get("model.network_config"):
        _network(o)
    if o.get(_DENOISER):
        _denoiser(o)
    if o.get(_SAMPLER):
        _sampler(o)
    if o.get(_LOSS):
        _loss(o)
    if o.get("model.conditioner_config"):
        _conditioner(o, t5)
    if o.get("model.first_stage_config"):
        _first_stage(o)
    _args(o)
    _sizes(o)
    o.finish()
    return Translated(Source(o.out, o.out_marks), o.notices())


def _merged(old: Any, new: Any) -> Any:
    """``new`` over ``old``, mappings merged, all else replaced: how the official code composes its files."""
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        return copy.deepcopy(new)
    return {**old, **{name: _merged(old.get(name), value) for name, value in new.items()}}


def _network(o: Official) -> None:  # noqa: C901
    """CogView3-Plus, or the UNets of CogView3-Base and CogView3-Relay and of their distilled versions."""
    at, target = _NETWORK, "model.network_config.target"
    ours = o.choose("model.network_config", keys.NETWORKS, "network")
    if not ours:
        raise ConfigError(o.problems)
    unet = ours.endswith("CogView3UNet")
    o.put("model.target", ours, target)
    for theirs, name in (keys.UNET if unet else keys.TRANSFORMER).items():
        o.move(f"{at}.{theirs}", f"model.params.{name}")
    o.same(f"{at}.out_channels", f"{at}.in_channels")
    o.move(f"{at}.dtype", "sampling.dtype")
    if unet:
        for name, (value, default) in keys.UNET_FIXED.items():
            o.only(f"{at}.{name}", value, default)
        depths, multipliers = o.take(f"{at}.transformer_depth", 1), o.get(f"{at}.channel_mult")
        if isinstance(depths, int) and isinstance(multipliers, list):
            depths = [depths] * len(multipliers)
        o.put("model.params.depths", depths, f"{at}.transformer_depth")
        last, middle = (
            depths[-1] if isinstance(depths, list) and depths else depths,
            "transformer_depth_middle",
        )
        if (given := o.take(f"{at}.{middle}", last)) != last:
            o.refuse(f"{at}.{middle}", f"only {last}, the last depth, is supported, got {given}")
        o.one_of(f"{at}.spatial_transformer_attn_type", ["softmax", "softmax-xformers"], "softmax")
        return
    if o.get(f"{at}.time_embed_dim") is None:  # official default: as wide as the transformer
        o.put("model.params.emb_dim", o.get(f"{at}.hidden_size"), f"{at}.hidden_size")
    position = f"{at}.modules.pos_embed_config.params"
    table = [o.take(f"{position}.max_height"), o.take(f"{position}.max_width")]
    if None not in table:
        o.put("model.params.table_size", table, f"{position}.max_height")
    patch, block = o.get(f"{at}.patch_size"), o.take(f"{at}.block_size", 16)
    if isinstance(patch, int) and block != 8 * patch:
        o.refuse(f"{at}.block_size", f"expected {8 * patch} pixels (8 x patch_size {patch}), got {block}")
    for name, mixin in keys.MIXINS.items():
        o.choose(f"{at}.modules.{name}_config", [mixin], "mixin")


def _denoiser(o: Official) -> None:
    """Schedule and prediction."""
    o.choose(_DENOISER, ["DiscreteDenoiser"], "denoiser")
    levels, scales = (f"{_DENOISER}.params.{name}_config" for name in ("discretization", "scaling"))
    target, params = _schedule(o, levels)
    o.put("diffusion.schedule", {"target": target, "params": params}, levels)
    scaling = o.choose(scales, keys.PREDICTIONS, "scaling")
    o.put("diffusion.prediction", {"target": scaling, "params": {}}, scales)
    zero_snr, quantised = target.endswith("ZeroSNR"), f"{_DENOISER}.params.quantize_c_noise"
    if o.take(quantised, True) == zero_snr:
        which = "false is supported with the zero-SNR" if zero_snr else "true is supported with this"
        o.refuse(quantised, f"only {which} schedule")


def _schedule(o: Official, at: str) -> tuple[str, dict[str, Any]]:
    """Our schedule for the discretization at ``at``."""
    target = o.choose(at, keys.SCHEDULES, "discretization")
    for key, value in (("linear_start", 0.00085), ("linear_end", 0.012), ("num_timesteps", _TOTAL)):
        o.only(f"{at}.params.{key}", value, value)
    shift = o.take(f"{at}.params.shift_scale", 1.0)
    return target, {"shift": shift} if target.endswith("ZeroSNR") else {}


def _same_schedule(o: Official, at: str) -> None:
    """Refuse a discretization at ``at`` that is not the denoiser's, if there is one."""
    own = _schedule(o, at)
    if o.get(_DENOISER) and own != _schedule(o, f"{_DENOISER}.params.discretization_config"):
        o.refuse(at, "expected the discretization of denoiser_config")


def _sampler(o: Official) -> None:
    """Sampler, steps, guider; with a relay sampler also the process."""
    at, name = f"{_SAMPLER}.params", o.class_name(_SAMPLER)
    target = o.choose(_SAMPLER, keys.SAMPLERS, "sampler")
    options = keys.SAMPLER_PARAMS.get(name, {})
    params = {ours: o.take(f"{at}.{theirs}") for theirs, ours in options.items()}
    params = {ours: value for ours, value in params.items() if value is not None}
    if name == "DDIMSampler":
        params.setdefault("share", 0.1)  # the official default
    if name != keys.RELAY:
        o.move(f"{at}.num_steps", "sampling.steps")
    else:  # the last ``partial_num_steps`` of ``num_steps``, from the low-resolution image
        steps, partial = o.take(f"{at}.num_steps"), f"{at}.partial_num_steps"
        taken = o.take(partial, 20)
        if isinstance(steps, int) and isinstance(taken, int) and 0 < taken <= steps:
            o.put("sampling.steps", taken, partial)
            _relay(o, _TOTAL * taken / steps, "linear", partial)
            if params.get("churn"):
                params["churn"] *= taken / steps  # official churn is counted over the whole run
        else:
            got = f"{shown(taken)} of {shown(steps)}"
            o.refuse(partial, f"expected 1 to num_steps of the num_steps, got {got}")
    o.put("sampling.sampler", {"target": target, "params": params}, f"{_SAMPLER}.target")
    _same_schedule(o, f"{at}.discretization_config")
    _guider(o, name)


def _relay(o: Official, partial: float, blend: str, key: str) -> None:
    """The process of relay diffusion over the first ``partial`` timesteps."""
    params = {"partial": partial, "blend": blend, "factor": o.take("model.lr_scale", 2)}
    mixin = {"target": "sat.mixins.relay.RelayNoise", "params": params}
    process = {"target": "sat.diffusion.process.Process", "params": {"mixins": {"relay": mixin}}}
    o.put("diffusion.process", process, key)


def _guider(o: Official, sampler: str) -> None:
    """Guidance by two predictions, by a strength that the network is told, or none."""
    at, strength = f"{_SAMPLER}.params.guider_config", f"{_SAMPLER}.params.cfg_cond_scale"
    guided = o.get(at)
    target = o.choose(at, keys.GUIDERS, "guider") if guided else keys.GUIDERS["IdentityGuider"]
    params: dict[str, Any] = {}
    if target.endswith("ClassifierFree"):
        if (scale := o.take(f"{at}.params.scale")) is not None:
            params["scale"] = scale
        if o.get(f"{at}.params.dyn_thresh_config"):
            o.choose(f"{at}.params.dyn_thresh_config", ["NoDynamicThresholding"], "thresholding")
    # Two official samplers do not pass the strength to the network.
    if o.get(strength) is not None and sampler not in ("ZeroSNRDDIMSampler", "LinearMultistepSampler"):
        params, dim = {"scale": o.take(strength)}, f"{_NETWORK}.cfg_cond_embed_dim"
        if target.endswith("ClassifierFree"):
            o.refuse(strength, "expected the guider IdentityGuider: guidance is either an input or computed")
        elif o.get(_NETWORK) is not None and o.get(dim) is None:
            o.refuse(strength, f"the network takes none: there is no {dim}")
        target, at = "sat.diffusion.guidance.Embedded", strength
        o.same(f"{_SAMPLER}.params.cfg_cond_embed_dim", dim)
    if guided or target.endswith("Embedded"):
        o.put("sampling.guider", {"target": target, "params": params}, at)


def _loss(o: Official) -> None:
    """The training loss, which inference configs name as ``torch.nn.Identity``.

    Its relay must be sampling's; without a relay sampler it alone says what relay is.
    """
    name, at = o.class_name(_LOSS), f"{_LOSS}.params"
    if name == "Identity":
        return
    o.choose(_LOSS, keys.LOSSES, "loss")
    kind = o.one_of(f"{at}.type", ("l2", "l1"), "l2")
    o.only(f"{at}.batch2model_keys", [], [])
    draws, weighting = f"{at}.sigma_sampler_config", f"{_DENOISER}.params.weighting_config"
    if o.get(draws):
        o.choose(draws, ["DiscreteSampling"], "sigma sampler")
        o.only(f"{draws}.params.num_idx", _TOTAL, _TOTAL)
        _same_schedule(o, f"{draws}.params.discretization_config")
    if o.get(weighting):
        o.choose(weighting, ["EpsWeighting"], "weighting")
    params = {"offset_noise": o.take(f"{at}.offset_noise_level", 0.0)}
    params |= {"kind": kind} if kind == "l1" else {}
    o.put("diffusion.loss", {"target": "sat.diffusion.loss.DenoisingLoss", "params": params}, _LOSS)
    if name != "LinearRelayDiffusionLoss":
        return
    partial = o.take(f"{at}.partial_num_steps", 500)
    blend = o.one_of(f"{at}.blurring_schedule", keys.BLENDS, "linear")
    process = o.out.get("diffusion", {}).get("process")
    if blend is not None and process is None:
        _relay(o, partial, blend, f"{at}.partial_num_steps")
    elif blend is not None:
        sampled = process["params"]["mixins"]["relay"]["params"]
        pairs = (("partial_num_steps", partial, "partial"), ("blurring_schedule", blend, "blend"))
        for key, theirs, name in pairs:
            if theirs != sampled[name]:
                o.notes.append(
                    f"{o.place(f'{at}.{key}')}: training relays with {name} {theirs}, sampling with "
                    f"{sampled[name]}: diffusion.process takes that of sampling for both"
                )


def _conditioner(o: Official, t5: Mapping[str, Any] | None) -> None:  # noqa: C901
    """Text encoder and size embedding. The encoder's shape is given, read beside its weights, or T5-XXL's."""
    at = "model.conditioner_config.params.emb_models"
    o.choose("model.conditioner_config", ["GeneralConditioner"], "conditioner")
    models = o.get(at) if isinstance(o.get(at), list) else []
    names = [m.get("input_key") if isinstance(m, Mapping) else None for m in models]
    if names.count("txt") != 1 or [name for name in names if name != "txt"] != _SIZE_KEYS:
        o.refuse(at, f"expected txt, then {', '.join(_SIZE_KEYS)}, got {names}")
        return
    dims = []
    for index, name in enumerate(names):
        o.used |= {f"{at}.{index}.input_key", f"{at}.{index}.is_trainable"}
        if name != "txt":
            o.choose(f"{at}.{index}", ["ConcatTimestepEmbedderND"], "size embedding")
            dims.append(o.take(f"{at}.{index}.params.outdim"))
    if len(set(dims)) > 1:
        o.refuse(at, f"expected one outdim for all three sizes, got {dims}")
    size = {"target": "sat.conditioning.conditioner.SizeConditioner", "params": {"dim": dims[0]}}
    o.put("conditioning.size", size, at)

    text = f"{at}.{names.index('txt')}"
    o.choose(text, ["FrozenT5Embedder"], "text encoder")
    model = o.out.get("model", {})
    o.move(f"{text}.params.max_length", "conditioning.max_length")
    if model.get("target", "").endswith("CogView3UNet"):  # which takes any length officially
        for native in ("conditioning.max_length", "model.params.text_len"):
            o.put(native, o.take(f"{text}.params.max_length", 77), f"{text}.params.max_length")
    o.move(f"{text}.params.model_dir", "checkpoint.text")
    folder, shape = o.take(f"{text}.params.model_dir"), {}
    found = find(Path(folder) / "config.json", o.folder) if isinstance(folder, str) else None
    if t5 is None and found is not None:
        from sat.checkpoint.verify import CheckpointError, read_json

        try:
            t5 = read_json(found)
        except CheckpointError as error:
            raise ConfigError.of(str(found), "", str(error).removeprefix(f"{found}: ")) from error
    width = model.get("params", {}).get("text_dim")
    if t5 is not None:
        shape = {ours: t5[theirs] for theirs, ours in keys.T5.items() if theirs in t5}
    elif width not in (None, 4096):
        shape = {"dim": width}
        o.notes.append(
            f"there is no config.json in {folder}: the text encoder is taken for T5-XXL, but {width} wide"
        )
    o.put("conditioning.text", {"target": "sat.models.t5.T5Encoder", "params": shape}, text)


def _first_stage(o: Official) -> None:
    """The autoencoder, written as one ``ddconfig`` or as an encoder and a decoder that are alike."""
    at = "model.first_stage_config"
    if o.choose(at, keys.AUTOENCODERS, "autoencoder") == "pair":
        encoder, decoder = f"{at}.params.encoder_config.params", f"{at}.params.decoder_config.params"
        o.choose(f"{at}.params.encoder_config", ["Encoder"], "encoder")
        o.choose(f"{at}.params.decoder_config", ["Decoder"], "decoder")
        if o.get(f"{at}.params.regularizer_config"):
            o.choose(f"{at}.params.regularizer_config", ["DiagonalGaussianRegularizer"], "regulariser")
        for key in (*keys.FIRST_STAGE, "mid_attn", "attn_type"):
            o.same(f"{decoder}.{key}", f"{encoder}.{key}")
        quant = False
    else:
        encoder, quant = f"{at}.params.ddconfig", True
        o.same(f"{at}.params.embed_dim", f"{encoder}.z_channels")
    o.put("first_stage.target", "sat.first_stage.model.AutoencoderKL", f"{at}.target")
    for theirs, ours in keys.FIRST_STAGE.items():
        o.move(f"{encoder}.{theirs}", f"first_stage.params.{ours}")
        if found := re.fullmatch(r"(\d+)f", str(o.get(f"{encoder}.{theirs}"))):
            o.put(f"first_stage.params.{ours}", int(found[1]), f"{encoder}.{theirs}")
            place = o.place(f"{encoder}.{theirs}")
            o.notes.append(f"{place}: {found[0]!r} is a known typo of the official file, read as {found[1]}")
    kind = o.take(f"{encoder}.attn_type")
    attention = bool(o.take(f"{encoder}.mid_attn", True)) and kind != "none"
    o.put("first_stage.params.mid_attention", attention, encoder)
    o.put("first_stage.params.quant_convs", quant, at)
    o.move("model.scale_factor", "first_stage.params.scale_factor")
    o.move(f"{at}.params.ckpt_path", "checkpoint.first_stage")


def _args(o: Official) -> None:
    """The ``args`` section but for sizes; it and the sampler must agree whether this is a relay model."""
    for theirs, ours in keys.ARGS.items():
        o.move(f"args.{theirs}", ours)
    for flag in ("fp16", "bf16"):
        if o.take(f"args.{flag}"):
            o.put("sampling.dtype", flag, f"args.{flag}")
    if o.take("args.input_type", "cli") == "txt":
        o.move("args.input_file", "sampling.prompt_file")
    o.same("args.sampling_latent_dim", f"{_NETWORK}.in_channels")
    relay, given = "process" in o.out.get("diffusion", {}), o.take("args.relay_model")
    if given not in (None, relay) and o.get(_SAMPLER):
        what = f"expected {relay}, as the sampler is {o.class_name(_SAMPLER)}; got {shown(given)}"
        o.refuse("args.relay_model", what)
    if relay:
        o.move("args.input_dir", "sampling.input_dir")


def _sizes(o: Official) -> None:
    """Height, width and their rule: a UNet's, or that of ``sample_dit.py`` cut to the position table.

    A side that ``args`` leaves out is that of the model's training.
    """
    model = o.out.get("model", {})
    table, patch = model.get("params", {}).get("table_size"), model.get("params", {}).get("patch", 2)
    sides = None
    if str(model.get("target")).endswith("CogView3UNet"):
        sides = _UNET_SIDES["relay" if "process" in o.out.get("diffusion", {}) else "base"]
    elif isinstance(table, list) and all(isinstance(n, int) for n in [*table, patch]):
        (low, high, multiple), cell = _SIDES, 8 * patch
        if min(table) * cell < low:
            low, multiple = cell, cell
        sides = low, min(high, min(table) * cell), multiple
    if sides is not None:
        low, high, multiple = sides
        rule = {"min": low, "max": high, "multiple": multiple, "max_area": high * high}
        o.put("sampling.sizes", rule, "model.network_config")
    both = o.take("args.sampling_image_size")
    for name, axis in (("height", "x"), ("width", "y")):
        key = f"args.sampling_image_size_{axis}"
        side = o.take(key)
        if side is None and both is not None:
            side, key = both, "args.sampling_image_size"
        if side is not None:
            o.put(f"sampling.{name}", side, key)
        elif sides is not None:
            trained = 512 if sides == _UNET_SIDES["base"] else 1024
            o.put(f"sampling.{name}", min(trained, sides[1]), "args")

"""Official denoiser, sampler, guider and loss sections as our ``diffusion`` and ``sampling``.

Facts about the official keys are from ``sgm/modules/diffusionmodules/{denoiser,sampling,loss}.py``.
"""

from __future__ import annotations

from typing import Any

from sat.config.official_keys import (
    BLENDS,
    GUIDERS,
    LOSSES,
    PREDICTIONS,
    RELAY,
    SAMPLER_PARAMS,
    SAMPLERS,
    SCHEDULES,
)
from sat.config.official_tree import Official
from sat.config.yaml_source import shown

_TOTAL = 1000
"""Training timesteps of every official model."""
_SAMPLER, _LOSS, _DENOISER = "model.sampler_config", "model.loss_fn_config", "model.denoiser_config"
_UNET = "model.network_config.params"
_DEAF = {"ZeroSNRDDIMSampler", "LinearMultistepSampler"}
"""Official samplers that do not pass ``cfg_cond_scale`` to the network."""


def denoiser(o: Official) -> None:
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


def sampler(o: Official) -> None:
    """Sampler, steps, guider; with a relay sampler also the process."""
    target = o.choose(_SAMPLER, SAMPLERS, "sampler")
    name = class_name(o, _SAMPLER)
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
        elif o.subtree(_UNET) is not None and o.subtree(f"{_UNET}.cfg_cond_embed_dim") is None:
            o.refuse(strength, f"the network takes none: there is no {_UNET}.cfg_cond_embed_dim")
        target, params, at = "sat.diffusion.guidance.Embedded", {"scale": scale}, strength
        o.same(f"{_SAMPLER}.params.cfg_cond_embed_dim", f"{_UNET}.cfg_cond_embed_dim")
    if guided or target.endswith("Embedded"):
        o.put("sampling.guider", {"target": target, "params": params}, at)


def loss(o: Official) -> None:
    """The training loss, which inference configs name as ``torch.nn.Identity``."""
    name, params = class_name(o, _LOSS), f"{_LOSS}.params"
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


def class_name(o: Official, key: str) -> str:
    """The name of the official class at ``key``, without its module."""
    return str(o.subtree(f"{key}.target")).rpartition(".")[2]

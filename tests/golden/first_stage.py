"""Checks of the autoencoders: ``vae*``."""

from __future__ import annotations

import torch

from tests.golden.build import first_stage
from tests.golden.file import Golden
from tests.golden.report import Comparison, Report


@torch.inference_mode()
def check(golden: Golden, report: Report) -> None:
    """Encoder output, posterior, a sample of it with the stored noise, decodings; all unscaled."""
    vae = first_stage(golden.json("config"), golden.weights())
    ours: dict[str, Comparison] = {}
    if "in.image" in golden:
        image = golden["in.image"]
        posterior = vae.encode(image)
        raw = vae.encoder(image)
        ours |= {
            "out.encoder_output": (report.network, raw),
            "out.moments": (report.network, vae.quant(raw)),
            "out.mode": (report.network, posterior.mode()),
            "out.logvar_clamped": (report.network, posterior.logvar),
            "out.decode_mode": (report.network, vae.decode(posterior.mode())),
        }
        if "in.posterior_noise" in golden:
            sample = posterior.sample(golden["in.posterior_noise"])
            ours["out.sample"] = (report.network, sample)
            if "out.decode_sample" in golden:
                ours["out.decode_sample"] = (report.network, vae.decode(sample))
    if "in.z" in golden:
        ours["out.decode_z"] = (report.network, vae.decode(golden["in.z"]))
    report.all(golden, ours)

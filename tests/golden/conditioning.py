"""Checks of the text encoder and the size vector: ``conditioner*``."""

from __future__ import annotations

import torch

from sat.conditioning.conditioner import Condition, SizeConditioner
from tests.golden.build import size_dim, text_encoder
from tests.golden.file import Golden
from tests.golden.report import Report


@torch.inference_mode()
def check(golden: Golden, report: Report) -> None:
    """Text and size vector of both halves of a guided batch, from the stored token ids and sizes."""
    config = golden.json("t5_config") if "t5_config" in golden.metadata else None
    text = text_encoder(golden.weights("embedders.0.transformer."), config)
    sizes = SizeConditioner(size_dim(golden.json("config")))
    ids = golden["in.input_ids"]
    hidden = text(ids)
    names = ("original_size_as_tuple", "crop_coords_top_left", "target_size_as_tuple")
    vector = sizes(*(golden[f"in.{name}"] for name in names))
    cond = Condition(hidden, vector)
    uncond = cond.null()
    ours = {
        "out.c.crossattn": (report.network, cond.text),
        "out.c.vector": (report.table, cond.vector),
        "out.uc.crossattn": (report.exact, uncond.text),
        "out.uc.vector": (report.table, uncond.vector),
        "out.t5_with_attention_mask_for_contrast": (report.network, text(ids, ids != 0)),
    }
    if "in.input_ids_empty" in golden:
        ours["out.uc_crossattn_without_force_zero"] = (report.network, text(golden["in.input_ids_empty"]))
    report.all(golden, ours)
